"""Memory that a CPU process keeps: the same buffers again and again, and no page of them from the kernel twice."""

import os
import subprocess
import sys

import pytest

from ipadapter_jax.heap import on_cpu_alone

PROGRAM = """
import resource, sys
from ipadapter_jax.heap import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
import jax, jax.numpy as jnp
x = jnp.ones((4096, 4096))
step = jax.jit(lambda x: jnp.sin(x @ x) @ x)
for _ in range(3):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", PROGRAM, mode]
    one_device = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return int(subprocess.run(command, env=one_device, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_pages_are_asked_for_once():
    """Each call needs 64 MB for its result and as much on the way: 16,384 pages each."""
    assert faults("keep") < 0.2 * faults("give back")


def test_accelerators_are_told_without_looking(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert on_cpu_alone()
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert not on_cpu_alone()
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert on_cpu_alone()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    assert not on_cpu_alone()
