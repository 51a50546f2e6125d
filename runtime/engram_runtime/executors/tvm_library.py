"""Executor on a library compiled by TVM: numpy, apache-tvm-ffi and TVM's small runtime library, no compiler."""

import contextlib
import ctypes
import importlib.util
import mmap
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle, file_sha256
from engram_runtime.cpu import available_cpus
from engram_runtime.errors import BundleError, TargetError
from engram_runtime.executor import State, StepInputs, allocate_states, empty_rows
from engram_runtime.library import LibraryInfo, PackedTensor, find_library


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide torch: tvm_ffi imports it where it is installed, which takes 3 s and 230 MB that nothing here uses."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


try:
    with _without_torch():
        import tvm_ffi
except ModuleNotFoundError as error:
    raise TargetError("the tvm executor needs apache-tvm-ffi: pip install engram-edge") from error

CPU_DEVICE, POOLED_ALLOCATOR = 1, 2  # DLPack's kDLCPU; AllocatorType::kPooled of TVM's virtual machine
TIMED_TOKENS = 5  # for each number of threads
SHARE_ALL_CORES = -3  # ThreadGroup::kSpecifyThreadShareAllCore: workers are not pinned, so a busy core stalls nobody


class TvmExecutor:
    """A compiled library with its weights mapped, shared by all sequences."""

    name = "tvm"

    def __init__(self, folder: Path, info: LibraryInfo, machine_code: Any) -> None:
        self.threads = 0
        self.expert_bytes_read = 0  # by all steps so far; the other weights are read whole by each step
        self.float16_states = info.float16_states
        self._expert_bytes = info.expert_bytes
        self._cpus = available_cpus()  # before TVM's pool begins, which pins the calling thread until it is configured
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

    def use_threads(self, count: int) -> None:
        """Run with ``count`` threads from now on; results don't depend on it."""
        self.threads = count
        self._configure_pool()

    def claim_threads(self) -> None:
        """Make the process's one thread pool this executor's, in case another one has used it since."""
        if tvm_ffi.get_global_func("runtime.NumThreads")() != self.threads:
            self._configure_pool()

    def count_experts(self, outputs: Sequence[Any]) -> None:
        """Add what a call has read of experts; the last of its outputs say how many experts."""
        counts = outputs[len(outputs) - len(self._expert_bytes) :]
        for count, size in zip(counts, self._expert_bytes, strict=True):
            self.expert_bytes_read += int(np.from_dlpack(count)[0]) * size

    def _configure_pool(self) -> None:
        configure = tvm_ffi.get_global_func("runtime.config_threadpool")
        configure(SHARE_ALL_CORES, self.threads, [str(cpu) for cpu in self._cpus])

    def bind(self, states: Mapping[str, State]) -> "TvmStep":
        """See `Executor.bind`."""
        forward = {(tokens, rows): self._machine_code[f"forward_{tokens}_{rows}"] for tokens, rows in self._passes}
        return TvmStep(self, forward, [as_tensor(array) for array in states.values()], self._weights)


class TvmStep:
    """The library's functions with one sequence's states as arguments."""

    def __init__(
        self,
        executor: TvmExecutor,
        forward: Mapping[tuple[int, int], Any],
        states: Sequence[Any],
        weights: Sequence[Any],
    ) -> None:
        self._executor = executor
        self._forward = forward
        self._fixed = [*states, *weights]
        self._copies: dict[tuple[str, tuple[int, ...]], tuple[NDArray[Any], Any]] = {}

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See `Step`."""
        self._executor.claim_threads()
        function = self._forward[len(inputs.token_ids), len(inputs.logit_rows)]
        logits, *others = function(
            self._copy("token_ids", inputs.token_ids),
            self._copy("position", np.array([inputs.position], dtype=np.int64)),
            self._copy("logit_rows", inputs.logit_rows),
            *(self._copy(site, rows) for site, rows in inputs.rows.items()),
            *self._fixed,
        )
        self._executor.count_experts(others)
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


def load(bundle: Bundle, *, threads: int | None) -> TvmExecutor:
    """Load the library that fits this machine; without a number of threads, measure which is fastest now.

    Raises:
        TargetError: no library fits, or it can't be loaded.
    """
    folder, info = find_library(bundle)
    load_tvm_runtime(installed_twin(folder / info.runtime, info.sha256["runtime"]))
    try:
        module = tvm_ffi.load_module(str(folder / info.library))
    except (RuntimeError, OSError) as error:
        raise TargetError(f"library {folder / info.library} can't be loaded: {error}; compile it again") from error
    machine_code = module["vm_load_executable"]()
    machine_code["vm_initialization"](CPU_DEVICE, 0, POOLED_ALLOCATOR)
    executor = TvmExecutor(folder, info, machine_code)
    executor.use_threads(threads or fastest_threads(executor, bundle))
    executor.expert_bytes_read = 0  # what the timed tokens have read is no sequence's
    return executor


def fastest_threads(executor: TvmExecutor, bundle: Bundle) -> int:
    """Time single tokens with one thread and with one per CPU; where another process holds a CPU, one is faster."""
    step = executor.bind(allocate_states(bundle.manifest.decoder.states, executor.float16_states))
    executor.use_threads(1)
    _time_token(step, bundle)  # faults the weights in
    alone = statistics.median(_time_token(step, bundle) for _ in range(TIMED_TOKENS))
    executor.use_threads(every_cpu := len(available_cpus()))
    together = [_time_token(step, bundle)]
    while len(together) < TIMED_TOKENS and together[-1] < 2 * alone:
        together.append(_time_token(step, bundle))
    return every_cpu if statistics.median(together) < alone else 1


def _time_token(step: TvmStep, bundle: Bundle) -> float:
    token = StepInputs(
        token_ids=np.zeros(1, dtype=np.int64),
        position=0,
        logit_rows=np.zeros(1, dtype=np.int64),
        rows={table.site: empty_rows(table, 1) for table in bundle.manifest.tables},
    )
    started = time.perf_counter()
    step(token)
    return time.perf_counter() - started


def installed_twin(path: Path, sha256: str) -> Path:
    """Return the same runtime library inside an installed tvm package, or ``path`` where there is none.

    A process that imports tvm later loads that file: the same one twice is once, a copy beside it aborts the process.
    """
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        return path
    twin = Path(spec.origin).parent / "lib" / path.name
    return twin if twin.is_file() and file_sha256(twin) == sha256 else path


def load_tvm_runtime(path: Path) -> None:
    """Load TVM's runtime library into the process unless it is there already."""
    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is not None:
        return
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(f"TVM's runtime {path} can't be loaded: {error}; compile the bundle again") from error


def map_weights(path: Path, info: LibraryInfo) -> list[Any]:
    """Map the packed weights, one tensor view each, and let the kernel begin to read them.

    Raises:
        BundleError: the file has another size than stated, or a tensor lies outside it.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size != info.weights_bytes:
        raise BundleError(f"{path} holds {size} bytes, expected {info.weights_bytes}; compile the bundle again")
    with path.open("rb") as file:
        # Copy-on-write: DLPack refuses read-only arrays, and no kernel writes to weights.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.madvise(mmap.MADV_WILLNEED)
    data = np.frombuffer(mapped, dtype=np.uint8)
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
