"""What differs between the settings that a folder was begun with and those of now."""

import json
from collections.abc import Mapping
from typing import Any

_ABSENT = object()


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two nested JSON objects, a line each: `optim.learning_rate: 0.0001 -> 0.0002`."""
    before, after = (_flat(json.loads(json.dumps(side))) for side in (old, new))
    return [
        f"{key}: {_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}"
        for key in before | after
        if key not in before or key not in after or before[key] != after[key]
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}; an empty object counts as a value, so that its absence shows."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value)
