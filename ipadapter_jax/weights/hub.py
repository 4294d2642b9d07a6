"""A folder or a file by one string: a path on this machine, or a Hugging Face repository ("owner/name", or a place inside
it, "owner/name/folder/file.safetensors")."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from ipadapter_jax.errors import InputError

Choose = Callable[[Sequence[str]], Sequence[str]]


def local_path(reference: str | os.PathLike, choose: Choose, *, what: str, revision: str | None = None) -> Path:
    """Where the referenced folder or file lies on this machine, downloading what `choose` picks when it is on the Hub.

    A path that exists wins. `choose` gets the names of all files below the reference, relative to it, and returns those
    that are needed. Raises InputError naming the reference when it is neither here nor on the Hub.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    parts = PurePosixPath(str(reference)).parts
    if len(parts) < 2 or path.is_absolute() or parts[0] in (".", "..", "~") or "\\" in str(reference):
        raise InputError(f"{what} {reference}: there is no such file or folder here, and it is no Hub id (owner/name)")
    return _from_hub("/".join(parts[:2]), "/".join(parts[2:]), choose, what, revision)


def _from_hub(repo: str, inside: str, choose: Choose, what: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    here = f"{inside}/" if inside else ""
    try:
        names = HfApi().list_repo_files(repo, revision=revision)
        if inside in names:
            patterns = [inside]
        else:
            below = [name[len(here) :] for name in names if name.startswith(here)]
            if not below:
                raise InputError(f"{what} {repo}: the repository has no {inside}")
            patterns = [here + name for name in choose(below)]
        root = snapshot_download(repo, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        cached = _cached(repo, revision)
        if cached is None or not (cached / inside).exists():
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"{what} {repo}: neither a path on this machine nor reachable on the Hugging Face Hub ({reason})"
            ) from None
        root = cached
    return Path(root) / inside


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot of an earlier download, when there is no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
