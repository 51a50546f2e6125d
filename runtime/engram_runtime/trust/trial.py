"""The first run of code that wasn't compiled here: in a process of its own, so that it ends none that matters."""

import hashlib
import subprocess
import sys
from pathlib import Path

from engram_runtime.bundle import Bundle
from engram_runtime.cpu import cpu_flags, machine
from engram_runtime.errors import TargetError
from engram_runtime.library import LibraryInfo
from engram_runtime.trust.state import own_file, write_own

FOLDER = "trials"
TRIAL = "engram_runtime.trust.trial_run"
MOST_S = 300.0


def require_trial(bundle: Bundle, folder: Path, info: LibraryInfo) -> None:
    """Run every kind of forward pass of a library's decoder once, unless this kind of processor has.

    Raises:
        OSError: this user's state folder can't be written.
        TargetError: the process was ended by a signal, failed or took too long.
    """
    name = f"{info.digest}-{_processor()}"
    if own_file(FOLDER, name) is not None:
        return
    command = [sys.executable, "-P", "-m", TRIAL, str(bundle.path), info.target, info.digest]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",  # the code may write anything
            check=False,
            timeout=MOST_S,
        )
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"library {folder} had not run after {MOST_S:.0f} s; compile the bundle again") from error
    if done.returncode < 0:
        raise TargetError(
            f"library {folder} was ended by signal {-done.returncode} when it ran in a process of its own; compile the "
            f"bundle for this machine"
        )
    if done.returncode != 0:
        (*_, last) = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise TargetError(f"library {folder} failed when it ran in a process of its own: {last}")
    write_own(FOLDER, name, b"")


def _processor() -> str:
    return hashlib.sha256(" ".join([machine(), *sorted(cpu_flags())]).encode()).hexdigest()[:16]
