"""Compile a bundle for a target: lower, build, and put library, weights and runtime into ``lib/<target>/``."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from engram_runtime.bundle import Bundle, file_sha256
from engram_runtime.errors import CompileError
from engram_runtime.library import LIBRARY_FOLDER, LIBRARY_INFO_NAME, LibraryInfo, graph_digest
from engram_runtime.manifest import DECODER, DRAFT_HEAD
from engram_runtime.new_file import flush
from engram_runtime.new_folder import make_read_only, staged_place
from engram_runtime.trust.records import COMPILED, keep_record
from engram_targets import CpuProfile, GpuProfile, NpuProfile, Profile

try:
    import tvm
    from tvm import relax
except ModuleNotFoundError as error:
    raise CompileError("compiling needs TVM: pip install 'engram-edge[compile]'") from error

from engram_compilers.gpu.build import build as build_for_gpu
from engram_compilers.linking import is_own, link, links_by_ziglang, system_of, zig_target
from engram_compilers.lowering import Graphs, LoweredGraphs, lower
from engram_compilers.npu.codegen import compile_for_device
from engram_compilers.onnx_model import read_onnx_model
from engram_compilers.packed_weights import PackedWeights
from engram_compilers.processors import check_processor
from engram_compilers.runtime_library import installed_library, library_of
from engram_compilers.table_functions import table_functions
from engram_compilers.tuning.sizes import OWN_BLOCKS, Blocks

WEIGHTS_FILE, COMMANDS_FILE = "weights.bin", "commands.bin"
PORTABLE_FILE = "portable.bin"  # weights as the family `PORTABLE` packs them, gone once an accelerator has its own
PORTABLE = "portable"
LOWERING = "packing weights and lowering the graph"
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileResult:
    """What a compilation made."""

    folder: Path
    target: str
    seconds: float
    library_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """Graphs ready for code, their packed weights, and the file of an accelerator's commands where there is one."""

    graphs: LoweredGraphs
    packed: PackedWeights
    commands: str | None
    blocks: Blocks = OWN_BLOCKS


def compile_bundle(
    bundle: Bundle, profile: Profile, report: Report = lambda text: None, blocks: Blocks = OWN_BLOCKS
) -> CompileResult:
    """Compile the decoder, and a draft head, for a target, replacing an earlier library for it.

    Args:
        report: told each step before it begins.
        blocks: block sizes measured for this profile, which change no bit of a result.

    Raises:
        CompileError: the graph has an operator or a use of one that has no lowering, the target is C sources or a
            processor that LLVM doesn't know, there is no linker for it, or TVM's runtime library for it can't be
            downloaded.
        OSError: this user's state folder, which is to say that the library was compiled here, can't be written.
        TargetError: others can write to the state folder.
    """
    started = time.monotonic()
    folder = bundle.file(LIBRARY_FOLDER) / profile.name
    weights = bundle.manifest.entry(bundle.manifest.decoder.weights)
    folder.parent.mkdir(exist_ok=True)
    flush(bundle.path)
    with staged_place(folder, "compiled to", weights.bytes) as scratch:
        info = _build(bundle, profile, scratch, report, blocks)
        (scratch / LIBRARY_INFO_NAME).write_bytes(info.to_bytes())
        make_read_only(scratch)
        keep_record(info, COMPILED, folder)  # first: without a record it would be there and not run
    return CompileResult(
        folder=folder,
        target=profile.name,
        seconds=time.monotonic() - started,
        library_bytes=(folder / info.library).stat().st_size,
        weights_bytes=info.weights_bytes,
    )


def remove_libraries(bundle: Bundle) -> None:
    """Throw away all that lies where a bundle's libraries do, whoever made it."""
    folder = bundle.file(LIBRARY_FOLDER)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _build(bundle: Bundle, profile: Profile, folder: Path, report: Report, blocks: Blocks) -> LibraryInfo:
    match profile:
        case GpuProfile():
            return build_for_gpu(bundle, _read_graphs(bundle), profile, folder, report)
        case CpuProfile():
            check_processor(profile)
            with PackedWeights(folder / WEIGHTS_FILE) as packed:
                report(LOWERING)
                lowered = _lower(_read_graphs(bundle), packed, profile, profile.kernels, blocks)
            return _build_library(bundle, profile, profile, Lowered(lowered, packed, None, blocks), folder, report)
        case NpuProfile():
            check_processor(profile.host)
            report(LOWERING)
            for_npu = _lower_for_npu(_read_graphs(bundle), profile, folder)
            return _build_library(bundle, profile, profile.host, for_npu, folder, report)
    raise CompileError(
        f"target {profile.name} is C sources, no library; run: engram pack {bundle.path} --target {profile.name} -o DIR"
    )


def _read_graphs(bundle: Bundle) -> Graphs:
    specs = {DECODER: bundle.manifest.decoder}
    if DRAFT_HEAD in bundle.manifest.graphs:
        specs[DRAFT_HEAD] = bundle.manifest.graphs[DRAFT_HEAD]
    paths = {name: (bundle.graph_file(spec.file), bundle.graph_file(spec.weights)) for name, spec in specs.items()}
    bundle.verify_digests(only={path for spec in specs.values() for path in (spec.file, spec.weights)})
    return {name: (read_onnx_model(*paths[name]), spec) for name, spec in specs.items()}


def _build_library(
    bundle: Bundle, profile: Profile, host: CpuProfile, made: Lowered, folder: Path, report: Report
) -> LibraryInfo:
    """Generate and link what the host runs."""
    lowered, packed, commands = made.graphs, made.packed, made.commands
    lowered.module.update(table_functions(bundle.manifest.tables))
    report(f"generating code for {host.llvm.mcpu}")
    target = tvm.target.Target(host.llvm.target)
    # Bytecode, not exec_mode="compiled": LLVM needs minutes for a function of 500 calls and saves 0.1 us a call.
    executable = relax.build(lowered.module, target, relax_pipeline=relax.get_default_pipeline(target))
    library = _link(executable, host, folder, report)
    runtime = _copy_runtime(host, folder, report)
    files = {"library": library, "runtime": runtime, "weights": WEIGHTS_FILE, "commands": commands}
    return LibraryInfo(
        target=profile.name,
        device=profile.device,
        machine=host.machine,
        cpu_flags=host.cpu_flags,
        graph_sha256=graph_digest(bundle),
        compiler=_compiler(made.blocks),
        ffi=version("apache-tvm-ffi"),
        library=library,
        runtime=runtime,
        weights=WEIGHTS_FILE,
        commands=commands,
        weights_bytes=packed.bytes,
        sha256={part: file_sha256(folder / name) for part, name in files.items() if name is not None},
        passes=profile.passes,
        batches=profile.batches,
        tensors=tuple(packed.tensors.values()),
        graph_tensors=lowered.graph_tensors,
        expert_bytes=lowered.expert_bytes,
        threads=host.threads,
        float16_states=lowered.float16_states,
    )


def _lower_for_npu(graphs: Graphs, profile: NpuProfile, folder: Path) -> Lowered:
    """Lower for the host, then give the accelerator its part: command streams, and its weights in its own layout."""
    with PackedWeights(portable_path := folder / PORTABLE_FILE) as portable:
        lowered = _lower(graphs, portable, profile, PORTABLE, OWN_BLOCKS)
    with PackedWeights(folder / WEIGHTS_FILE) as packed:
        code = compile_for_device(lowered, portable, portable_path, profile.geometry, packed)
    portable_path.unlink()
    (folder / COMMANDS_FILE).write_bytes(code.commands.to_bytes())
    return Lowered(code.lowered, packed, COMMANDS_FILE)


def _lower(graphs: Graphs, packed: PackedWeights, profile: Profile, family: str, blocks: Blocks) -> LoweredGraphs:
    return lower(
        graphs,
        packed,
        family=family,
        passes=profile.passes,
        batches=profile.batches,
        cache_dtype=profile.cache_dtype,
        blocks=blocks,
    )


def _compiler(blocks: Blocks) -> str:
    made_by = f"apache-tvm {version('apache-tvm')}, apache-tvm-ffi {version('apache-tvm-ffi')}"
    return f"{made_by}, block sizes of {blocks.source}" if blocks.source else made_by


def _link(executable: tvm.runtime.Module, profile: CpuProfile, folder: Path, report: Report) -> str:
    """Link what was generated; returns the library's name."""
    name = system_of(profile.llvm.mtriple).library
    if links_by_ziglang(profile.llvm.mtriple):
        report(f"linking for {zig_target(profile.llvm.mtriple)} by ziglang, which builds that system's C library first")
    executable.export_library(str(folder / name), fcompile=partial(link, mtriple=profile.llvm.mtriple))
    return name


def _copy_runtime(profile: CpuProfile, folder: Path, report: Report) -> str | None:
    """Put TVM's runtime library beside the compiled one; returns its name, or None where there is none to be had."""
    system = system_of(profile.llvm.mtriple).name
    source = installed_library() if is_own(profile.llvm.mtriple) else library_of(profile.machine, system, report)
    if source is None:
        report(f"leaving out TVM's runtime library, of which apache-tvm has no wheel for {profile.machine} {system}")
        return None
    shutil.copyfile(source, folder / source.name)
    return source.name
