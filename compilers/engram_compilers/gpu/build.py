"""Build a library for a GPU: kernel sources, the plan of their launches, and packed weights."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

from engram_compilers.gpu.checking import check_source
from engram_compilers.gpu.sources import KernelLaunch, Temporary, generate
from engram_compilers.lowering import lower
from engram_compilers.onnx_model import OnnxModel
from engram_compilers.packed_weights import PackedWeights
from engram_compilers.program import (
    AwaitRows,
    Constant,
    Input,
    KernelCall,
    Output,
    Program,
    Programs,
    Scratch,
    State,
    Tensor,
    Weight,
)
from engram_compilers.straight_line import programs
from engram_runtime.bundle import Bundle, file_sha256
from engram_runtime.gpu import plan
from engram_runtime.library import LibraryInfo, graph_digest
from engram_runtime.manifest import GraphSpec
from engram_targets.gpu import GpuProfile

SOURCE_FILES = {"cuda": "kernels.cu", "opencl": "kernels.cl", "metal": "kernels.metal"}
PLAN_FILE, WEIGHTS_FILE = "program.json", "weights.bin"
CONSTANTS = "constants"  # what packed tensors that are none of the graph's weights are called

Graphs = Mapping[str, tuple[OnnxModel, GraphSpec]]


def build(
    bundle: Bundle, graphs: Graphs, profile: GpuProfile, folder: Path, report: Callable[[str], None]
) -> LibraryInfo:
    """Write a library's files into a folder; returns what ``compile.json`` says of them.

    Raises:
        CompileError: the graph has an operator, or a use of one, that has no kernel for GPUs, or a kernel needs more
            than the target has.
    """
    report("packing weights and lowering the graph")
    specs = {name: spec for name, (_, spec) in graphs.items()}
    with PackedWeights(folder / WEIGHTS_FILE) as packed:
        lowered = lower(graphs, packed, family=profile.kernels, passes=profile.passes, cache_dtype=profile.cache_dtype)
        made = programs(lowered, specs, alignment=plan.ALIGNMENT_BYTES)
        places = _pack_constants(packed, made)
        tensors = tuple(packed.tensors.values())
        weights_bytes = packed.bytes
    report(f"generating {profile.language} source")
    sources = generate(made.kernels, profile)
    source_file = SOURCE_FILES[profile.language]
    (folder / source_file).write_text(sources.text, encoding="utf-8")
    check_source(folder / source_file, profile, report)
    passes = {name: _forward_pass(program, sources.launches, places) for name, program in made.of.items()}
    written = plan.Plan(passes=passes, temporary_bytes=sources.temporary_bytes)
    (folder / PLAN_FILE).write_text(json.dumps(written.to_dict(), separators=(",", ":")), encoding="utf-8")
    files = {"library": source_file, "weights": WEIGHTS_FILE, "commands": PLAN_FILE}
    return LibraryInfo(
        target=profile.name,
        device=profile.language,
        machine="",
        cpu_flags=(),
        graph_sha256=graph_digest(bundle),
        compiler=f"apache-tvm {version('apache-tvm')}, apache-tvm-ffi {version('apache-tvm-ffi')}",
        ffi="",
        library=source_file,
        runtime=None,
        weights=WEIGHTS_FILE,
        commands=PLAN_FILE,
        weights_bytes=weights_bytes,
        sha256={part: file_sha256(folder / name) for part, name in files.items()},
        passes=profile.passes,
        batches=(),
        tensors=tensors,
        graph_tensors=lowered.graph_tensors,
        expert_bytes=lowered.expert_bytes,
        threads=1,
        float16_states=lowered.float16_states,
    )


def _pack_constants(packed: PackedWeights, made: Programs) -> list[int]:
    """Put the constants after the weights; returns their places among the tensors."""
    for index, array in enumerate(made.constants):
        packed.tensors_of(f"{CONSTANTS}.{index}", partial(dict, plain=array))
    first = len(packed.tensors) - len(made.constants)
    return list(range(first, len(packed.tensors)))


def _forward_pass(
    program: Program, launches: Mapping[str, tuple[KernelLaunch, ...]], constants: list[int]
) -> plan.ForwardPass:
    steps: list[plan.Launch | plan.AwaitRows] = []
    for call in program.calls:
        if isinstance(call, AwaitRows):
            steps.append(plan.AwaitRows(call.site))
        else:
            steps += [_launch(call, launch, constants) for launch in launches[call.kernel]]
    results = tuple(plan.Result(each.dtype, each.shape, _place(each, constants)) for each in program.outputs)
    return plan.ForwardPass(steps=tuple(steps), results=results, scratch_bytes=program.scratch_bytes)


def _launch(call: KernelCall, launch: KernelLaunch, constants: list[int]) -> plan.Launch:
    arguments = tuple(
        plan.Place(plan.TEMPORARY, argument.offset, argument.bytes)
        if isinstance(argument, Temporary)
        else _place(call.arguments[argument], constants)
        for argument in launch.arguments
    )
    return plan.Launch(launch.function, launch.blocks, launch.threads, arguments)


def _place(tensor: Tensor, constants: list[int]) -> plan.Place:
    match tensor.place:
        case Input(name):
            return plan.Place(plan.INPUT, name, tensor.bytes)
        case State(name):
            return plan.Place(plan.STATE, name, tensor.bytes)
        case Weight(index):
            return plan.Place(plan.WEIGHT, index, tensor.bytes)
        case Constant(index):
            return plan.Place(plan.WEIGHT, constants[index], tensor.bytes)
        case Scratch(offset):
            return plan.Place(plan.SCRATCH, offset, tensor.bytes)
        case Output(index):
            return plan.Place(plan.OUTPUT, index, tensor.bytes)
