"""Write a folder beside its place and rename it there when it is whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from engram_runtime.bundle import MANIFEST_NAME
from engram_runtime.errors import RequestError


@contextlib.contextmanager
def staged_folder(out: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` on success and vanishes on any failure.

    Raises:
        RequestError: ``out`` exists and is not a bundle, or is one and ``replace`` is False.
    """
    _restore_replaced(out)
    _check_place(out, replace=replace)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    scratch = out.with_name(f".{out.name}.partial-{os.getpid()}")
    scratch.mkdir()
    try:
        yield scratch
        _flush_tree(scratch)
        _move_into_place(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_place(out: Path, *, replace: bool) -> None:
    if not out.exists():
        return
    if not (out / MANIFEST_NAME).is_file():
        raise RequestError(f"{out} exists and is not a bundle; choose another place")
    if not replace:
        raise RequestError(f"{out} is a bundle already; replace it with --force or choose another place")


def _remove_abandoned(out: Path) -> None:
    """Remove what exporters that are no longer running left behind."""
    for folder in out.parent.glob(f".{out.name}.partial-*"):
        pid = folder.name.rpartition("-")[2]
        # Our own number on a folder we have not made yet is that of an exporter in another life of the container.
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def _restore_replaced(out: Path) -> None:
    """Put back a bundle that an exporter had moved aside when it was killed, or remove it if the new one is there."""
    for folder in out.parent.glob(f".{out.name}.replaced-*"):
        if out.exists():
            shutil.rmtree(folder, ignore_errors=True)
        else:
            folder.rename(out)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move_into_place(scratch: Path, out: Path) -> None:
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
