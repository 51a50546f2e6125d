"""Executor on onnxruntime's CPU provider: the graph as it was exported, states bound in place."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.cpu import available_cores
from engram_runtime.errors import BundleError, RequestError, TargetError
from engram_runtime.executor import State, StepInputs
from engram_runtime.forking import check_process
from engram_runtime.manifest import DECODER, EMBEDDINGS, HIDDEN, ROWS
from engram_runtime.onnx_places import check_places

try:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
except ModuleNotFoundError as error:
    raise TargetError("the onnxruntime executor needs onnxruntime: pip install 'engram-edge[ort]'") from error

REFUSALS = (
    ort_state.EngineError,  # of a file that the system fails to open or map
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
    RuntimeError,
    UnicodeDecodeError,  # its message quotes a name that isn't UTF-8
)
MAX_CHUNK_TOKENS = 256  # bounds the memory of activations during prefill


class OnnxRuntimeExecutor:
    """Sessions of onnxruntime over a bundle's graphs."""

    name = "onnxruntime"
    expert_bytes_read = experts_read = None
    float16_states = ()

    def __init__(self, open_graph: "Callable[[str], ort.InferenceSession]", threads: int) -> None:
        """Open the decoder; ``open_graph`` is called once for the name of each graph that is bound."""
        self._session = functools.cache(open_graph)
        self._session(DECODER)
        self._process = os.getpid()
        self.threads = threads

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        """See `Executor.chunks`; any size runs, so only the last one is smaller."""
        full, rest = divmod(count, MAX_CHUNK_TOKENS)
        return [MAX_CHUNK_TOKENS] * full + [rest] * (rest > 0)

    def row_decoder(self, site: str) -> None:
        """See `Executor.row_decoder`: nothing is compiled here."""

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> "OnnxRuntimeStep":
        """See `Executor.bind`."""
        return OnnxRuntimeStep(self._session(graph), states, self._process)


class OnnxRuntimeStep:
    """The session with one sequence's states as inputs and, the same memory, as outputs."""

    def __init__(self, session: "ort.InferenceSession", states: Mapping[str, State], process: int) -> None:
        """Bind the session, which belongs to a process."""
        self._session = session
        self._process = process
        self._binding = session.io_binding()
        others = {"logits", *(f"next.{name}" for name in states)}
        self._names = [output.name for output in session.get_outputs() if output.name not in others]
        self._told: Sequence[ort.OrtValue] = ()
        self._states = [ort.OrtValue.ortvalue_from_numpy(array) for array in states.values()]
        for name, value in zip(states, self._states, strict=True):
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(f"next.{name}", value)

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """See `Step.told`."""
        return {name: value.numpy() for name, value in zip(self._names, self._told, strict=False)}

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See `Step`."""
        check_process(self._process)
        binding = self._binding
        binding.bind_cpu_input("token_ids", inputs.token_ids)
        binding.bind_cpu_input("position", np.array([inputs.position], dtype=np.int64))
        binding.bind_cpu_input("logit_rows", inputs.logit_rows)
        for site, rows in inputs.rows.items():
            filled = np.empty(rows.shape, dtype=np.float32)
            rows.fill(filled)
            binding.bind_cpu_input(f"{ROWS}{site}", filled)
        if inputs.hidden is not None:
            binding.bind_cpu_input(HIDDEN, np.ascontiguousarray(inputs.hidden))
        if inputs.embeddings is not None:
            binding.bind_cpu_input(EMBEDDINGS, inputs.embeddings)
        for name in ("logits", *self._names):
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except REFUSALS as error:
            raise BundleError(f"onnxruntime {ort.__version__} can't run the graph: {error}") from error
        logits, *self._told = binding.get_outputs()[len(self._states) :]
        values: NDArray[np.float32] = logits.numpy()
        return values


def load(bundle: Bundle, *, threads: int | None, target: str | None) -> OnnxRuntimeExecutor:
    """Open a bundle's decoder, and its other graphs when they are bound, with a thread per CPU unless told otherwise.

    Raises:
        BundleError: onnxruntime refuses the graph.
        RequestError: a target, whose library is not for onnxruntime.
    """
    if target is not None:
        raise RequestError(f"target {target!r} picks a compiled library, which onnxruntime doesn't run; leave it out")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.log_severity_level = 3

    def open_graph(name: str) -> "ort.InferenceSession":
        graph = bundle.manifest.graph(name)
        path = bundle.graph_file(graph.file)
        check_places(path, bundle.graph_file(graph.weights))
        try:
            # A second try, which would print that it is one, ends as the first did.
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
        except REFUSALS as error:
            raise BundleError(f"onnxruntime {ort.__version__} refuses {path}: {error}") from error

    return OnnxRuntimeExecutor(open_graph, options.intra_op_num_threads)
