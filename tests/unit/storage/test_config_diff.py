"""What differs between two nested objects."""

import json

from ipadapter_jax.storage.config_diff import differences


def test_differences() -> None:
    old = {"optim": {"learning_rate": 1e-4, "warmup": 10}, "data": {"files": [1, 2]}, "gone": None, "deep": {}}
    new = {"optim": {"learning_rate": 2e-4, "warmup": 10}, "data": {"files": (1, 2)}, "name": "b", "deep": {"a": {}}}
    assert differences(old, new) == [
        "optim.learning_rate: 0.0001 -> 0.0002",
        "gone: null -> (absent)",
        "deep: {} -> (absent)",
        'name: (absent) -> "b"',
        "deep.a: (absent) -> {}",
    ]
    assert differences(old, json.loads(json.dumps(old))) == []
