"""Executor on a library compiled by TVM: numpy, apache-tvm-ffi and TVM's small runtime library, no compiler."""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.cpu import available_cpus
from engram_runtime.errors import BundleError, TargetError
from engram_runtime.executor import StepInputs
from engram_runtime.library import LibraryInfo, PackedTensor, find_library

try:
    import tvm_ffi
except ModuleNotFoundError as error:
    raise TargetError("the tvm executor needs apache-tvm-ffi: pip install engram-edge") from error

CPU_DEVICE, POOLED_ALLOCATOR = 1, 2  # DLPack's kDLCPU; AllocatorType::kPooled of TVM's virtual machine
SHARE_ALL_CORES = -3  # ThreadGroup::kSpecifyThreadShareAllCore: workers are not pinned, so a busy core stalls nobody


class TvmExecutor:
    """A compiled library with its weights mapped, shared by all sequences."""

    name = "tvm"

    def __init__(self, folder: Path, info: LibraryInfo, machine_code: Any) -> None:
        self._passes = info.passes
        self._machine_code = machine_code
        self._weights = map_weights(folder / info.weights, info)

    def chunks(self, count: int) -> Sequence[int]:
        """See `Executor.chunks`: compiled sizes only, the largest first, so nothing is padded."""
        chunks: list[int] = []
        for size in sorted({tokens for tokens, _ in self._passes}, reverse=True):
            times, count = divmod(count, size)
            chunks += [size] * times
        return chunks

    def bind(self, states: Mapping[str, NDArray[np.float32]]) -> "TvmStep":
        """See `Executor.bind`."""
        forward = {(tokens, rows): self._machine_code[f"forward_{tokens}_{rows}"] for tokens, rows in self._passes}
        return TvmStep(forward, [as_tensor(array) for array in states.values()], self._weights)


class TvmStep:
    """The library's functions with one sequence's states as arguments."""

    def __init__(self, forward: Mapping[tuple[int, int], Any], states: Sequence[Any], weights: Sequence[Any]) -> None:
        self._forward = forward
        self._fixed = [*states, *weights]
        self._copies: dict[tuple[str, tuple[int, ...]], tuple[NDArray[Any], Any]] = {}

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See `Step`."""
        function = self._forward[len(inputs.token_ids), len(inputs.logit_rows)]
        logits, *_ = function(
            self._copy("token_ids", inputs.token_ids),
            self._copy("position", np.array([inputs.position], dtype=np.int64)),
            self._copy("logit_rows", inputs.logit_rows),
            *(self._copy(site, rows) for site, rows in inputs.rows.items()),
            *self._fixed,
        )
        return np.asarray(np.from_dlpack(logits), dtype=np.float32)

    def _copy(self, name: str, values: NDArray[Any]) -> Any:
        """Copy an input into the aligned buffer kept for it; compiled code needs the alignment."""
        key = (name, values.shape)
        if key not in self._copies:
            buffer = _aligned_like(values)
            self._copies[key] = (buffer, as_tensor(buffer))
        buffer, tensor = self._copies[key]
        buffer[...] = values
        return tensor


def load(bundle: Bundle, *, threads: int) -> TvmExecutor:
    """Load the library that fits this machine.

    Raises:
        TargetError: no library fits, or it can't be loaded.
    """
    folder, info = find_library(bundle)
    load_tvm_runtime(folder / info.runtime)
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(SHARE_ALL_CORES, threads, [str(cpu) for cpu in available_cpus()])
    try:
        module = tvm_ffi.load_module(str(folder / info.library))
    except (RuntimeError, OSError) as error:
        raise TargetError(f"library {folder / info.library} can't be loaded: {error}; compile it again") from error
    machine_code = module["vm_load_executable"]()
    machine_code["vm_initialization"](CPU_DEVICE, 0, POOLED_ALLOCATOR)
    return TvmExecutor(folder, info, machine_code)


def load_tvm_runtime(path: Path) -> None:
    """Load TVM's runtime library into the process unless it is there already."""
    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is not None:
        return
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(f"TVM's runtime {path} can't be loaded: {error}; compile the bundle again") from error


def map_weights(path: Path, info: LibraryInfo) -> list[Any]:
    """Map the packed weights, one tensor view each; nothing is read until it is used.

    Raises:
        BundleError: the file has another size than stated, or a tensor lies outside it.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size != info.weights_bytes:
        raise BundleError(f"{path} holds {size} bytes, expected {info.weights_bytes}; compile the bundle again")
    # Copy-on-write: DLPack refuses read-only arrays, and no kernel writes to weights.
    data = np.memmap(path, dtype=np.uint8, mode="c")
    return [as_tensor(_view(data, tensor)) for tensor in info.tensors]


def _view(data: NDArray[np.uint8], tensor: PackedTensor) -> NDArray[Any]:
    dtype = np.dtype(tensor.dtype)
    end = tensor.offset + int(np.prod(tensor.shape, dtype=np.int64)) * dtype.itemsize
    if end > len(data):
        raise BundleError(f"packed tensor {tensor.name} ends at byte {end} of {len(data)}; compile the bundle again")
    return data[tensor.offset : end].view(dtype).reshape(tensor.shape)


def as_tensor(array: NDArray[Any]) -> Any:
    """Wrap an array without copying; refuses one that compiled code would fault on."""
    if array.ctypes.data % 64:
        raise ValueError(f"array at {array.ctypes.data:#x} is not 64-byte aligned")
    return tvm_ffi.from_dlpack(array)


def _aligned_like(values: NDArray[Any]) -> NDArray[Any]:
    buffer = np.zeros(values.nbytes + 64, dtype=np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
