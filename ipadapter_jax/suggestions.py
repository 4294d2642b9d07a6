"""What a person may have meant: names in order of likeness, and what lies where a path leads nowhere."""

import difflib
from collections.abc import Iterable


def closest_first(word: str, names: Iterable[str]) -> list[str]:
    """The names, the likest to `word` first; equally like ones in their alphabetical order."""

    def unlikeness(name: str) -> float:
        return -difflib.SequenceMatcher(None, word.lower(), name.lower()).ratio()

    return sorted(sorted(names), key=unlikeness)
