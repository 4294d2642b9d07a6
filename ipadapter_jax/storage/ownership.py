"""Checks that only this user can have put a file at a path: compiled programs that are cached on disk are run."""

import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MAX_STEPS = 1000  # folders and links of one path
_ENTER = stat.S_IXGRP | stat.S_IXOTH


@dataclass(frozen=True)
class OwnershipProblem:
    """Why another user may have written to a path, and the remedy."""

    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.why}; {self.remedy}"


def ownership_problem(path: Path) -> OwnershipProblem | None:
    """Why another user may have written the file or folder at `path`; None if only this user or the administrator can.
    A path that does not exist yet is judged by its folders.

    All folders above it and all links on the way are checked: if others own them or can write to them, the path may
    lead elsewhere tomorrow. A folder such as /tmp, in which users can change only their own files, may be above it.
    Write access of a group is allowed if only this user is in the group, or if others cannot enter the folder.
    """
    path = path.absolute()
    end, trusted = os.path.realpath(path), {0, os.geteuid(), os.stat("/").st_uid}
    for step in _steps(path):
        try:
            found = os.lstat(step)
        except FileNotFoundError:
            return None
        except OSError as error:
            return OwnershipProblem(f"{step} cannot be read ({error.strerror})", "choose another folder")
        if found.st_uid not in trusted:
            return OwnershipProblem(f"{step} belongs to {_user(found.st_uid)}", "choose a folder of your own")
        if stat.S_ISLNK(found.st_mode):
            continue
        last = os.fspath(step) == end
        if _is_open(step, found) and (last or not found.st_mode & stat.S_ISVTX):
            change = "600" if stat.S_ISREG(found.st_mode) else "700" if last else "go-w"
            why = f"others can write to {step} (mode {stat.S_IMODE(found.st_mode):04o})"
            return OwnershipProblem(why, f"run: chmod {change} {shlex.quote(str(step))}")
    return None


def make_private_folder(folder: Path) -> None:
    """Creates a folder, and the missing ones above it, with access for this user only. Raises OSError."""
    missing = [step for step in (folder, *folder.parents) if not step.exists()]
    for step in reversed(missing):
        step.mkdir(mode=0o700, exist_ok=True)


def _steps(path: Path) -> Iterator[Path]:
    """The root, and every folder, link and file after it that decides where an absolute path leads."""
    here, waiting = Path(path.anchor), list(reversed(path.parts[1:]))
    yield here
    for _ in range(_MAX_STEPS):
        if not waiting:
            return
        part = waiting.pop()
        if part == "..":
            here = here.parent
            continue
        yield here / part
        if os.path.islink(here / part):
            target = Path(os.readlink(here / part))
            waiting.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            here = Path(target.anchor) if target.is_absolute() else here
        else:
            here = here / part


def _is_open(step: Path, found: os.stat_result) -> bool:
    """Whether others can write to a file or folder."""
    if found.st_mode & stat.S_IWOTH:
        return True
    out_of_reach = not os.stat(step.parent).st_mode & _ENTER
    return bool(found.st_mode & stat.S_IWGRP) and not out_of_reach and not _is_own_group(found.st_gid)


def _is_own_group(group: int) -> bool:
    """Whether only this user is in a group, as on systems where each user has a group and the umask is 002."""
    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_gid == group and found.gr_name == user.pw_name and not {*found.gr_mem} - {user.pw_name}


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"
