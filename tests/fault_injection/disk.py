"""No room, a quota, and a folder that may not be written, at saves, exports and encoding."""

import contextlib
import dataclasses
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ipadapter_jax.train.config import Train
from ipadapter_jax.train.export import ADAPTER
from ipadapter_jax.train.precompute import PrecomputeConfig, precompute
from ipadapter_jax.train.run_dir import CHECKPOINTS
from ipadapter_jax.weights.ip_adapter_file import open_ip_adapter
from tests.fault_injection.runs import changed, contents, hold, logged, outcome, prepare, quiet, refusal, run_here

_EVERY, _STEPS = 2, 12
_PARTIAL = ("tmp", ".part-")


@dataclasses.dataclass(frozen=True)
class Disk:
    """A quota on the size of a file; with root also a small disk that is full, and one that has become read-only. While
    a run saves and exports, and while data are encoded: one clear line within a save interval, what was whole before is
    untouched, nothing partial has a final name, and with room again the same command ends as an undisturbed one."""

    disks: bool = True
    """Also the small disks."""

    def __call__(self, work: Path) -> str:
        config, tried = prepare(work, _STEPS, _EVERY), []
        undisturbed = changed(config, out=str(work / "undisturbed"))
        run_here(undisturbed)
        faults: dict[str, Callable[[Path], contextlib.AbstractContextManager[None]]] = {"quota": _quota}
        with contextlib.ExitStack() as stack:
            if self.disks and _is_mounted(stack, work / "disk"):
                faults |= {"full disk": _full, "read-only disk": _read_only}
            for name, fault in faults.items():
                place = work if fault is _quota else work / "disk"
                own = changed(config, out=str(place / name.replace(" ", "-")))
                late = self._run(own, undisturbed, fault)
                tried.append(f"{name} (said {late} steps after the save that failed)")
            self._encode(config, work / "cache", work)
        return f"{', '.join(tried)}; a quota while encoding: what was there is intact, and all ended as undisturbed"

    def _run(self, config: Train, undisturbed: Train, fault: Callable) -> int:
        """Steps between the save that failed and the end of the run."""
        out, half = Path(config.out), _STEPS // 2
        run_here(changed(config, steps=half))
        before = contents(out / CHECKPOINTS / f"{half}")
        with fault(out / CHECKPOINTS):
            said = refusal(lambda: run_here(config))
            hold("not saved" in said or "not written" in said or "cannot write" in said, said)
            hold(contents(out / CHECKPOINTS / f"{half}") == before, "the checkpoint of before has changed")
            hold(_is_whole(out / ADAPTER), "the adapter is damaged")  # it is of that step, or of a later one
        late = max(logged(out)) - half
        hold(late <= 2 * _EVERY, f"the save of step {half + _EVERY} failed and the run went on to {half + late}")
        # The adapter alone: all steps are done, and the run has only to export.
        run_here(config)
        hold(logged(out) == logged(Path(undisturbed.out)), "other losses than those of the undisturbed run")
        hold(outcome(out) == outcome(Path(undisturbed.out)), "other weights than those of the undisturbed run")
        with fault(out / ADAPTER):
            said = refusal(lambda: run_here(config))
        hold(str(out) in said and ("not written" in said or "cannot write" in said), said)
        hold(outcome(out) == outcome(Path(undisturbed.out)), "an export that failed left another adapter")
        left = [name for name in contents(out) if any(part in name for part in _PARTIAL)]
        hold(not left, f"parts of files: {left}")
        return max(late - _EVERY, 0)

    def _encode(self, config: Train, out: Path, work: Path) -> None:
        def run(where: Path) -> None:
            model, data = config.model, config.data
            settings = PrecomputeConfig(model.base, model.image_encoder, data.path, where, resolution=data.resolution)
            with quiet():
                precompute(dataclasses.replace(settings, dtype="float32", shard_records=8))

        run(out)
        whole = contents(out)
        shards = sorted(name for name in whole if name.endswith(".array_record"))
        (out / shards[1]).unlink()
        (out / "manifest.json").unlink()
        before = contents(out)
        with _quota(out):
            said = refusal(lambda: run(out))
            hold(shards[1] in said, said)
        hold(contents(out) == before, "an encoding without room changed what was there")
        run(out)
        hold(contents(out) == whole, "an encoding that went on differs from one that was never stopped")


def _is_whole(adapter: Path) -> bool:
    return all(np.isfinite(tensor.read()).all() for tensor in open_ip_adapter(adapter).tensors.values())


@contextlib.contextmanager
def _quota(place: Path) -> Iterator[None]:
    """No file may become half as large as this one, or as the largest in this folder."""
    largest = max(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def _full(place: Path) -> Iterator[None]:
    """A file of others takes all room but some pages, less than an adapter or a checkpoint needs."""
    filler, left = place.parent / "filler", 16 * 1024
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    filler.write_bytes(bytes(free - left))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def _read_only(place: Path) -> Iterator[None]:
    disk = next(parent for parent in place.parents if parent.is_mount())
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def _is_mounted(stack: contextlib.ExitStack, disk: Path) -> bool:
    """Whether this process may have a disk of a few megabytes at this place; it is taken away with the stack."""
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True)
    except FileNotFoundError:
        return False
    if done.returncode == 0:
        stack.callback(subprocess.run, ["umount", str(disk)], check=True)
    return done.returncode == 0
