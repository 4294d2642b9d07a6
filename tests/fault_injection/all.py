"""Provokes a fault and compares the outcome with the figure that docs/reliability.md promises.

    python -m tests.fault_injection.all kill                       50 kills of one process, about 25 minutes on a core
    python -m tests.fault_injection.all kill --times 10 --processes 2
    python -m tests.fault_injection.all --help                     the other faults; FAULT --help their numbers

If a figure does not hold, it reports what was found instead and ends with exit code 1.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro

from tests.fault_injection.batch_jobs import Jobs
from tests.fault_injection.damage import Damage
from tests.fault_injection.disk import Disk
from tests.fault_injection.endurance import Endurance
from tests.fault_injection.images import Images
from tests.fault_injection.kill import Kill
from tests.fault_injection.layouts import Layouts
from tests.fault_injection.numerics import Numbers
from tests.fault_injection.preemption import Stop
from tests.fault_injection.refusals import Refuse
from tests.fault_injection.runs import Broken
from tests.fault_injection.standalone import Alone

FAULTS = {
    "kill": Kill,
    "stop": Stop,
    "layouts": Layouts,
    "damage": Damage,
    "disk": Disk,
    "images": Images,
    "numbers": Numbers,
    "refuse": Refuse,
    "jobs": Jobs,
    "alone": Alone,
    "endurance": Endurance,
}


def main(fault: Callable[[Path], str]) -> int:
    """Provokes it in a folder of its own, prints a line with the numbers, and returns the exit code."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fault-injection-") as folder:
        try:
            line, code = f"survived: {fault(Path(folder))}", 0
        except Broken as found:
            line, code = f"NOT survived: {found}", 1
    print(f"{line} ({time.monotonic() - began:.0f} s)")
    return code


if __name__ == "__main__":
    sys.exit(main(tyro.extras.subcommand_cli_from_dict(FAULTS)))
