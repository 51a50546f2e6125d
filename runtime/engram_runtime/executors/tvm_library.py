"""Executor on a library compiled by TVM: numpy, apache-tvm-ffi and TVM's small runtime library, no compiler."""

import contextlib
import ctypes
import importlib.util
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle, file_sha256
from engram_runtime.cpu import available_cores
from engram_runtime.errors import BundleError, TargetError
from engram_runtime.executor import MOST_THREADS, PendingRows, State, StepInputs, aligned_zeros
from engram_runtime.executors.padding import chunk_sizes, padded_inputs
from engram_runtime.executors.tvm_batch import TvmBatchStep, batch_sizes
from engram_runtime.executors.tvm_pool import LibraryPool
from engram_runtime.executors.tvm_rows import TvmRowDecoder
from engram_runtime.forking import check_process
from engram_runtime.library import (
    AWAIT_ROWS,
    LibraryInfo,
    PackedTensor,
    batch_function,
    pass_function,
    row_function,
)
from engram_runtime.manifest import DECODER, EMBEDDINGS, HIDDEN
from engram_runtime.table_spec import TableSpec
from engram_runtime.trust.code import checked_code
from engram_runtime.trust.library import trusted_library


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

NOTHING_TOLD: Mapping[str, Sequence[str]] = {DECODER: ()}
FLOATS = ("float16", "float32")
MOST_CHECKED_BYTES = 1 << 22  # of a tensor: those beyond are matrices of floats, whose reading would delay loading
CPU_DEVICE, POOLED_ALLOCATOR = 1, 2  # DLPack's kDLCPU; AllocatorType::kPooled of TVM's virtual machine


class _Running(threading.local):
    """The pass that this thread runs."""

    step: "TvmStep | None" = None


_running = _Running()


def running_step() -> "TvmStep":
    """Return the step whose pass this thread runs, to functions that generated code calls."""
    assert _running.step is not None
    return _running.step


def _await_rows(rows: Any, site: int) -> Any:
    """Fill an input of the pass that this thread runs; generated code calls this before it reads the rows of a site."""
    running_step().fill_rows(site)
    return rows


def let_call(name: str, function: Callable[..., Any]) -> None:
    """Let generated code call a function by name."""
    tvm_ffi.register_global_func(name, function, override=True)


let_call(AWAIT_ROWS, _await_rows)


class TvmExecutor:
    """A compiled library with its weights mapped, shared by all sequences; results don't depend on ``threads``."""

    name = "tvm"

    def __init__(
        self,
        folder: Path,
        info: LibraryInfo,
        tables: Sequence[TableSpec] = (),
        *,
        threads: int,
        told: Mapping[str, Sequence[str]] = NOTHING_TOLD,
    ) -> None:
        """Load a library whose files are those of ``info``; raises TargetError where it can't be loaded.

        Args:
            told: by graph its `told_outputs`, which follow the logits.
        """
        self.folder = folder
        self.info = info
        self.threads = threads
        self.process = os.getpid()
        self._told = told
        self.expert_bytes_read = 0  # by all steps so far; the other weights are read whole by each step
        self.experts_read: int | None = 0 if info.expert_bytes else None
        self.float16_states = info.float16_states
        self._expert_bytes = info.expert_bytes
        self._passes = info.passes
        self._batches = info.batches
        self._unread: Sequence[Any] = ()
        self._row_functions = {table.site: row_function(table) for table in tables}
        self._sizes = sorted({tokens for tokens, _ in info.passes})
        self._module = module = load_module(folder / info.library, info.sha256["library"])
        self.pool = LibraryPool(module.get_function("use_threads", query_imports=True), threads)
        self._machine_code = module["vm_load_executable"]()
        self._machine_code["vm_initialization"](CPU_DEVICE, 0, POOLED_ALLOCATOR)
        weights = map_weights(folder / info.weights, info)
        self._weights = {graph: [weights[place] for place in used] for graph, used in info.graph_tensors.items()}

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        """See `Executor.chunks`: compiled sizes, the largest first, and the next larger one for a small rest."""
        return chunk_sizes(self._sizes, count, spare)

    def batches(self, count: int) -> Sequence[int]:
        """See `Batching.batches`: as few passes as there can be."""
        return batch_sizes(count, max(self._batches, default=1))

    def spare_rows(self, count: int) -> int:
        """See `Batching.spare_rows`: what fills the last batch up, unless each row reads experts of its own."""
        last = count % max(self._batches, default=1)
        if last < 2 or self._expert_bytes:  # a row that is left alone is a pass of its own
            return 0
        return min(size for size in self._batches if size >= last) - last

    def watch(self, watcher: Callable[..., None] | None) -> None:
        """See `engram_runtime.bench.kernel_times.Watchable`."""
        self._machine_code["set_instrument"](None if watcher is None else tvm_ffi.convert(watcher))

    def count_experts(self, outputs: Sequence[Any]) -> None:
        """Add what a call has read of experts; the last of its outputs say how many experts."""
        if self.experts_read is None:
            return
        counts = [int(np.from_dlpack(count)[0]) for count in outputs[len(outputs) - len(self._expert_bytes) :]]
        self.experts_read += sum(counts)
        self.expert_bytes_read += sum(count * size for count, size in zip(counts, self._expert_bytes, strict=True))

    def row_decoder(self, site: str) -> TvmRowDecoder | None:
        """See `Executor.row_decoder`: none for records cut elsewhere than before their scales."""
        name = self._row_functions[site]
        if not self._module.implements_function(name, query_imports=True):
            return None
        function = self._module.get_function(name, query_imports=True)
        return TvmRowDecoder(function, tvm_ffi.from_dlpack, self.pool.for_rows)

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> "TvmStep":
        """See `Executor.bind`."""
        forward = {sizes: self._machine_code[pass_function(graph, *sizes)] for sizes in self._passes}
        fixed = [*(as_tensor(array) for array in states.values()), *self._weights[graph]]
        return self.make_step(forward, fixed, graph)

    def bind_batch(self, states: Sequence[Mapping[str, State]]) -> TvmBatchStep:
        """See `Batching.bind_batch`; a function of more rows runs fewer as well."""
        forward = {(size, size): self._machine_code[batch_function(size)] for size in self._batches}
        step = self.make_step(forward, self._weights[DECODER], DECODER)
        bound = [[as_tensor(array) for array in of.values()] for of in states]
        return TvmBatchStep(step, self._batches, bound, self._unread_states(states[0]))

    def make_step(self, forward: Mapping[tuple[int, int], Any], fixed: Sequence[Any], graph: str) -> "TvmStep":
        """Return what calls functions of a graph with ``fixed`` arguments last."""
        return TvmStep(self, forward, fixed, self._told[graph], counts_experts=graph == DECODER)

    def _unread_states(self, like: Mapping[str, State]) -> Sequence[Any]:
        """Return states of what fills a batch up."""
        self._unread = self._unread or [as_tensor(aligned_zeros(each.shape, each.dtype.name)) for each in like.values()]
        return self._unread


class TvmStep:
    """The library's functions with one sequence's states as arguments."""

    def __init__(
        self,
        executor: TvmExecutor,
        forward: Mapping[tuple[int, int], Any],
        fixed: Sequence[Any],
        names: Sequence[str],
        *,
        counts_experts: bool,
    ) -> None:
        """Call ``forward`` with ``fixed`` arguments last; the outputs after the logits have these names."""
        self._executor = executor
        self._forward = forward
        self._fixed = fixed
        self._names = names
        self._counts_experts = counts_experts
        self._told: Sequence[Any] = ()
        self._count: int | None = None  # tokens of the last pass that are told of, None for all
        self._buffers: dict[tuple[str, tuple[int, ...]], tuple[NDArray[Any], Any]] = {}
        self._pending: list[tuple[PendingRows, NDArray[np.float32]]] = []
        self._failure: BaseException | None = None

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """See `Step.told`."""
        values = (np.asarray(np.from_dlpack(tensor))[: self._count] for tensor in self._told)
        return dict(zip(self._names, values, strict=False))

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See `Step` and `run`; a pass that is smaller than all that were compiled is padded."""
        count, rows = len(inputs.token_ids), len(inputs.logit_rows)
        size = min(size for size, _ in self._forward if size >= count)
        if size > count:
            inputs = padded_inputs(inputs, size)
        tokens = {
            "token_ids": inputs.token_ids,
            "position": np.array([inputs.position], dtype=np.int64),
            "logit_rows": inputs.logit_rows,
        }
        after = {HIDDEN: inputs.hidden, EMBEDDINGS: inputs.embeddings}
        given = {name: values for name, values in after.items() if values is not None}
        self._count = count
        logits = self.run(tokens, inputs.rows, given)
        return logits[:rows] if size > count else logits

    def run(
        self,
        before: Mapping[str, NDArray[Any]],
        rows: Mapping[str, PendingRows],
        after: Mapping[str, NDArray[Any]],
        own: Sequence[Any] = (),
    ) -> NDArray[np.float32]:
        """Return the logits of a pass with these inputs before the rows of sites and after them, by name in order.

        Args:
            own: arguments of this pass between those and the fixed ones.

        Raises:
            ForkError: another process loaded the library.
            TargetError: threads or memory are lacking; and what waiting for rows raises.
        """
        check_process(self._executor.process)
        _running.step, self._failure = self, None
        try:
            logits, *others = self._forward_pass(before, rows, after, own)
        except RuntimeError as error:
            if self._failure is not None:
                raise self._failure from None
            raise TargetError(f"the compiled library failed: {error}") from error
        finally:
            _running.step, self._pending = None, []
        self._told = others[: len(self._names)]
        if self._counts_experts:
            self._executor.count_experts(others)
        return np.asarray(np.from_dlpack(logits), dtype=np.float32)

    def _forward_pass(
        self,
        before: Mapping[str, NDArray[Any]],
        rows: Mapping[str, PendingRows],
        after: Mapping[str, NDArray[Any]],
        own: Sequence[Any],
    ) -> Sequence[Any]:
        function = self._forward[len(before["token_ids"]), len(before["logit_rows"])]
        buffers = [self._buffer(site, pending.shape, np.float32) for site, pending in rows.items()]
        self._pending = [(pending, buffer) for pending, (buffer, _) in zip(rows.values(), buffers, strict=True)]
        arguments = (
            *(self._copy(name, values) for name, values in before.items()),
            *(tensor for _, tensor in buffers),
            *(self._copy(name, values) for name, values in after.items()),
            *own,
            *self._fixed,
        )
        with self._executor.pool.for_step():
            outputs: Sequence[Any] = function(*arguments)
        return outputs

    def fill_rows(self, site: int) -> None:
        """Wait for the rows of a site of the pass and put them into its input.

        Raises:
            RuntimeError: they can't be had; the call of the pass raises what says why.
        """
        rows, buffer = self._pending[site]
        with self.failing("rows can't be had"):
            rows.fill(buffer)

    @contextlib.contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Make a failure of what generated code calls that of the pass; it itself sees a RuntimeError."""
        try:
            yield
        except BaseException as error:  # an interrupt, too, would not find its way through the machine code
            self._failure = error
            raise RuntimeError(what) from error

    def _copy(self, name: str, values: NDArray[Any]) -> Any:
        """Copy an input into the buffer kept for it."""
        buffer, tensor = self._buffer(name, values.shape, values.dtype)
        buffer[...] = values
        return tensor

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> tuple[NDArray[Any], Any]:
        """Return the aligned buffer kept for an input, which compiled code needs, as an array and as a tensor."""
        key = (name, shape)
        if key not in self._buffers:
            buffer = aligned_zeros(shape, np.dtype(dtype).name)
            self._buffers[key] = (buffer, as_tensor(buffer))
        return self._buffers[key]


def load(bundle: Bundle, *, threads: int | None, target: str | None) -> TvmExecutor:
    """Load the library for a target, or for this machine, with its profile's number of threads unless told otherwise.

    Raises:
        TargetError: no library fits, or it may not or can't be loaded.
    """
    return open_library(bundle, *trusted_library(bundle, target), threads=threads)


def open_library(bundle: Bundle, folder: Path, info: LibraryInfo, *, threads: int | None) -> TvmExecutor:
    """Load a library that may be."""
    load_tvm_runtime(folder, info)
    threads = threads or info.threads or min(available_cores(), MOST_THREADS)
    told = {name: graph.told_outputs for name, graph in bundle.manifest.graphs.items()}
    return TvmExecutor(folder, info, bundle.manifest.tables, threads=threads, told=told)


def load_module(path: Path, sha256: str) -> Any:
    """Open a compiled library; raises TargetError where it is another one or can't be loaded."""
    with checked_code(path, sha256) as code:
        try:
            return tvm_ffi.load_module(str(code), keep_module_alive=False)  # executors hold what they use
        except (RuntimeError, OSError) as error:
            raise TargetError(f"library {path} can't be loaded: {error}; compile it again") from error


def runtime_library(folder: Path, info: LibraryInfo) -> Path:
    """Return TVM's runtime library for a compiled one: the one beside it, or the same one inside an installed tvm.

    A process that imports tvm later loads that file: the same one twice is once, a copy beside it aborts the process.
    Where there is none beside it, as no wheel has one for this kind of machine, whatever tvm is installed has to do.

    Raises:
        TargetError: there is none.
    """
    installed = _installed_runtime()
    if info.runtime is not None:
        is_twin = installed is not None and file_sha256(installed) == info.sha256["runtime"]
        return installed if installed is not None and is_twin else folder / info.runtime
    if installed is None:
        raise TargetError(
            f"library {folder} has no TVM runtime library beside it, as apache-tvm has no wheel for {info.machine}: "
            f"build {info.compiler} from source here and install it"
        )
    return installed


def _installed_runtime() -> Path | None:
    spec = importlib.util.find_spec("tvm")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "lib"
    return next(folder.glob("libtvm_runtime.*"), None)


def load_tvm_runtime(folder: Path, info: LibraryInfo) -> None:
    """Load TVM's runtime library for a compiled one into the process unless it is there already.

    Raises:
        TargetError: there is none, it isn't what was compiled, or it can't be loaded.
    """
    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is not None:
        return
    path = runtime_library(folder, info)
    with contextlib.ExitStack() as opened:
        is_own = info.runtime is not None and path == folder / info.runtime  # else a package's that is installed
        code = opened.enter_context(checked_code(path, info.sha256["runtime"])) if is_own else path
        try:
            ctypes.CDLL(str(code), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise TargetError(f"TVM's runtime {path} can't be loaded: {error}; compile the bundle again") from error


def map_weights(path: Path, info: LibraryInfo) -> list[Any]:
    """Map the packed weights, one tensor view each, and let the kernel begin to read them.

    Raises:
        BundleError: the file has another size than stated, a tensor lies outside it, or a scale, a gain or a bias is
            not a finite number.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size != info.weights_bytes:
        raise BundleError(f"{path} holds {size} bytes, expected {info.weights_bytes}; compile the bundle again")
    with path.open("rb") as file:
        # Copy-on-write: DLPack refuses read-only arrays, and no kernel writes to weights.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.madvise(mmap.MADV_WILLNEED)
    data = np.frombuffer(mapped, dtype=np.uint8)
    views = [_view(data, tensor) for tensor in info.tensors]
    for tensor, view in zip(info.tensors, views, strict=True):
        if tensor.dtype in FLOATS and view.nbytes <= MOST_CHECKED_BYTES:
            _check_finite(path, tensor, view)
    return [as_tensor(view) for view in views]


def _check_finite(path: Path, tensor: PackedTensor, values: NDArray[Any]) -> None:
    """Refuse values that aren't finite: not all of them would be seen in logits, as gates and int8 codes saturate."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum(dtype=np.float32)
    if not np.isfinite(total) and not np.isfinite(values).all():
        raise BundleError(
            f"packed tensor {tensor.name} in {path} holds numbers that are not finite; compile the bundle again"
        )


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
