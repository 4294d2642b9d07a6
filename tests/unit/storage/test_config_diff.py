"""What differs between two nested objects."""

import json

from ipadapter_jax.storage.config_diff import diff_configs


def test_differences() -> None:
    old = {"optim": {"learning_rate": 1e-4, "warmup": 10}, "data": {"files": [1, 2]}, "gone": None, "deep": {}}
    new = {"optim": {"learning_rate": 2e-4, "warmup": 10}, "data": {"files": (1, 2)}, "name": "b", "deep": {"a": {}}}
    assert diff_configs(old, new) == [
        "optim.learning_rate: 0.0001 -> 0.0002",
        "gone: null -> (absent)",
        "deep: {} -> (absent)",
        'name: (absent) -> "b"',
        "deep.a: (absent) -> {}",
    ]
    assert diff_configs(old, json.loads(json.dumps(old))) == []
