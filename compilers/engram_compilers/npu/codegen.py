"""Compile a lowered module for an accelerator beside its host: partition it, write command streams, pack weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from engram_compilers.kernels.packing import GROUP, Bytes
from engram_compilers.lowering import LoweredGraphs
from engram_compilers.npu.device import DeviceCompiler, compiler_for
from engram_compilers.npu.offload import Asked, DeviceWeight, Offload
from engram_compilers.npu.partition import partition, partitions
from engram_compilers.packed_weights import PackedWeights
from engram_runtime.errors import CompileError
from engram_runtime.library import PackedTensor
from engram_runtime.manifest import DRAFT_HEAD
from engram_runtime.npu.commands_file import CommandsFile
from engram_runtime.npu.device import Geometry
from engram_runtime.npu.devices import open_device

Arrays = Mapping[str, NDArray[Any]]
Taken = tuple[list[str], list[tuple[str, ...]]]  # see `Offload.rewrite`


@dataclass(frozen=True, slots=True, eq=False)
class DeviceCode:
    """What runs on a host with an accelerator.

    Attributes:
        lowered: the host's part, which calls the accelerator; it takes other packed tensors than before.
        commands: the accelerator's part.
    """

    lowered: LoweredGraphs
    commands: CommandsFile


def compile_for_device(
    lowered: LoweredGraphs, portable: PackedWeights, portable_path: Path, geometry: Geometry, packed: PackedWeights
) -> DeviceCode:
    """Give the integer products of linear layers to an accelerator; what it takes goes to ``packed``, by its layout.

    Args:
        lowered: by the kernel family ``portable``, with weights in ``portable``, whose file is at ``portable_path``.

    Raises:
        CompileError: there is nothing for an accelerator to do.
        TargetError: a product does not fit it.
    """
    compiler, device = compiler_for(geometry), open_device(geometry)
    stream = cache(compiler.commands)
    asked = Asked()
    module = partition(lowered.module)
    offload = Offload(module, partitions(module), asked, lambda product: device.load(stream(product)).weight_bytes)
    taken = {
        graph: _rewrite(offload, graph, [list(portable.tensors)[place] for place in places])
        for graph, places in lowered.graph_tensors.items()
    }
    if not asked.products:
        raise CompileError(
            "no layer has weights of int8 or two-level int4, which are what accelerators multiply; export the model "
            "with --quant int8 or --quant int4"
        )
    arrays = _mapped(portable_path, portable.tensors)
    for name in dict.fromkeys(name for kept, _ in taken.values() for name in kept):
        packed.copy(portable.tensors[name], arrays[name])
    made = {weight.parts: _pack(packed, weight, compiler, arrays) for weight in asked.weights.values()}
    places = {name: place for place, name in enumerate(packed.tensors)}
    graph_tensors = {
        graph: tuple(places[name] for name in (*kept, *(made[parts] for parts in weights)))
        for graph, (kept, weights) in taken.items()
    }
    commands = CommandsFile(
        geometry=geometry,
        streams=[stream(product) for product in asked.products],
        layers=[weight.layer for weight in asked.weights.values()],
    )
    return DeviceCode(replace(lowered, module=offload.finish(), graph_tensors=graph_tensors), commands)


def _rewrite(offload: Offload, graph: str, tensors: Sequence[str]) -> Taken:
    """Rewrite all functions of a graph, which take the same tensors before and after."""
    head = f"{DRAFT_HEAD}_"
    functions = [
        variable
        for variable, function in offload.module.functions.items()
        if isinstance(function, relax.Function)
        and variable.name_hint not in offload.partitions
        and variable.name_hint.startswith(head) == (graph == DRAFT_HEAD)
    ]
    first, *others = (offload.rewrite(variable, tensors) for variable in functions)
    assert all(other == first for other in others)
    return first


def _mapped(path: Path, tensors: Mapping[str, PackedTensor]) -> Arrays:
    """Map the tensors of a file of packed weights."""
    data = np.memmap(path, np.uint8, "r")
    return {
        name: data[tensor.offset : tensor.end].view(tensor.dtype).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


def _pack(packed: PackedWeights, weight: DeviceWeight, compiler: DeviceCompiler, arrays: Arrays) -> str:
    """Pack a weight for the accelerator, expert by expert; returns the tensor's name."""
    outputs = weight.product.outputs

    def pack_slice(expert: int) -> Arrays:
        parts = [arrays[name][expert * outputs : (expert + 1) * outputs] for name in weight.parts]
        made = (
            compiler.pack_int8(*parts) if weight.product.weights == "int8" else compiler.pack_int4(*_unpacked(*parts))
        )
        assert made.size == weight.bytes
        return {"packed": made}

    (tensor,) = packed.tensors_of_slices(f"{weight.stored_name}:device", weight.experts, pack_slice)
    return tensor.name


def _unpacked(codes: Bytes, header: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    """Return codes ``[N, K]``, multipliers and zeros ``[N, K/32]`` of what `portable.pack_int4` made."""
    groups = codes.reshape(len(codes), -1, GROUP // 2)
    both = np.concatenate([groups & np.uint8(15), groups >> np.uint8(4)], axis=2)
    return both.reshape(len(codes), -1), (header & np.uint8(15)) + np.uint8(1), header >> np.uint8(4)
