"""B4: disks that are full, and files that may not grow."""

import ctypes
import os
import resource
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.row import CannotRun, Outcome, Row
from tests.faults.warm import WarmExport, contents, ended, fork, warm_export, whole

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h
MS_PRIVATE_ALL = 0x40000 | 0x4000  # MS_PRIVATE | MS_REC
LEFT_BYTES = 4096
PAGE_BYTES = 4096
REFUSED, SUCCEEDED, WRONG = 10, 0, 20  # exit codes of a fork that tried


def full_disks(count: int) -> Outcome:
    """Export to file systems in memory of 1 to 99 % of the size that is needed."""
    root = Path(tempfile.mkdtemp())
    warm = warm_export(root)
    if ended(fork(lambda: _mounted(root / "mount", 1 << 20))) != 0:
        raise CannotRun("no file system in memory can be mounted: run as root, or allow user namespaces")
    needed = _pages(warm) * PAGE_BYTES

    def attempt(share: int) -> None:
        _mounted(root / "mount", needed * share // 100)
        _attempt(warm, root / "mount" / "out", root / "said")

    return _each(warm, count, attempt, root / "said", f"of {needed:,} bytes")


def short_files(count: int) -> Outcome:
    """Export where a file may have 1 to 99 % of the size of the largest one."""
    root = Path(tempfile.mkdtemp())
    warm = warm_export(root)
    largest = max(len(data) for data in warm.new.values())
    (root / "place").mkdir()

    def attempt(share: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _file_limit(largest * share // 100)
        _attempt(warm, root / "place" / "out", root / "said")

    return _each(warm, count, attempt, root / "said", f"of {largest:,} bytes")


def _each(warm: WarmExport, count: int, attempt: Callable[[int], None], said: Path, figure: str) -> Outcome:
    """Try every share from 1 to 99 %, ``count`` of them spread evenly."""
    failures = []
    shares = sorted({1 + number * 98 // max(1, count - 1) for number in range(count)})
    for share in shares:
        said.write_text("")
        code = ended(fork(partial(attempt, share)))
        if code != REFUSED:
            failures.append(f"{share} %: exit code {code}: {said.read_text()[-400:]}")
    return Outcome(tried=len(shares), survived=len(shares) - len(failures), figure=figure, failures=tuple(failures[:5]))


def _attempt(warm: WarmExport, out: Path, said: Path) -> None:
    """Export and look, and end this process with what came of it."""
    from engram_runtime.errors import RequestError

    text = ""
    try:
        warm.run(out, replace=False)
    except RequestError as error:
        text = str(error)
    _file_limit(None)
    if not text:
        text = whole(out, warm.new)
        said.write_text(text or "it succeeds")
        os._exit(WRONG if text else SUCCEEDED)
    left = sum(len(data) for data in contents(out.parent).values())
    if out.exists() or left > LEFT_BYTES:
        text += f"; {left} bytes are left: {sorted(contents(out.parent))}"
    elif text.startswith(f"no space to write {out}: at least ") and " bytes are needed, " in text:
        os._exit(REFUSED)
    said.write_text(text)
    os._exit(WRONG)


def _file_limit(num_bytes: int | None) -> None:
    """Limit the size of files this process writes; None ends that."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if num_bytes is None else num_bytes, most))


def _pages(warm: WarmExport) -> int:
    """Return the pages of a bundle on a file system in memory, a page each for folders and the journal included."""
    return sum(-(-len(data) // PAGE_BYTES) for data in warm.new.values())


def _mounted(folder: Path, num_bytes: int) -> None:
    """Mount a file system in memory that only this process sees, which ends with it; raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    folder.mkdir(exist_ok=True)
    size = f"size={num_bytes}".encode()
    spaces = CLONE_NEWNS if os.getuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER
    _check(library.unshare(spaces))
    _check(library.mount(b"none", b"/", None, ctypes.c_ulong(MS_PRIVATE_ALL), None))
    _check(library.mount(b"none", bytes(folder), b"tmpfs", ctypes.c_ulong(0), size))


def _check(returned: int) -> None:
    if returned != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


EXPECTED = "refused with the bytes that are needed, nothing at the place, at most 4 KB beside it"
ROWS = (
    Row(
        name="B4",
        fault="an export to a disk of 1 to 99 % of the size that is needed",
        expected=EXPECTED,
        quick=99,
        full=99,
        run=full_disks,
    ),
    Row(
        name="B4 limit",
        fault="an export where files may have 1 to 99 % of the size of the largest one",
        expected=EXPECTED,
        quick=33,
        full=99,
        run=short_files,
    ),
)
