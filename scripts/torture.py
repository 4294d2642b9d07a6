"""Provokes a fault and holds what comes out against the figure that docs/reliability.md promises.

    python scripts/torture.py kill                       50 kills of one process, about 25 minutes on a core
    python scripts/torture.py kill --times 10 --processes 2
    python scripts/torture.py --help                     the other faults; FAULT --help their numbers

Ends with exit code 1, saying what was found instead, where a figure does not hold.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro
from torture_alone import Alone
from torture_damage import Damage
from torture_disk import Disk
from torture_endurance import Endurance
from torture_jobs import Jobs
from torture_kill import Kill
from torture_layouts import Layouts
from torture_numbers import Numbers
from torture_pictures import Pictures
from torture_refuse import Refuse
from torture_run import Broken
from torture_stop import Stop

FAULTS = {
    "kill": Kill,
    "stop": Stop,
    "layouts": Layouts,
    "damage": Damage,
    "disk": Disk,
    "pictures": Pictures,
    "numbers": Numbers,
    "refuse": Refuse,
    "jobs": Jobs,
    "alone": Alone,
    "endurance": Endurance,
}


def main(fault: Callable[[Path], str]) -> int:
    """Provokes it in a folder of its own, prints a line with the numbers, and returns the exit code."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        try:
            line, code = f"survived: {fault(Path(folder))}", 0
        except Broken as found:
            line, code = f"NOT survived: {found}", 1
    print(f"{line} ({time.monotonic() - began:.0f} s)")
    return code


if __name__ == "__main__":
    sys.exit(main(tyro.extras.subcommand_cli_from_dict(FAULTS)))
