"""Folders that are written whole or not at all, and never in place of another one unasked."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engram_runtime.errors import RequestError


def check_new_folder(out: Path, mark: str, kind: str, *, replace: bool) -> None:
    """Refuse a place before what goes there is made.

    Args:
        mark: file that is in every folder of this kind: others are never replaced.
        kind: what such a folder is called.

    Raises:
        RequestError: ``out`` exists and is not such a folder, or is one and ``replace`` is False.
    """
    if not out.exists():
        return
    if not (out / mark).is_file():
        raise RequestError(f"{out} exists and is not {kind}; choose another place")
    if not replace:
        raise RequestError(f"{out} is {kind} already; replace it with --force or choose another place")


@contextlib.contextmanager
def new_folder(out: Path, mark: str, kind: str, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that is moved there on success; raises what `check_new_folder` does."""
    out.parent.mkdir(parents=True, exist_ok=True)
    restore_replaced(out)
    check_new_folder(out, mark, kind, replace=replace)
    scratch = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        flush_tree(scratch)
        move_into_place(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def restore_replaced(out: Path) -> None:
    """Put back a folder that was moved aside by who was killed then, or remove it if the new one is there."""
    for folder in out.parent.glob(f".{out.name}.replaced-*"):
        if out.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.rename(out)


def flush_tree(folder: Path) -> None:
    """Wait until a folder and all that is in it are on disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move_into_place(scratch: Path, out: Path) -> None:
    """Rename a folder, in place of another one if there is one, which comes back where that fails."""
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        scratch.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
