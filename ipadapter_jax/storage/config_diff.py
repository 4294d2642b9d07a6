"""Differences between the recorded settings of a folder and the current ones."""

import json
from collections.abc import Mapping

_ABSENT = object()


def diff_configs(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """The differences of two nested JSON objects, one string each: `optim.learning_rate: 0.0001 -> 0.0002`."""
    before, after = (_flat(json.loads(json.dumps(side))) for side in (old, new))
    return [
        f"{key}: {_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}"
        for key in before | after
        if key not in before or key not in after or before[key] != after[key]
    ]


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{dotted key: value}; an empty object counts as a value, so that its absence shows."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _shown(value: object) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value)
