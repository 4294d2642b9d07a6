"""A folder or a file by one string: `mini` inside the package, a path on this machine, a repository of the Hugging Face
Hub ("owner/name"), or a place inside one ("owner/name/folder/file.safetensors"). "owner/name@REVISION" pins the
repository to a branch, a tag, a commit or a pull request (refs/pr/1)."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ipadapter_jax.errors import InputError, argument
from ipadapter_jax.inputs.strings import one_line
from ipadapter_jax.inputs.suggestions import close_matches, is_slip
from ipadapter_jax.storage.nearby_paths import names_in, nearby_hint
from ipadapter_jax.storage.paths import expand_home
from ipadapter_jax.weights import bundled

log = logging.getLogger("ipadapter_jax")

SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack")  # of weight files
_TIMEOUT = 20  # seconds

# The name, the revision (the only ones with slashes that the Hub makes are those of pull requests), the place inside.
_NAME = re.compile(r"([^@/]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]*))?(?:/(.*))?")

Choose = Callable[[Sequence[str]], Sequence[str]]


def local_path(reference: str | os.PathLike, choose: Choose, *, what: str, revision: str | None = None) -> Path:
    """The local path of the referenced folder or file; of one on the Hub, the files that `choose` picks are downloaded.

    A local path comes first (`path_here`), and a misspelled local path is never looked up on the Hub, unless it pins a
    revision. `choose` takes the names of all files below the reference, relative to it, and returns those that are
    needed. `revision` is for a reference that pins none. Raises InputError naming the reference, and what exists
    instead, when it is neither local nor on the Hub.
    """
    found = found_place(reference, what)
    if isinstance(found, Path):
        return found
    return _from_hub(found.repository, found.inside, choose, what, found.revision or revision)


def found_place(reference: str | os.PathLike, what: str) -> "Path | HubPlace":
    """The local path, else the place on the Hub that a reference names, which may not exist; no network is used. Raises
    InputError as `local_path` for what can be neither."""
    if not isinstance(reference, str | os.PathLike):
        raise InputError(f"{what} {reference!r}: give a path or a Hub id (owner/name)")
    if here := path_here(reference, what):
        return here
    place = hub_place(str(reference))
    if place.repository and "@" in str(reference).split("/")[1] and not place.revision:
        raise InputError(
            f"{what} {reference}: no revision after the @; give a branch, a tag or a commit, or leave it out"
        )
    if not place.repository or (not place.revision and _is_path(str(reference))):
        raise _missing(str(reference), what, place.repository)
    return place


def check_revision(reference: str | os.PathLike, revision: str | None, what: str) -> None:
    """Raises InputError for a revision without effect: of a local path, or in addition to one in the reference."""
    if revision is None:
        return
    if path_here(reference, what) is not None:
        here = f"{what} {reference} is here and not on the Hub"
        raise InputError(f"{argument('revision', revision)} has no effect: {here}; leave it out")
    pinned = hub_place(str(reference)).revision
    if pinned and pinned != revision:
        raise InputError(
            f"{argument('revision', revision)} has no effect: {what} {reference} names its own; give one of them"
        )


def path_here(reference: str | os.PathLike, what: str) -> Path | None:
    """The referenced folder or file if it is local: inside the package, else a path that exists; or None."""
    inside = bundled.bundled_path(reference, what) if isinstance(reference, str) else None
    path = expand_home(os.fspath(reference))
    return inside or (Path(path) if os.path.exists(path) else None)


def _is_path(reference: str) -> bool:
    """Whether a reference that does not exist was meant as a local path.

    Then it begins with the name of something in a local folder, perhaps misspelled, or has the ending of a weight file
    in place of a repository's name."""
    first, second, *more = PurePosixPath(reference).parts
    if first == bundled.NAME or (not more and reference.endswith(SUFFIXES)):
        return True
    return os.path.exists(os.path.join(first, second)) or any(is_slip(second, name) for name in names_in(first))


def _missing(reference: str, what: str, repo: str) -> InputError:
    """The error for a path that does not exist. `repo` is the repository that it could also name, or empty."""
    about = f"{what} {one_line(reference)}: there is no such file or folder here"
    if not repo:
        about += ", and it is not a Hub id (owner/name)"
        if meant := close_matches(reference, bundled.names(what)):
            return InputError(f"{about}; did you mean {' or '.join(meant)}?")
    if PurePosixPath(reference).parts[:1] == (bundled.NAME,):
        there = nearby_hint(bundled.FOLDER.parent / reference).replace(str(bundled.FOLDER), bundled.NAME)
        return InputError(about + there)
    elsewhere = repo and not repo.endswith(SUFFIXES) and not os.path.exists(repo)
    return InputError(about + nearby_hint(reference) + (f"; the Hub's repository is {repo}@main" if elsewhere else ""))


class HubPlace(NamedTuple):
    """A repository of the Hub, the revision that it is pinned to and the place inside, each "" where there is none."""

    repository: str
    revision: str
    inside: str


def hub_place(reference: str) -> HubPlace:
    """'owner/name@v2/folder/file' -> ('owner/name', 'v2', 'folder/file'); all empty for what can only be a path."""
    parts = PurePosixPath(reference).parts
    if len(parts) < 2 or reference.startswith((".", "/", "~")) or ".." in parts or "\\" in reference:
        return HubPlace("", "", "")
    found = _NAME.fullmatch("/".join(parts[1:]))
    return HubPlace(f"{parts[0]}/{found[1]}", found[2] or "", found[3] or "") if found else HubPlace("", "", "")


def _from_hub(repo: str, inside: str, choose: Choose, what: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_CACHE.startswith("~"):
        raise InputError(
            f"{what} {repo}: not a path on this machine, and it cannot be downloaded, as this user has no home folder "
            "to store it in; name a folder with HF_HOME"
        )
    try:
        # Not list_repo_files, which retries for half a minute without a network.
        found = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT).siblings or []
    except Exception as error:  # the errors of the HTTP client differ between releases of huggingface_hub
        cached = _cached(repo, revision)
        if cached is None or not (cached / inside).exists():
            raise InputError(
                f"{what} {repo}: not a path on this machine, and could not be downloaded from the Hugging Face Hub: "
                f"{_reason(error)}{nearby_hint(repo)}"
            ) from None
        log.warning("%s %s: using the copy downloaded earlier (%s)", what, repo, _reason(error))
        return cached / inside
    names = [file.rfilename for file in found]
    wanted = [inside]
    if inside not in names:
        here = f"{inside}/" if inside else ""
        below = [name.removeprefix(here) for name in names if name.startswith(here)]
        if not below:
            here = nearby_hint(PurePosixPath(repo, inside))
            raise InputError(f"{what} {repo}: the repository has no {inside or 'files'}{here}")
        wanted = [here + name for name in choose(below)]
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise InputError(
            f"{what} {repo}: the download stopped: {_reason(error)}; rerun the same command to resume"
        ) from None
    log.info("%s %s: %s", what, repo, snapshot)  # whose last part is the commit
    return snapshot / inside


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot of an earlier download."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not downloaded, or not the name of a repository
        return None


def _reason(error: Exception) -> str:
    """Why a download failed, in one line."""
    from huggingface_hub import errors

    known = {
        errors.GatedRepoError: "accept its license on its page there, then log in with `hf auth login`",
        errors.RepositoryNotFoundError: "it has no such repository, or a private one: log in with `hf auth login`",
        errors.RevisionNotFoundError: "the repository has no such revision",
    }
    for kind, reason in known.items():
        if isinstance(error, kind):
            return reason
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
