"""The settings of a run, recorded in its folder so that it is not resumed with other settings."""

import json
from pathlib import Path
from typing import Any

from ipadapter_jax import InputError
from ipadapter_jax.storage.atomic_files import write_atomically


def check_same(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings to `path` as JSON. Raises InputError if the file exists with other settings."""
    now = json.dumps(settings, indent=1)
    if not path.exists():
        write_atomically(path, now.encode())
    elif path.read_text() != now:
        before = json.loads(path.read_text())
        changed = [name for name in {**before, **settings} if before.get(name) != json.loads(now).get(name)]
        raise InputError(
            f"{path.parent} was made with other settings ({', '.join(changed)}): remove it, or name another"
        )
