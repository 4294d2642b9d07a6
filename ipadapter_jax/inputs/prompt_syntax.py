"""Finds prompt syntax of other programs, such as weights of words, which this pipeline reads as plain text."""

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class PromptSyntaxWarning(UserWarning):
    """A prompt holds another program's syntax, which is read as plain text."""


class ForeignSyntax(NamedTuple):
    """A piece of a prompt, what it means in other programs, and the remedy."""

    piece: str
    meaning: str


class _Syntax(NamedTuple):
    pattern: str
    meaning: str
    is_word_in_capitals: bool = False  # a plain word in a prompt that is all in capitals


_WEIGHT = "a weight of words: take it out, or name what matters earlier"
_SYNTAX = (
    _Syntax(
        r"(?i)<(?:lora|lyco|hypernet|hypernetwork):[^<>]*>",
        "a network to be loaded: merge it into the base model beforehand, and take this out",
    ),
    _Syntax(
        r"(?i)\bembedding:[^\s,()<>\[\]]+",
        "a learned token: write the token alone where the model's tokenizer has it, or take this out",
    ),
    # (word:1.3), but not (16:9), (at 12:30) or (John 3:16)
    _Syntax(r"\([^()]*[^()\d\s]\s*:\s*-?(?:\d?\.\d+|\d)\s*\)", _WEIGHT),
    _Syntax(r"\(\([^()]+\)\)?|(?<!\w)\([^()]+\)(?:\d|\+|--)|\b\w{2,}\+\+(?=[\s,.]|$)", _WEIGHT),
    _Syntax(
        r"\[(?!sic\]|\.\.\.\]|…\])[^\[\]]+\]",
        "a weaker weight, or words that change during the steps: take the brackets out",
    ),
    _Syntax(r"\{[^{}]+\}", "a stronger weight, or a choice of words: take the braces out"),
    _Syntax(r"(?<!\w)__[\w/*-]+?__(?!\w)", "a placeholder for words from a file: write one of them"),
    _Syntax(r"\bBREAK\b", "a break between parts that are encoded apart: take it out", is_word_in_capitals=True),
    _Syntax(r"\bAND\b", "a conjunction of prompts: write a comma, or and", is_word_in_capitals=True),
)
_LENGTH = 2000  # characters that are searched: many more than the 77 tokens that a model reads


def find_foreign_syntax(prompt: str) -> list[ForeignSyntax]:
    """The first piece of each foreign syntax in a prompt."""
    prompt = prompt[:_LENGTH]
    all_capitals = prompt == prompt.upper()
    found: dict[str, ForeignSyntax] = {}
    for syntax in _SYNTAX:
        piece = None if all_capitals and syntax.is_word_in_capitals else re.search(syntax.pattern, prompt)
        if piece is not None:
            found.setdefault(syntax.meaning, ForeignSyntax(piece[0][:60], syntax.meaning))
    return list(found.values())


def warn_of_foreign_syntax(prompts: Mapping[str, Iterable[str]], stacklevel: int = 2) -> None:
    """Warns once for each foreign syntax in the prompts, which are given by argument ("prompt", "negative_prompt")."""
    warned = set()
    for name, texts in prompts.items():
        for text in dict.fromkeys(texts):
            for piece, meaning in find_foreign_syntax(text):
                if meaning not in warned:
                    warned.add(meaning)
                    warnings.warn(
                        f"{name} has {piece!r}, which is read as plain text; in other programs it is {meaning}",
                        PromptSyntaxWarning,
                        stacklevel=stacklevel + 1,
                    )
