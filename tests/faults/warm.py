"""A process in which all that is slow was done once: a fork of it exports in a fifth of a second."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError

if TYPE_CHECKING:
    from engram_export.formats import WeightFormat
    from engram_export.onnx_graph import TracedGraph
    from engram_export.source import ModelSource

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
    import torch
    from tests.tiny import TinyModel, TinySite, add_sites, save_checkpoint
    from tests.workshop import export

    from engram_export import pipeline
    from engram_export.graph_writer import trace_graphs

    torch.set_num_threads(1)
    checkpoint = add_sites(save_checkpoint(root / "checkpoint", TinyModel()), TinySite())
    export(checkpoint, root / "old")
    trace = trace_graphs
    seen: list[tuple[ModelSource, WeightFormat]] = []

    def noted(source: "ModelSource", weights: "WeightFormat") -> "dict[str, TracedGraph]":
        seen.append((source, weights))
        return trace(source, weights)

    with mock.patch.object(pipeline, "trace_graphs", noted):
        export(checkpoint, root / "new", quant="int8")
    traced = trace(*seen[0])  # saving uses it up, which is the forks' to do
    mock.patch.object(pipeline, "trace_graphs", mock.Mock(return_value=traced)).start()
    return WarmExport(checkpoint=checkpoint, new=contents(root / "new"), old=root / "old")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    """Wait for a process; returns its exit code, negative for a signal. One that hangs tells where, and is killed."""
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
    try:
        Bundle.open(folder).verify_digests()
    except BundleError as error:
        return f"{folder.name} does not verify: {error}"
    return "" if contents(folder) in wanted else f"{folder.name} verifies and is none of what was exported"


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmCompile:
    """A compilation that can be had quickly.

    Attributes:
        bundle: a bundle without a library.
        target: what it is compiled for.
        new, old: files of a library; the old one has another forward pass.
    """

    bundle: Path
    target: str
    new: dict[str, bytes]
    old: dict[str, bytes]

    def run(self, bundle: Path) -> None:
        """Compile a copy of the bundle; raises what a compilation does."""
        _compile(bundle, tokens=(1,))


def warm_compile(root: Path) -> WarmCompile:
    """Import and compile once; the forks have the kernels, of which nothing is written before they are there.

    To be called before any thread is started.
    """
    made = warm_export(root)
    from engram_compilers.kernel_cache import KernelCache, MakeKernel
    from engram_runtime.library import LIBRARY_FOLDER

    known: dict[str, Any] = {}

    def get(cache: KernelCache, name: str, make: MakeKernel) -> Any:
        if name not in cache._known:
            known.setdefault(name, None)
            known[name] = known[name] or make()
            cache._known[name] = cache.builder.add_func(known[name], name)
        return cache._known[name]

    mock.patch.object(KernelCache, "get", get).start()
    libraries = []
    for name, tokens in (("old library", (1, 2)), ("new library", (1,))):
        write_folder(root / name, made.new)
        _compile(root / name, tokens)
        (folder,) = (root / name / LIBRARY_FOLDER).iterdir()
        libraries.append(contents(folder))
    return WarmCompile(bundle=root / "new", target=folder.name, old=libraries[0], new=libraries[1])


def _compile(bundle: Path, tokens: tuple[int, ...]) -> None:
    from tests.workshop import tiny_profile

    from engram_compilers.build import compile_bundle

    profile = tiny_profile(kernels="portable", decode_tokens=tokens, prefill_tokens=())
    compile_bundle(Bundle.open(bundle), profile)


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder that may not exist yet."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
