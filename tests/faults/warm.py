"""A process in which all that is slow was done once: a fork of it exports in a fifth of a second."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS")  # none to lose in a fork
HANGS_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmExport:
    """An export that can be had quickly.

    Attributes:
        checkpoint: what is exported, as int8.
        new: files of its bundle.
        old: a folder with another bundle, of float weights.
    """

    checkpoint: Path
    new: dict[str, bytes]
    old: Path

    def run(self, out: Path, *, replace: bool) -> None:
        """Export to ``out``; raises what an export does."""
        from tests.workshop import SilentReporter, export_options

        from engram_export.pipeline import export_bundle

        export_bundle(export_options(self.checkpoint, out, quant="int8", replace=replace), SilentReporter())


def warm_export(root: Path) -> WarmExport:
    """Import, trace and export once; the forks have the traced graph, of which nothing is written before it is there.

    To be called before any thread is started.
    """
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"), TOKENIZERS_PARALLELISM="false")
    from tests.tiny import TinyModel, TinySite, add_sites, save_checkpoint
    from tests.workshop import export, files_of

    from engram_export import pipeline

    checkpoint = add_sites(save_checkpoint(root / "checkpoint", TinyModel()), TinySite())
    export(checkpoint, root / "old")
    trace, seen = pipeline.trace_graphs, []

    def noted(*arguments):  # type: ignore[no-untyped-def]
        seen.append(arguments)
        return trace(*arguments)

    pipeline.trace_graphs = noted
    export(checkpoint, root / "new", quant="int8")
    traced = trace(*seen[0])  # saving uses it up, which is the forks' to do
    pipeline.trace_graphs = lambda *arguments: traced
    return WarmExport(checkpoint=checkpoint, new=files_of(root / "new"), old=root / "old")


def fork(work: Callable[[], object]) -> int:
    """Do something in a fork of this process, which ends with 0, or 1 after a traceback; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - whatever it is, this process must not return into its parent's work
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int, limit_s: float = HANGS_S) -> int:
    """Wait for a process; returns its exit code, negative for a signal. One that hangs is killed."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return killed(process)


def killed(process: int) -> int:
    """Kill a process of this one; returns its exit code, which is its own if it had ended by then."""
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def whole(folder: Path, *wanted: dict[str, bytes]) -> str:
    """Say what is wrong with a bundle that must open, verify and be one of those wanted; nothing if it is right."""
    from tests.workshop import files_of

    try:
        Bundle.open(folder).verify_digests()
    except BundleError as error:
        return f"{folder.name} does not verify: {error}"
    return "" if files_of(folder) in wanted else f"{folder.name} verifies and is none of what was exported"
