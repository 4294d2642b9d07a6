"""Nothing has its final name before it is whole; what killed processes leave is removed by the next run, and what a
live one is writing is not."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ADAPTERS, TORCH_MODEL
from weight_files import refused

from ipadapter_jax.runtime.preemption import GracefulShutdown
from ipadapter_jax.storage.atomic_files import (
    _is_local,
    atomic_replace,
    check_writable,
    remove_partial_files,
    write_atomically,
)
from ipadapter_jax.storage.cleanup import cleanup_on_signal
from ipadapter_jax.storage.store import LocalStore
from ipadapter_jax.train.run_dir import run_lock
from ipadapter_jax.weights.convert import convert

WRITER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # or under a program that blocks it
from pathlib import Path
from ipadapter_jax.storage.atomic_files import atomic_replace
with atomic_replace(Path(sys.argv[1]), folder=len(sys.argv) > 2) as place:
    (place / "inner" if place.is_dir() else place).write_bytes(b"some of it")
    print("begun", flush=True)
    time.sleep(60)
"""
CONVERTER = """
import sys, time
from pathlib import Path
import ipadapter_jax.weights.verified_write as written
def slowly(path, real=written.open_tensors):  # a large file that is being proved
    print("begun", flush=True)
    time.sleep(60)
    return real(path)
written.open_tensors = slowly
from ipadapter_jax.cli import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""

# At one call of signal.signal after another: while handlers are installed, and while they are restored.
BETWEEN = """
import os, signal, sys
from pathlib import Path
from ipadapter_jax.storage.atomic_files import write_atomically
calls, real, number = [], signal.signal, int(sys.argv[3])
def change(*arguments):
    calls.append(arguments)
    before = real(*arguments)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), number)
    return before
signal.signal = change
write_atomically(Path(sys.argv[1]), b"whole")
"""
AT_ANY_TIME = """
import os, random, signal, sys, time
from pathlib import Path
from ipadapter_jax.storage.atomic_files import write_atomically
chance = random.Random(0)
read, write = os.pipe()
for _ in range(200):
    child = os.fork()
    if not child:
        os.write(write, b"x")
        while True:
            write_atomically(Path(sys.argv[1]), b"whole")
    os.read(read, 1)
    time.sleep(chance.random() * 0.002)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def begun(program: str, *arguments: object) -> subprocess.Popen:
    """A process in the middle of its writing."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("folder", [[], ["folder"]], ids=["file", "folder"])
def test_partial_files_of_killed_processes_are_removed_others_stay(tmp_path, folder):
    dead, alive = (begun(WRITER, tmp_path / name, *folder) for name in ("dead", "alive"))
    dead.kill()
    dead.wait()
    assert len(names(tmp_path)) == 2
    remove_partial_files(tmp_path)
    [left] = names(tmp_path)
    assert left.startswith(".part-alive-")
    write_atomically(tmp_path / "alive", b"another's")  # nor does one of the same name disturb it
    remove_partial_files(tmp_path, mine=lambda name: True)
    assert left in names(tmp_path)
    alive.kill()
    alive.wait()
    remove_partial_files(tmp_path)
    assert names(tmp_path) == ["alive"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("folder", [[], ["folder"]], ids=["file", "folder"])
def test_a_signal_cleans_up_on_the_way_out(tmp_path, number, folder):
    process = begun(WRITER, tmp_path / "out", *folder)
    process.send_signal(number)
    assert process.wait() == -number  # as if nothing had been in its way
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_signal_between_handlers(tmp_path, number, call):
    command = [sys.executable, "-c", BETWEEN, str(tmp_path / "out"), str(call), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-number, "")
    assert names(tmp_path) == ([] if call < 3 else ["out"])


def test_a_signal_at_any_time(tmp_path):
    """Also on the way into and out of the block."""
    command = [sys.executable, "-c", AT_ANY_TIME, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == "" and done.stdout.split() == [str(-signal.SIGTERM)] * 200
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("block", [lambda: cleanup_on_signal(lambda: None, lambda _: None), GracefulShutdown])
def test_a_handler_is_given_back_while_its_signal_waits(monkeypatch, block):
    """CPython drops a signal that comes inside of `signal.signal`."""
    real, waiting = signal.signal, []

    def change(number, handler):
        waiting.append(number in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return real(number, handler)

    monkeypatch.setattr(signal, "signal", change)
    with block():
        assert not any(waiting)
        waiting.clear()
    assert len(waiting) == 2 and all(waiting)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}


def test_ignored_signals_stay_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with atomic_replace(tmp_path / "a") as temporary:
            os.kill(os.getpid(), signal.SIGHUP)
            temporary.write_bytes(b"whole")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "a").read_bytes() == b"whole"


@pytest.mark.parametrize(("out", "number"), [("a.safetensors", signal.SIGTERM), ("model", signal.SIGHUP)])
def test_a_conversion_that_is_killed(tmp_path, out, number):
    place = ADAPTERS / "ip-adapter_tiny.bin" if out.startswith("a.") else TORCH_MODEL
    process = begun(CONVERTER, place, tmp_path / out)
    process.send_signal(number)
    assert process.wait() == -number and names(tmp_path) == []
    process = begun(CONVERTER, place, tmp_path / out)
    process.kill()
    process.wait()
    [left] = names(tmp_path)
    assert left.startswith(f".part-{out}-")
    convert(ADAPTERS / "ip-adapter_tiny.bin", tmp_path / "b.safetensors")  # also one to another name
    assert names(tmp_path) == ["b.safetensors"]


@pytest.fixture(scope="module")
def ended() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def on_a_network(monkeypatch, is_network: bool = True) -> None:
    monkeypatch.setattr("ipadapter_jax.storage.atomic_files._is_local", lambda folder: not is_network)


@pytest.mark.parametrize("left", [".part-a.png-abc_1234", ".part-a.png-01234567-abc_1234", ".unproven-{}-a"])
def test_partial_files_of_another_machine_stay_for_a_day(tmp_path, monkeypatch, ended, left):
    """Or an earlier version, which held no lock."""
    on_a_network(monkeypatch)
    left = left.format(ended)
    (tmp_path / left).write_bytes(b"")
    remove_partial_files(tmp_path, mine=lambda name: name == "b.png")
    assert names(tmp_path) == [left]
    long_ago = time.time() - 25 * 3600
    os.utime(tmp_path / left, (long_ago, long_ago))
    remove_partial_files(tmp_path)
    assert names(tmp_path) == []


def test_partial_files_from_before_the_last_boot_are_removed(tmp_path, monkeypatch, ended):
    """On a disk of its own a lock that is free is enough, and earlier versions named their processes."""
    on_a_network(monkeypatch, False)
    held = ".part-a.png-01234567-locked_1"
    others = [f".unproven-{os.getpid()}-a", ".part-a.png-abc_1234"]
    for left in (held, *others, ".part-b-01234567-abc_1234", f".unproven-{ended}-b", ".unproven-99999999999999-b"):
        (tmp_path / left).write_bytes(b"")
    with (tmp_path / held).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_partial_files(tmp_path)
        assert names(tmp_path) == sorted([held, *others])


@pytest.mark.parametrize("is_network", [True, False])
def test_partial_files_of_earlier_versions_are_removed_by_the_next_write(tmp_path, monkeypatch, ended, is_network):
    on_a_network(monkeypatch, is_network)
    for name in ("a.safetensors", "b" * 168 + ".safetensors"):
        stay = [f".unproven-{os.getpid()}-{name}", f".part-.unproven-{os.getpid()}-{name}-abcdefgh"]
        stay += [f".unproven-{ended}-x{name}", f".part-x{name}-abcdefgh"]
        for left in (*stay, f".unproven-{ended}-{name}", f".part-{name}-abcdefgh"):
            (tmp_path / left).write_bytes(b"some")
        (tmp_path / f".part-.unproven-{ended}-{name}-abcdefgh").write_bytes(b"some")  # while it was written
        check_writable(tmp_path / name)
        assert names(tmp_path) == sorted(stay)
        for left in stay:
            (tmp_path / left).unlink()


@pytest.mark.parametrize(
    ("mounts", "folder", "is_local"),
    [
        ("/dev/sda / ext4 rw 0 0\nnas:/a /home nfs4 rw 0 0\n", "/srv/a", True),
        ("/dev/sda / ext4 rw 0 0\nnas:/a /home nfs4 rw 0 0\n", "/home/me", False),
        ("/dev/sda / ext4 rw 0 0\nnas:/a /home nfs4 rw 0 0\n", "/homestead", True),
        ("nas:/ / nfs rw 0 0\n/dev/sda /my\\040disk xfs rw 0 0\n", "/my disk/a", True),
        ("/dev/sda /data xfs rw 0 0\nsshfs /data fuse.sshfs rw 0 0\n", "/data", False),
        ("", "/data", False),
    ],
)
def test_whose_disk_a_folder_lies_on(monkeypatch, mounts, folder, is_local):
    monkeypatch.setattr(Path, "read_text", lambda *_: mounts)
    assert _is_local(Path(folder)) == is_local


def test_partial_files_that_only_the_caller_writes_are_removed(tmp_path):
    for left in (".part-a.png-abc_1234", ".part-a.png-01234567-abc_1234"):
        (tmp_path / left).write_bytes(b"")
    remove_partial_files(tmp_path, mine=lambda name: name == "a.png")
    assert names(tmp_path) == []


def test_a_persons_hidden_files_stay(tmp_path):
    """An earlier version called its temporary files so; in a folder that a person names they may be anybody's."""
    theirs = [".part-20240101", ".part-notes-20240101", ".unproven-1-theorem.txt", ".part-a-abc_1234"]
    older = [".part-b.safetensors-abc_1234", ".unproven-12-b.safetensors"]
    newer = ".part-c.png-01234567-abc_1234"
    long_ago = time.time() - 25 * 3600
    for name in (*theirs, *older, newer):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (long_ago, long_ago))
    check_writable(tmp_path / "a.png")
    assert names(tmp_path) == sorted([*theirs, *older])
    convert(ADAPTERS / "ip-adapter_tiny.bin", tmp_path / "b.safetensors")
    assert names(tmp_path) == sorted([*theirs, "b.safetensors"])
    convert(TORCH_MODEL / "vae", tmp_path / "notes")  # which is to be a folder of the name
    assert names(tmp_path) == sorted({*theirs, "b.safetensors", "notes"} - {".part-notes-20240101"})


def test_other_files_stay(tmp_path):
    others = [".part-", ".partial-a-abc_1234", ".part-a-ABCD1234", "part-a-abc_1234", ".unproven-a"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".part-a-abc_1234").symlink_to(tmp_path / "part-a-abc_1234")
    remove_partial_files(tmp_path, mine=lambda name: True)
    assert names(tmp_path) == sorted([*others, ".part-a-abc_1234"])
    remove_partial_files(tmp_path / "nowhere")


def test_a_check_before_writing_cleans(tmp_path):
    process = begun(WRITER, tmp_path / "a.png")
    process.kill()
    process.wait()
    check_writable(tmp_path / "b.png")
    assert names(tmp_path) == []


def test_a_failure_leaves_the_older_file(tmp_path):
    write_atomically(tmp_path / "a", b"older")

    def chunks():
        yield b"newer"
        raise OSError(28, "No space left on device")

    refused(
        lambda: write_atomically(tmp_path / "a", chunks()), str(tmp_path / "a"), "No space left", "choose another place"
    )
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"older"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(lambda: make_folder(tmp_path / "full"), str(tmp_path / "full"), "not written")
    assert names(tmp_path) == ["a", "full"]


def test_an_error_about_a_missing_source_does_not_name_the_target(tmp_path):
    def copied(folder: bool) -> None:
        with atomic_replace(tmp_path / "y", folder=folder) as place:
            shutil.copyfile(str(tmp_path / "x"), place / "x" if folder else place)

    for folder in (False, True):
        with pytest.raises(FileNotFoundError) as caught:
            copied(folder)
        assert caught.value.filename == str(tmp_path / "x")
    with pytest.raises(PermissionError), atomic_replace(tmp_path / "y"):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere/z")
    with pytest.raises(TimeoutError), atomic_replace(tmp_path / "y"):
        raise TimeoutError("of a network")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS])
def test_write_errors_name_the_target(tmp_path, number):
    def failing(*files: str) -> None:
        with atomic_replace(tmp_path / "y", folder=True) as place:
            raise OSError(number, os.strerror(number), *(place / name for name in files))

    for files in ((), ("a",)):
        refused(lambda files=files: failing(*files), f"{tmp_path / 'y'}: not written ({os.strerror(number)})")
    refused(lambda: unnamed(tmp_path / "y"), f"{tmp_path / 'y'}: not written (No such file or directory)")
    assert names(tmp_path) == []


def unnamed(path: Path) -> None:
    """A copy into a folder that is not there."""
    with atomic_replace(path, folder=True) as place, open(place / "nowhere" / "a", "wb"):
        pass


def make_folder(path: Path) -> None:
    with atomic_replace(path, folder=True) as folder:
        (folder / "inner").touch()


def test_modes_are_those_of_the_umask(tmp_path):
    write_atomically(tmp_path / "file", b"")
    make_folder(tmp_path / "folder")
    (tmp_path / "usual").touch()
    (tmp_path / "usual folder").mkdir()
    for ours, usual in (("file", "usual"), ("folder", "usual folder")):
        assert (tmp_path / ours).stat().st_mode == (tmp_path / usual).stat().st_mode


SHARDS = """
import sys, time
from pathlib import Path
import numpy as np
from ipadapter_jax.data.feature_shards import CachePlan, SampleLayout, ShardWriter
from ipadapter_jax.storage.store import LocalStore
layout = SampleLayout({"features": (np.dtype(np.float32), (1024,))})
with ShardWriter(LocalStore(Path(sys.argv[1])), CachePlan(9, 9, layout, {}), 0) as writer:
    for _ in range(2000):  # enough for the writer to have begun its file
        writer.add({"features": np.ones(1024, np.float32)})
    print("begun", flush=True)
    time.sleep(60)
"""


def test_a_shard_that_is_being_written(tmp_path):
    """Its writer opens the file by name, once more than who holds the lock."""
    process = begun(SHARDS, tmp_path)
    remove_partial_files(tmp_path, mine=lambda name: True)
    [left] = names(tmp_path)
    assert left.startswith(".part-shard-00000-of-00001.array_record-")
    process.kill()
    process.wait()
    with run_lock(LocalStore(tmp_path)):  # the next run there, of encode or train
        assert names(tmp_path) == ["lock"]
    process = begun(SHARDS, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM and names(tmp_path) == ["lock"]
