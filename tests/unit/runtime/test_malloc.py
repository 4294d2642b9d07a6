"""Memory that a CPU process keeps, and where that is wanted."""

import subprocess
import sys

import pytest

from ipadapter_jax.runtime.malloc import is_cpu_only

PROGRAM = """
import resource, sys, threading
import numpy as np
from ipadapter_jax.runtime.malloc import disable_trim
if sys.argv[1] == "keep":
    disable_trim()

def use():
    np.empty(2**28, np.uint8)[:] = 1

def in_a_thread():
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()

in_a_thread()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
in_a_thread()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_the_same_pages_serve_again():
    """256 MB, in a thread that has no memory of its own."""
    assert faults("keep") < 20  # of 65,536, or of 128 huge ones


GIVEN_BACK = """
import resource
import numpy as np
from ipadapter_jax.runtime.malloc import trim, disable_trim
disable_trim()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
before = resident()
np.empty(2**28, np.uint8)[:] = 1
kept = resident() - before
trim()
print(kept, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_trim_returns_free_memory():
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    kept, left = map(float, done.stdout.split())
    # MB of 256. Linux sums its counters of resident pages up now and then only: 1 MB was missing once.
    assert kept > 250 and left < 4


def test_accelerators_are_detected_without_starting_jax(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert is_cpu_only()
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert not is_cpu_only()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert is_cpu_only()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    assert not is_cpu_only()
