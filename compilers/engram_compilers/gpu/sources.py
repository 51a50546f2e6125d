"""Kernels in TIR to the source of a GPU's language, and how each is launched.

TVM's pipeline splits a PrimFunc into device functions and host code that launches them. Only the former are generated:
what the host code would do is read from it and written down as launches, so that no runtime of TVM is needed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.tirx.build import codegen_build

from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import round_up
from engram_runtime.errors import CompileError
from engram_runtime.gpu.plan import ALIGNMENT_BYTES
from engram_targets.gpu import CUDA, GpuProfile

# What follows the split in TVM's pipeline: calls of its runtime, and dtypes that no kernel here has.
_OF_HOST_CODE = ("tirx.MakePackedAPI", "tirx.FP8StorageLegalize", "tirx.BF16StorageLegalize")
_DEVICE_FUNCTION = 2  # CallingConv::kDeviceKernelLaunch
_HOST = {"kind": "llvm"}

KERNEL = {"opencl": "__kernel void", "metal": "kernel void"}  # how a function begins

Sizes = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Temporary:
    """Memory that the launches of one PrimFunc pass on to each other."""

    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One launch of a device function.

    Attributes:
        blocks: of threads, by axis; ``threads`` are those of a block.
        arguments: each the place of an argument of the PrimFunc, or a temporary buffer.
    """

    function: str
    blocks: Sizes
    threads: Sizes
    arguments: tuple[int | Temporary, ...]


@dataclass(frozen=True, slots=True)
class Sources:
    """Generated kernels.

    Attributes:
        text: the source of all device functions.
        launches: by PrimFunc, the launches that run it, one after the other.
        temporary_bytes: memory that all `Temporary` lie in.
    """

    text: str
    launches: Mapping[str, tuple[KernelLaunch, ...]]
    temporary_bytes: int


@tvm.instrument.pass_instrument
class _WithoutHostCode:
    """Leaves out the passes that turn launches into calls of TVM's runtime."""

    def should_run(self, _: tvm.IRModule, info: tvm.transform.PassInfo) -> bool:
        return info.name not in _OF_HOST_CODE


def generate(kernels: Mapping[str, tirx.PrimFunc], profile: GpuProfile) -> Sources:
    """Generate the source of kernels, by name, for a target.

    PrimFuncs that aren't scheduled, those of Relax's own operators, get TVM's simplest schedule for GPUs.

    Raises:
        CompileError: a kernel is one for processors, or needs more threads or shared memory than a block may have.
    """
    target = target_of(profile)
    names = {_identifier(name): name for name in kernels}
    assert len(names) == len(kernels), "names of kernels that differ in other characters than letters and digits"
    device, launched = {}, {}
    split = _split({each: kernels[name] for each, name in names.items()}, target.with_host(tvm.target.Target(_HOST)))
    for variable, function in split.functions_items():
        if int(function.attrs.get("calling_conv", 0)) == _DEVICE_FUNCTION:
            device[variable] = function
            _check(variable.name_hint, function, profile)
        else:
            launched[names[variable.name_hint]] = _launches(variable.name_hint, function)
    _, _, finish = tvm.tirx.get_default_tir_pipeline(target)
    text = _text(finish()(tvm.IRModule(device)), target)
    launches = [launch for each in launched.values() for launch in each]
    temporaries = [each for launch in launches for each in launch.arguments if isinstance(each, Temporary)]
    return Sources(text, launched, max((each.offset + each.bytes for each in temporaries), default=0))


def _text(module: tvm.IRModule, target: tvm.target.Target) -> str:
    """Return the source of device functions; what each would begin with stands once.

    TVM prints functions of OpenCL and Metal apart, and before each the declarations of all.
    """
    if target.kind.name == CUDA:
        return str(codegen_build(module, target).inspect_source())
    heads: dict[str, None] = {}
    bodies = []
    for variable, function in module.functions_items():
        text = codegen_build(tvm.IRModule({variable: function}), target).inspect_source()
        head, kernel, body = text.partition(KERNEL[target.kind.name])
        heads[head.removeprefix(f"// Function: {variable.name_hint}\n")] = None
        bodies.append(kernel + body.rstrip() + "\n")
    return "\n".join([*heads, *bodies])


def target_of(profile: GpuProfile) -> tvm.target.Target:
    """Return TVM's description of a target."""
    return tvm.target.Target(
        {
            "kind": profile.language,
            "max_num_threads": profile.max_threads,
            "thread_warp_size": profile.warp,
            **({"arch": profile.arch} if profile.arch else {}),
        }
    )


def _identifier(name: str) -> str:
    """Return a name as the languages allow it; kernels' names have numbers such as 1e-05 in them."""
    return re.sub(r"\W", "_", name)


def _split(kernels: Mapping[str, tirx.PrimFunc], target: tvm.target.Target) -> tvm.IRModule:
    """Return device functions, and functions that launch them, by TVM's pipeline."""
    for name, kernel in kernels.items():
        _check_threads(name, kernel)
    module = tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    with target:
        module = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(module)
    module = tirx.transform.BindTarget(target)(module)
    pipeline, _, _ = tvm.tirx.get_default_tir_pipeline(target)
    with tvm.transform.PassContext(instruments=[_WithoutHostCode()]):
        return pipeline(module)


def _check_threads(name: str, kernel: tirx.PrimFunc) -> None:
    """Refuse a kernel by hand, which is one block to TVM, that isn't cut into threads: one for processors."""
    if not kernel.attrs.get("tirx.is_scheduled", False):
        schedule = s_tir.Schedule(kernel)
        if not schedule.get_child_blocks(schedule.get_sblock("root")):
            raise CompileError(f"kernel {name} is one for processors; compile for one: --target native")


def _launches(name: str, function: tirx.PrimFunc) -> tuple[KernelLaunch, ...]:
    """Read the launches from the host part of a PrimFunc: buffers, then one launch after the other."""
    buffers: dict[Expr, int | Temporary] = {parameter: place for place, parameter in enumerate(function.params)}
    launches, end = [], 0
    for statement in function.body.seq if isinstance(function.body, tirx.SeqStmt) else [function.body]:
        match statement:
            case tirx.AllocBuffer():
                size = _bytes(statement.buffer)
                buffers[statement.buffer] = Temporary(end, size)
                end = round_up(end + size, ALIGNMENT_BYTES)
            case tirx.DeclBuffer():
                buffers[statement.buffer] = buffers[statement.data.args[0]]
            case tirx.Evaluate() if _is_launch(statement.value):
                launches.append(_launch(statement.value, buffers))
            case _:
                raise AssertionError(f"kernel {name} has {type(statement).__name__} on the host")
    return tuple(launches)


def _check(name: str, function: tirx.PrimFunc, profile: GpuProfile) -> None:
    limits = {
        "max_threads_per_block": profile.max_threads,
        "max_shared_memory_per_block": profile.shared_memory_bytes,
    }
    if not s_tir.analysis.verify_gpu_code(function, limits):
        raise CompileError(
            f"kernel {name} needs blocks of more than the {profile.max_threads} threads or "
            f"{profile.shared_memory_bytes} bytes of shared memory that {profile.name} allows; "
            "choose smaller prefill_tokens in a profile of your own"
        )


def _is_launch(value: Expr) -> bool:
    return isinstance(value, tvm.ir.Call) and value.op.name == "tirx.call_ffi_kernel"


def _launch(call: Expr, buffers: Mapping[Expr, int | Temporary]) -> KernelLaunch:
    axes = list(call.attrs["launch_params"])
    name, *arguments = call.args
    extents = dict(zip(axes, (int(size) for size in arguments[len(arguments) - len(axes) :]), strict=True))
    x, y, z = (tuple(extents.get(f"{of}.{axis}", 1) for of in ("blockIdx", "threadIdx")) for axis in "xyz")
    return KernelLaunch(
        function=name.value,
        blocks=(x[0], y[0], z[0]),
        threads=(x[1], y[1], z[1]),
        arguments=tuple(buffers[argument.args[0]] for argument in arguments[: len(arguments) - len(axes)]),
    )


def _bytes(buffer: Expr) -> int:
    return math.prod(int(size) for size in buffer.shape) * np.dtype(str(buffer.dtype)).itemsize
