"""This user's own folder for what must not be anybody else's to write: trusted keys, records of libraries."""

import errno
import os
import stat
from pathlib import Path

from engram_runtime.errors import TargetError
from engram_runtime.new_file import new_file
from engram_runtime.user_cache import NAME

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def state_folder() -> Path:
    """Return this project's folder among the user's states, which may not exist yet.

    Raises:
        OSError: this user has no folder for states.
    """
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if given.is_absolute():  # others are to be ignored, says the specification
        return given / NAME
    try:
        return Path.home() / ".local" / "state" / NAME
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "no home folder; set XDG_STATE_HOME") from error


def own_folder(name: str) -> Path:
    """Return a folder of `state_folder`, made where it isn't there; raises what `check_own` does, and OSError."""
    root = state_folder()
    root.parent.mkdir(parents=True, exist_ok=True)
    for folder in (root, root / name):
        folder.mkdir(mode=0o700, exist_ok=True)
        check_own(folder)
    return root / name


def write_own(name: str, file: str, content: bytes) -> None:
    """Keep a file in a folder of `state_folder`, for this user alone to read and write, in place of another one.

    Raises:
        OSError: the folder can't be written.
        TargetError: others can write to it.
    """
    with new_file(own_folder(name) / file, replace=True) as opened:
        os.fchmod(opened.fileno(), 0o600)  # whatever the umask: a user's own group is often let write
        opened.write(content)


def own_file(name: str, file: str) -> Path | None:
    """Return a file in a folder of `state_folder`, or None where there is none; raises what `check_own` does."""
    try:
        root = state_folder()
    except OSError:
        return None  # a user without a home has kept nothing
    path = root / name / file
    if not path.is_file():
        return None
    for each in (root, root / name, path):
        check_own(each)
    return path


def check_own(path: Path) -> None:
    """Refuse a file or folder that somebody else can write.

    Raises:
        TargetError: another user but root owns it, or others may write to it.
    """
    status = path.lstat()
    if status.st_uid not in (os.geteuid(), 0):
        raise TargetError(f"{path} belongs to user {status.st_uid}, expected {os.geteuid()}; set XDG_STATE_HOME")
    if status.st_mode & OTHERS_WRITE:
        raise TargetError(f"{path} can be written by others; run: chmod go-w {path}")
