"""Batches of the global order: nothing about the loading shows in them."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ipadapter_jax.data import workers as worker_processes
from ipadapter_jax.data.loader import LoadedBatch, SkippedRecord, load_batches
from ipadapter_jax.data.shuffle import record_order
from ipadapter_jax.errors import InputError


def samples_of(records, bad=(), side=40, seen=None):
    """Samples that tell their index; those in `bad` cannot be read. Local, so that worker processes get it by value."""

    class Samples:
        def __len__(self):
            return records

        def key(self, index):
            return f"shard.tar:{index}"

        def __getitem__(self, index):
            if seen is not None:
                seen.append(index)
            if index in bad:
                raise InputError(f"shard.tar:{index} is no image") if index % 2 else OSError("cut\noff")
            rng = np.random.default_rng(index)
            return {"pixels": rng.integers(0, 256, (side, side, 3), np.uint8), "index": np.int32(index)}

    return Samples()


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (
            isinstance(a, LoadedBatch)
            and a.skipped == b.skipped
            and all(isinstance(s, SkippedRecord) for s in a.skipped)
        )
        assert a.arrays.keys() == b.arrays.keys()
        for name, array in a.arrays.items():
            assert array.dtype == b.arrays[name].dtype and type(array) is np.ndarray
            np.testing.assert_array_equal(array, b.arrays[name])


WHOLE = {"seed": 3, "batch_size": 6, "rows": range(6)}


# --- Batches


def test_batches_follow_the_order():
    loaded = list(load_batches(samples_of(10), first=2, count=4, **WHOLE))
    assert [batch.arrays["index"].tolist() for batch in loaded] == [
        [record_order(3, 10, 6 * k + r) for r in range(6)] for k in (2, 3, 4, 5)
    ]
    assert all(not batch.skipped and batch.arrays["pixels"].shape == (6, 40, 40, 3) for batch in loaded)


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_threads_change_nothing(threads):
    samples = samples_of(20, bad=(3, 4, 5, 11, 19))
    expected = list(load_batches(samples, first=1, count=8, threads=0, **WHOLE))
    assert any(batch.skipped for batch in expected)
    assert_same(list(load_batches(samples, first=1, count=8, threads=threads, **WHOLE)), expected)


def test_worker_processes_change_nothing_and_end():
    samples = samples_of(20, bad=(3, 4, 5, 11, 19), side=200)  # large enough for shared memory
    expected = list(load_batches(samples, first=1, count=20, threads=0, **WHOLE))
    before = shared_memory()
    loading = load_batches(samples, first=1, count=20, workers=2, threads=2, **WHOLE)
    assert_same([next(loading) for _ in range(7)], expected[:7])
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:  # as from a terminal, or from SLURM, that end a job; the parent may want to save
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    assert_same([next(loading) for _ in range(5)], expected[7:12])
    loading.close()
    assert not any(child.is_alive() for child in children) and not multiprocessing.active_children()
    wait_for(lambda: shared_memory() <= before)


def test_errors_of_a_worker_are_raised_in_the_parent():
    readable = record_order(3, 200, 0)  # which this process reads to see how large a sample is
    bad = {(readable + i) % 200 for i in range(1, 200)}
    with pytest.raises(InputError, match="^64 records in a row .* shard.tar:"):
        list(load_batches(samples_of(200, bad), first=0, count=2, workers=1, **WHOLE))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[5], [1, 0], [3, 2, 4]]])
def test_processes_together_read_the_global_batch(split):
    samples = samples_of(10, bad=(2,))
    expected = list(load_batches(samples, first=0, count=5, **WHOLE))
    for rows in split:
        parts = list(load_batches(samples, first=0, count=5, **(WHOLE | {"rows": rows})))
        for part, whole in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(part.arrays["pixels"], whole.arrays["pixels"][rows])


def test_a_later_start_changes_nothing():
    samples = samples_of(10, bad=(2, 3))
    whole = list(load_batches(samples, first=0, count=9, **WHOLE))
    assert_same(list(load_batches(samples, first=7, count=2, **WHOLE)), whole[7:])
    assert list(load_batches(samples, first=7, count=0, **WHOLE)) == []


# --- Records that cannot be read


def test_the_next_record_stands_in():
    bad = {3, 4, 9}
    (batch,) = load_batches(samples_of(10, bad), seed=0, batch_size=10, rows=range(10), first=0, count=1)
    order = [record_order(0, 10, g) for g in range(10)]
    stand_in = {3: 5, 4: 5, 9: 0}
    assert batch.arrays["index"].tolist() == [stand_in.get(i, i) for i in order]
    assert sorted(set(batch.skipped)) == [
        (3, "shard.tar:3", "shard.tar:3 is no image"),
        (4, "shard.tar:4", "OSError: cut off"),
        (9, "shard.tar:9", "shard.tar:9 is no image"),
    ]
    assert len(batch.skipped) == 4  # 4 once for itself and once after 3


def test_too_many_consecutive_unreadable_records_are_an_error():
    def first_batch(records, bad):
        return next(load_batches(samples_of(records, bad), seed=0, batch_size=1, rows=[0], first=0, count=1))

    start = record_order(0, 100, 0)
    run = [(start + i) % 100 for i in range(64)]
    assert first_batch(100, set(run[:63])).arrays["index"] == [run[63]]
    words = f"64 records in a row cannot be read, check the data set; the first is shard.tar:{start}: "
    with pytest.raises(InputError, match=re.escape(words)) as error:
        first_batch(100, set(run))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="^3 records in a row"):
        first_batch(3, {0, 1, 2})


def test_an_interrupt_is_not_an_unreadable_record():
    class Interrupted:
        def __len__(self):
            return 3

        def key(self, index):
            return str(index)

        def __getitem__(self, index):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(load_batches(Interrupted(), seed=0, batch_size=1, rows=[0], first=0, count=1, threads=0))


def test_invalid_arguments():
    for samples, change, words in [
        (samples_of(0), {}, "no records"),
        (samples_of(3), {"seed": -1}, "seed -1"),
        (samples_of(3), {"rows": [6]}, "rows [6] of 6"),
        (samples_of(3), {"rows": []}, "rows []"),
    ]:
        with pytest.raises(InputError, match=re.escape(words)):
            load_batches(samples, first=0, count=1, **(WHOLE | change))


# --- Loading


def test_only_two_batches_are_loaded_ahead():
    seen = []
    for done, _ in enumerate(load_batches(samples_of(50, seen=seen), first=0, count=30, threads=16, **WHOLE)):
        assert len(seen) <= 6 * (done + 1 + 2)
    assert len(seen) == 6 * 30


def test_closing_stops_loading():
    seen = []
    loading = load_batches(samples_of(50, seen=seen), first=0, count=1000, **WHOLE)
    next(loading)
    loading.close()
    assert len(seen) <= 18 and list(loading) == []


def test_little_shared_memory_is_not_used(monkeypatch, tmp_path):
    assert worker_processes.shared_memory_threshold(1 << 10) == 1 << 16
    assert worker_processes.shared_memory_threshold(1 << 60) == sys.maxsize
    free = shutil.disk_usage("/").free  # whatever a container has
    monkeypatch.setattr(worker_processes, "_SHARED_MEMORY", str(tmp_path / "absent"))
    assert worker_processes.shared_memory_threshold(free) == 1 << 16


SCRIPT = """
import multiprocessing
import sys
import numpy as np
from ipadapter_jax.data.loader import load_batches

class Samples:
    def __len__(self): return 10
    def key(self, index): return str(index)
    def __getitem__(self, index): return {"a": np.zeros((300, 300), np.uint8)}

if __name__ == "__main__":
    loading = load_batches(Samples(), seed=0, batch_size=2, rows=[0, 1], first=0, count=10**6, workers=2, threads=2)
    for number, _ in enumerate(loading):
        if number == 5:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            if "end" in sys.argv:
                break
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes as Linux shows them")
@pytest.mark.parametrize("how", ["killed", "end"])
def test_workers_end_with_their_parent(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    before = shared_memory()
    process = subprocess.Popen([sys.executable, script, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = process.stdout.readline().split()
    assert len(children) == 2 and all(os.path.exists(f"/proc/{child}") for child in children)
    if how == "killed":
        process.kill()
        process.communicate(timeout=60)
    else:  # the generator is left open
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and "Traceback" not in errors
    wait_for(lambda: not any(os.path.exists(f"/proc/{child}") for child in children))
    wait_for(lambda: shared_memory() <= before)


def shared_memory():
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")} if os.path.isdir("/dev/shm") else set()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
