"""Compile a bundle for a target: lower, build, and put library, weights and runtime into ``lib/<target>/``."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from engram_runtime.bundle import Bundle, file_sha256
from engram_runtime.cpu import machine
from engram_runtime.errors import CompileError
from engram_runtime.library import CPU, LIBRARY_FOLDER, LIBRARY_INFO_NAME, LibraryInfo, graph_digest
from engram_runtime.manifest import DECODER, DRAFT_HEAD
from engram_targets import TargetProfile

try:
    import tvm
    from tvm import relax
except ModuleNotFoundError as error:
    raise CompileError("compiling needs TVM: pip install 'engram-edge[compile]'") from error

from engram_compilers.linking import link
from engram_compilers.lowering import lower
from engram_compilers.onnx_model import read_onnx_model
from engram_compilers.packed_weights import PackedWeights
from engram_compilers.table_functions import table_functions

LIBRARY_FILE, WEIGHTS_FILE, RUNTIME_FILE = "model.so", "weights.bin", "libtvm_runtime.so"
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileResult:
    """What a compilation made."""

    folder: Path
    target: str
    seconds: float
    library_bytes: int
    weights_bytes: int


def compile_bundle(bundle: Bundle, profile: TargetProfile, report: Report = lambda text: None) -> CompileResult:
    """Compile the decoder, and a draft head, for a target, replacing an earlier library for it.

    Args:
        report: told each step before it begins.

    Raises:
        CompileError: the graph has an operator or a use of one that has no lowering, or the target is a machine of
            another architecture.
    """
    if profile.machine != machine():
        raise CompileError(
            f"target {profile.name} is for {profile.machine}, compile it there: what is linked to its kernels and "
            f"TVM's runtime library are those of this {machine()} machine"
        )
    started = time.monotonic()
    folder = bundle.file(LIBRARY_FOLDER) / profile.name
    scratch = folder.with_name(f".{profile.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        info = _build(bundle, profile, scratch, report)
        (scratch / LIBRARY_INFO_NAME).write_text(json.dumps(info.to_dict()), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return CompileResult(
        folder=folder,
        target=profile.name,
        seconds=time.monotonic() - started,
        library_bytes=(folder / LIBRARY_FILE).stat().st_size,
        weights_bytes=info.weights_bytes,
    )


def _build(bundle: Bundle, profile: TargetProfile, folder: Path, report: Report) -> LibraryInfo:
    specs = {DECODER: bundle.manifest.decoder}
    if DRAFT_HEAD in bundle.manifest.graphs:
        specs[DRAFT_HEAD] = bundle.manifest.graphs[DRAFT_HEAD]
    bundle.verify_digests(only={path for spec in specs.values() for path in (spec.file, spec.weights)})
    graphs = {
        name: (read_onnx_model(bundle.file(spec.file), bundle.file(spec.weights)), spec) for name, spec in specs.items()
    }
    report("packing weights and lowering the graph")
    with PackedWeights(folder / WEIGHTS_FILE) as packed:
        lowered = lower(
            graphs,
            packed,
            family=profile.kernels,
            passes=profile.passes,
            batches=profile.batches,
            cache_dtype=profile.cache_dtype,
        )
        weights_bytes = packed.bytes
    lowered.module.update(table_functions(bundle.manifest.tables))
    report(f"generating code for {profile.mcpu}")
    target = tvm.target.Target({"kind": "llvm", "mtriple": profile.mtriple, "mcpu": profile.mcpu})
    # Bytecode, not exec_mode="compiled": LLVM needs minutes for a function of 500 calls and saves 0.1 us a call.
    executable = relax.build(lowered.module, target, relax_pipeline=relax.get_default_pipeline(target))
    executable.export_library(str(folder / LIBRARY_FILE), fcompile=partial(link, mtriple=profile.mtriple))
    shutil.copyfile(Path(tvm.__file__).parent / "lib" / RUNTIME_FILE, folder / RUNTIME_FILE)
    return LibraryInfo(
        target=profile.name,
        device=CPU,
        machine=profile.machine,
        cpu_flags=profile.cpu_flags,
        graph_sha256=graph_digest(bundle),
        compiler=f"apache-tvm {version('apache-tvm')}, apache-tvm-ffi {version('apache-tvm-ffi')}",
        ffi=version("apache-tvm-ffi"),
        library=LIBRARY_FILE,
        runtime=RUNTIME_FILE,
        weights=WEIGHTS_FILE,
        commands=None,
        weights_bytes=weights_bytes,
        sha256={
            "library": file_sha256(folder / LIBRARY_FILE),
            "runtime": file_sha256(folder / RUNTIME_FILE),
            "weights": file_sha256(folder / WEIGHTS_FILE),
        },
        passes=profile.passes,
        batches=profile.batches,
        tensors=tuple(packed.tensors.values()),
        graph_tensors=lowered.graph_tensors,
        expert_bytes=lowered.expert_bytes,
        threads=profile.threads,
        float16_states=lowered.float16_states,
    )
