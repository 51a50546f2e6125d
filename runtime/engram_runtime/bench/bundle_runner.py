"""A bundle on one of the executors, as a runner."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bench.continuations import Continuation
from engram_runtime.bench.kernel_times import kernel_times
from engram_runtime.bundle import Bundle
from engram_runtime.drafting.opening import Decoding, open_decoding
from engram_runtime.drafting.options import NONE, DraftOptions
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.executor import Executor, added, load_executor
from engram_runtime.library import Compiled
from engram_runtime.manifest import DECODER
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.session import Session
from engram_runtime.tables.options import TableOptions
from engram_runtime.tokenizer import TextTokenizer

TVM = "tvm"
GREEDY = SamplingOptions()
ROTATIONS, EMBEDDING, HEAD, EXPERTS = "rotations.", "embedding.", "lm_head.", ".experts."


class BundleRunner:
    """A session, and what its executor reads; see `engram_runtime.bench.runner.Runner`."""

    def __init__(self, bundle: Bundle, executor: Executor, session: Session) -> None:
        self.name = executor.name
        self.threads = executor.threads
        self.vocab_size = bundle.manifest.model.vocab_size
        self._bundle = bundle
        self._executor = executor
        self._session = session
        self._decodings: dict[DraftOptions, Decoding] = {}

    @property
    def build(self) -> str:
        """See `Runner`."""
        own = f"engram-edge {version('engram-edge')}"
        if not isinstance(self._executor, Compiled):
            return f"{own}, {self.name} {version(self.name)}"
        library = self._executor.info
        return f"{own}, library {library.target} by {library.compiler}"

    @property
    def weight_bytes(self) -> int | None:
        """See `Runner`."""
        if not isinstance(self._executor, Compiled):
            return None
        library = self._executor.info
        used = [library.tensors[place] for place in library.graph_tensors[DECODER]]
        return weight_bytes_of_a_token({each.name: each.end - each.offset for each in used})

    @property
    def tables(self) -> Sequence[Mapping[str, Any]]:
        """See `Runner`."""
        return [choice.figures() for choice in self._session.tables]

    @property
    def expert_bytes_read(self) -> int | None:
        """See `Runner`."""
        return self._executor.expert_bytes_read

    @property
    def experts_read(self) -> int | None:
        """See `Runner`."""
        return self._executor.experts_read

    def __len__(self) -> int:
        return len(self._session)

    def prefill(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See `Runner`."""
        return self._session.prefill(token_ids)

    def decode(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See `Runner`."""
        return self._session.decode(token_ids)

    def trim(self, count: int) -> None:
        """See `Runner`; what has to be computed again is, so that nothing of it is timed."""
        self._session.trim(count)
        self._session.catch_up()

    def go_on(self, prompt: str, *, prompt_tokens: int, tokens: int, drafts: DraftOptions) -> Continuation:
        """See `engram_runtime.bench.continuations.Continuing`; a schedule of drafts goes on from text to text."""
        if drafts not in self._decodings:
            self._decodings[drafts] = open_decoding(self._bundle, self._executor, drafts)
        decode, ends = self._decodings[drafts], self._tokenizer.eos_token_ids
        self._session.trim(len(self._session))
        logits = self._session.prefill(self._tokenizer.encode(prompt)[:prompt_tokens])
        experts = self.experts_read
        made, statistics = decode(self._session, logits, make_sampler(GREEDY), max_tokens=1 + tokens, end_ids=ends)
        first = next(made)
        started = time.perf_counter()
        others = tuple(made)
        seconds = time.perf_counter() - started
        self._session.trim(len(self._session))  # the other measurements are of another text
        return Continuation(
            token_ids=(first, *others),
            seconds=seconds,
            drafts=statistics or DraftStatistics(drafter=NONE, forwards=len(others), tokens=len(others)),
            experts=added(experts, self.experts_read),
        )

    @functools.cached_property
    def _tokenizer(self) -> TextTokenizer:
        return TextTokenizer.load(self._bundle.path)

    def profile(self, prepare: Callable[[], None], step: Callable[[], object], passes: int) -> Mapping[str, Any]:
        """See `Runner`; raises RequestError where the executor can't tell kernels apart."""
        return kernel_times(self._executor, prepare, step, passes)


def load(
    name: str,
    model: str,
    *,
    threads: int | None,
    target: str | None = None,
    tables_on: bool,
    table_io: str,
    table_ram: int | None,
    positions: int,
) -> BundleRunner:
    """Load a bundle on the executor of that name; its context is the bundle's own, whatever ``positions`` are needed.

    Raises:
        EngramError: as `engram_runtime.executor.load_executor` and `Session.open`.
    """
    bundle = Bundle.open(Path(model))
    executor = load_executor(name, bundle, threads=threads, target=target)
    options = TableOptions(io=table_io, ram_bytes=table_ram)
    return BundleRunner(bundle, executor, Session.open(bundle, executor, options=options, tables_on=tables_on))


def weight_bytes_of_a_token(tensors: Mapping[str, int]) -> int:
    """Sum the bytes of the tensors a token reads whole: not the rows of embeddings and rotations, and not experts."""
    head = any(name.startswith(HEAD) for name in tensors)  # without one the embedding is the head
    skipped = (ROTATIONS, EMBEDDING) if head else (ROTATIONS,)
    return sum(size for name, size in tensors.items() if not name.startswith(skipped) and EXPERTS not in name)
