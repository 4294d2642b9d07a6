"""Checkpoints of a run: written in the background, verified bit by bit when read, with damaged ones set aside.

A step is a folder of orbax with two items: `state`, the leaves of the training state under their paths, and `manifest`,
a JSON object with a digest of every leaf, whatever the caller says about the run, and a digest of its own. Orbax makes
a step appear under its name only when it is whole, but stores no checksums, and casts to the requested
dtype silently; both are checked here.
"""

import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax import Array
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN

from ipadapter_jax.errors import InputError
from ipadapter_jax.runtime.trees import Leaf, PyTree
from ipadapter_jax.train.checksums import dtype_and_shape, named_leaves, parse_dtype_and_shape, tree_checksums
from ipadapter_jax.train.multihost import run_on_all, run_on_first

log = logging.getLogger("ipadapter_jax")

T = TypeVar("T")
State = TypeVar("State")


class DamagedStep(Exception):
    """A step that is not what was saved."""


class Restored(NamedTuple, Generic[State]):
    """A step that was read, and what was recorded about its run."""

    step: int
    state: State
    about: Mapping[str, object]


class SavedLeaves(NamedTuple):
    """A step, and its leaves by path."""

    step: int
    leaves: dict[str, Array]


class Checkpoints:
    """The steps below `folder`. In a job of several processes all of them call every method, on a shared folder."""

    def __init__(self, folder: Path, *, keep_last: int = 1, keep_every: int | None = None, read_only: bool = False):
        """Removes the partial steps of killed runs. Of the saved steps the newest `keep_last` stay, and the multiples
        of `keep_every`. With `read_only` nothing is changed: the run may be in progress.

        Raises InputError when the folder cannot be made or written.
        """
        policies = [LatestN(keep_last)] + ([EveryNSteps(keep_every)] if keep_every else [])
        self._folder = folder.absolute()
        for noisy in ("absl", "asyncio"):  # orbax logs long texts on failures that it also raises
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            save_root_metadata=False,
            lightweight_initialize=True,  # else a damaged step is an exception here
            single_host_load_and_broadcast=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self._folder, item_names=("state", "manifest"), options=options)
        except OSError as error:
            raise InputError(f"{folder}: cannot write there ({error.strerror}); choose another place") from None

    def save(self, step: int, state: PyTree, about: Mapping[str, object]) -> None:
        """Writes a pytree of jax.Arrays and a JSON object in the background. `state` may be donated as soon as this
        returns: its bytes are on the host, or protected from being overwritten. A step that exists is not written
        again.

        Raises InputError when this save or, more often, the one before it failed; the steps before that are intact.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        content = {"step": step, "leaves": tree_checksums(state), "about": about}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(named_leaves(state)),  # pyright: ignore[reportCallIssue]
            manifest=ocp.args.JsonSave({**content, "sha256": _sha256(content)}),  # pyright: ignore[reportCallIssue]
        )
        self._or_explain(lambda: self._manager.save(step, args=items, force=True))

    def restore(self, template: State) -> Restored[State] | None:
        """The newest good step, or None when nothing was ever saved here.

        `template` is the state's tree of jax.ShapeDtypeStruct with shardings, which may differ from those it was saved
        with. A damaged step is skipped, saying why, and moved to damaged-STEP once an older one proved good.

        Raises InputError when no step is good, leaving all as they are, or when a step is intact but another model's.
        """
        found = self._newest_good(lambda step: self._read(step, template))
        if found is None:
            return None
        for bad, reason in found.damaged.items():
            log.warning("%s: step %d is damaged and skipped: %s", self._folder, bad, reason)
        self._set_aside(list(found.damaged))
        return found.content

    def leaves(self, step: int | None = None) -> SavedLeaves | None:
        """A step, by default the newest good one, and its leaves by path, as they were saved, on one device; None when
        nothing was ever saved here. Raises InputError when the step is damaged, or all are."""
        if step is None:
            found = self._newest_good(self._leaves)
            return None if found is None else SavedLeaves(found.step, found.content)
        try:
            return SavedLeaves(step, self._leaves(step))
        except DamagedStep as error:
            raise InputError(f"{self._folder}: step {step} is damaged ({error}); take another") from None

    def about(self) -> Mapping[str, object] | None:
        """What was said about the run at its newest step with a good manifest, without reading arrays; None when
        nothing was ever saved here. Raises InputError when there are steps, all damaged."""
        found = self._newest_good(self._manifest)
        return None if found is None else found.content.about

    def wait(self) -> None:
        """Until everything is written. Raises InputError when the last save failed."""
        self._or_explain(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, and ends the background threads. Raises InputError when the last save failed."""
        self._or_explain(self._manager.close)

    def _or_explain(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:  # orbax and tensorstore raise OSError, ValueError and Exception itself
            raise InputError(
                f"{self._folder}: a checkpoint was not saved ({_reason(error)}); the earlier ones are intact: "
                "make room or repair the place, and run the same command again"
            ) from error

    def _newest_good(self, read: Callable[[int], T]) -> "_NewestGood[T] | None":
        """The newest step that `read` can read, what it returned, and the newer steps with what is wrong with them."""
        self._manager.reload()
        damaged: dict[int, str] = {}
        for step in sorted(map(int, self._manager.all_steps()), reverse=True):
            try:
                return _NewestGood(step, read(step), damaged)
            except DamagedStep as error:
                damaged[step] = str(error)
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"{self._folder}: no checkpoint is good ({reasons}); put back a copy, or choose another folder"
            )
        return None

    def _item(self, step: int, name: str) -> epath.Path:
        return self._manager.directory / str(step) / name

    def _read(self, step: int, template: State) -> Restored[State]:
        manifest = self._manifest(step)
        wanted = named_leaves(template)
        self._check_kinds(step, manifest.kinds(), wanted)
        leaves = self._verified(step, manifest, wanted)
        state = jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in wanted])
        return Restored(step, state, manifest.about)

    def _leaves(self, step: int) -> dict[str, Array]:
        manifest = self._manifest(step)
        wanted = {name: parse_dtype_and_shape(text) for name, text in manifest.kinds().items()}
        return self._verified(step, manifest, wanted)

    def _verified(self, step: int, manifest: "_Manifest", wanted: Mapping[str, Leaf]) -> dict[str, Array]:
        """The leaves of a step, which are what its manifest says. Raises DamagedStep."""
        arguments = ocp.args.StandardRestore(wanted)  # pyright: ignore[reportCallIssue]
        # Orbax's own manager waits for all processes at the end of restore: for ever, when one of them has failed.
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            leaves = _read_on_all(lambda: handler.restore(self._item(step, "state"), args=arguments))
        found = tree_checksums(leaves)
        if wrong := [name for name in wanted if found[name] != manifest.leaves[name]]:
            raise DamagedStep(f"{_some(wrong)} is not what was saved")
        return leaves

    def _manifest(self, step: int) -> "_Manifest":
        def read() -> _Manifest:
            content = dict(ocp.JsonCheckpointHandler().restore(self._item(step, "manifest")))
            if content.pop("sha256") != _sha256(content) or content["step"] != step:
                raise DamagedStep("its manifest is not what was saved")
            return _Manifest(content["leaves"], content["about"])

        return _read_on_all(read)

    def _check_kinds(self, step: int, saved: Mapping[str, str], wanted: Mapping[str, Leaf]) -> None:
        """Raises InputError naming leaves that the state has and the step has not, or as something else, or vice versa:
        nothing is damaged then, it is another run."""
        expected = {name: dtype_and_shape(leaf) for name, leaf in wanted.items()}
        if saved == expected:
            return
        odd = sorted(name for name in {**saved, **expected} if saved.get(name) != expected.get(name))
        first = odd[0]
        raise InputError(
            f"{self._folder}: step {step} was saved by another configuration: {_some(odd)} "
            f"({saved.get(first, 'absent')} there, {expected.get(first, 'absent')} here); "
            "resume with the configuration it was saved by, or choose another folder"
        )

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps, so that steps of these numbers can be saved again."""
        run_on_first(lambda: [self._rename_damaged(step) for step in steps])
        self._manager.reload()

    def _rename_damaged(self, step: int) -> None:
        names = (f"damaged-{step}{'' if again == 1 else f'-{again}'}" for again in itertools.count(1))
        try:
            (self._folder / str(step)).rename(next(self._folder / n for n in names if not (self._folder / n).exists()))
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot rename the damaged step ({error.strerror}); make the folder writable"
            ) from None


@dataclasses.dataclass(frozen=True)
class _Manifest:
    """What was recorded of a step."""

    leaves: Mapping[str, str]  # the checksum of a leaf by its path
    about: Mapping[str, object]

    def kinds(self) -> dict[str, str]:
        """{path of a leaf: its dtype and shape}."""
        return {name: digest.partition(":")[0] for name, digest in self.leaves.items()}


@dataclasses.dataclass(frozen=True)
class _NewestGood(Generic[T]):
    """The newest step that could be read, what came of it, and what is wrong with the newer ones."""

    step: int
    content: T
    damaged: dict[int, str]


def _read_on_all(read: Callable[[], T]) -> T:
    """What `read` returns. Raises DamagedStep in all processes when it failed in one of them."""

    def explained() -> T:
        try:
            return read()
        except DamagedStep as error:
            problem = str(error)
        except Exception as error:  # damage shows as JSONDecodeError, KeyError, ValueError, Exception itself and others
            problem = _reason(error)
        gc.collect()  # while the messages of abandoned reads are silenced
        raise DamagedStep(problem)

    with _silenced_unraisable_errors():
        return run_on_all(explained, DamagedStep)


@contextlib.contextmanager
def _silenced_unraisable_errors() -> Iterator[None]:
    """When one read of orbax fails, it abandons the others, and Python prints a long text for each as it frees them."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _reason(error: BaseException) -> str:
    """What went wrong, in one line of readable length. Messages of tensorstore begin with what was tried, come to the
    point at the end, and append long lists of [name='...']."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.split(r" \[\w+(?:\[\d+\])?='", text)[0]
    return f"{text[:80]} ... {text[-120:]}" if len(text) > 205 else text


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _sha256(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
