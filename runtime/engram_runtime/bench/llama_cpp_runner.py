"""A GGUF file on llama.cpp, as a runner, by the low-level functions of llama-cpp-python."""

import ctypes
import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError, TargetError

SEQUENCE = 0


class LlamaCppRunner:
    """A model and a context of one sequence; see `engram_runtime.bench.runner.Runner`."""

    name = "llama.cpp"
    expert_bytes_read = experts_read = None
    weight_bytes = None
    tables: Sequence[Mapping[str, Any]] = ()

    def __init__(self, library: Any, model: Any, context: Any, log: Any) -> None:
        self._library = library
        self._context = context
        self._log = log  # kept: the library calls it
        self._memory = library.llama_get_memory(context)
        self._batch_tokens = library.llama_n_batch(context)
        self._batch = library.llama_batch_init(self._batch_tokens, 0, 1)
        self._length = 0
        self.threads = library.llama_n_threads(context)
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))

    @property
    def build(self) -> str:
        """See `Runner`."""
        return f"llama-cpp-python {version('llama-cpp-python')}, {self._library.llama_print_system_info().decode()}"

    def __len__(self) -> int:
        return self._length

    def prefill(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See `Runner`; the prompt runs in batches of the context's size."""
        for start in range(0, len(token_ids), self._batch_tokens):
            batch = token_ids[start : start + self._batch_tokens]
            self._decode(batch, first_logits=len(batch) - 1)
        last: NDArray[np.float32] = self._logits(1)[0]
        return last

    def decode(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See `Runner`; a view that the next call overwrites."""
        self._decode(token_ids, first_logits=0)
        return self._logits(len(token_ids))

    def trim(self, count: int) -> None:
        """See `Runner`."""
        start = self._length - count
        if not self._library.llama_memory_seq_rm(self._memory, SEQUENCE, start, -1):
            raise RequestError(f"llama.cpp can't forget the last {count} tokens of this model")
        self._length = start

    def profile(self, prepare: Callable[[], None], step: Callable[[], object], passes: int) -> Mapping[str, Any]:
        """Raise RequestError: there is no hook around its kernels."""
        raise RequestError("llama.cpp can't tell kernels apart; --profile is for the bundle")

    def _decode(self, token_ids: Sequence[int], *, first_logits: int) -> None:
        batch = self._batch
        batch.n_tokens = len(token_ids)
        for index, token_id in enumerate(token_ids):
            batch.token[index] = token_id
            batch.pos[index] = self._length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = SEQUENCE
            batch.logits[index] = index >= first_logits
        if code := self._library.llama_decode(self._context, batch):
            raise TargetError(f"llama_decode of {len(token_ids)} tokens after {self._length} returned {code}")
        self._length += len(token_ids)

    def _logits(self, rows: int) -> NDArray[np.float32]:
        pointer = self._library.llama_get_logits(self._context)  # waits for the computation
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size))


def load(
    name: str,
    model: str,
    *,
    threads: int,
    tables_on: bool,
    table_io: str,
    table_ram: int | None,
    positions: int,
) -> LlamaCppRunner:
    """Load a GGUF file with room for ``positions`` tokens, all else as llama.cpp has it by default; it has no tables.

    Raises:
        TargetError: llama.cpp refuses it, with the last line it said.
    """
    library = importlib.import_module("llama_cpp")  # the process of the worker has it by now
    said: list[str] = []
    log = library.llama_log_callback(lambda level, text, data: said.append(text.decode(errors="replace").strip()))
    library.llama_log_set(log, ctypes.c_void_p(0))
    library.llama_backend_init()
    loaded = library.llama_model_load_from_file(model.encode(), library.llama_model_default_params())
    if not loaded:
        raise TargetError(f"llama.cpp can't load {model}: {_last(said)}")
    parameters = library.llama_context_default_params()
    parameters.n_ctx = positions
    parameters.n_threads = parameters.n_threads_batch = threads
    context = library.llama_init_from_model(loaded, parameters)
    if not context:
        raise TargetError(f"llama.cpp can't make a context of {positions} tokens for {model}: {_last(said)}")
    return LlamaCppRunner(library, loaded, context, log)


def _last(said: Sequence[str]) -> str:
    return next((line for line in reversed(said) if line), "it doesn't say why")
