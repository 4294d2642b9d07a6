"""How much address space a piece of code asks for, at most: measured in a process of its own."""

import subprocess
import sys

_MEASURED = """
import re, sys

def peak():
    return int(re.search(r"VmPeak:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

{setup}
before = peak()
{code}
print()
print((peak() - before) // 1024)
"""


def peak_growth(setup: str, code: str, *arguments: object) -> int:
    """MiB by which `code` raises the peak of a fresh process after `setup`; both see `arguments` as sys.argv[1:]."""
    script = _MEASURED.format(setup=setup, code=code)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
