"""A bundle ready to generate: the Python API most callers need."""

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.drafting.opening import open_decoding, recorded
from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.errors import NumericError, RequestError
from engram_runtime.executor import added, load_executor
from engram_runtime.generation import Generation, GrowingText
from engram_runtime.parallel.beam import Beam, beam_search
from engram_runtime.parallel.samples import Sample, draw_samples, seeded
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.sequences import common_length
from engram_runtime.session import Session
from engram_runtime.tables.opening import AUTO_OPTIONS, Announce, silently
from engram_runtime.tables.options import TableOptions
from engram_runtime.tables.policy import TableChoice
from engram_runtime.tokenizer import TextTokenizer
from engram_runtime.tracing.recorder import Recorder
from engram_runtime.trust.levels import LOCALLY, Trust

DEFAULT_MAX_TOKENS = 256
GREEDY = SamplingOptions()


class LLM:
    """A loaded bundle with one sequence; what a new prompt shares with the last one is not computed again.

    Use it from any thread, one at a time, and close it, best by ``with``. A request ends the streams that are still
    open: going on with one of them is a RequestError, closing it changes nothing.
    """

    def __init__(
        self,
        bundle: str | Path,
        executor: str = "tvm",
        *,
        threads: int | None = None,
        target: str | None = None,
        tables_on: bool = True,
        tables: TableOptions = AUTO_OPTIONS,
        drafts: DraftOptions = NO_DRAFTS,
        announce: Announce = silently,
        trust: Trust = LOCALLY,
    ) -> None:
        """Open and load a bundle.

        Args:
            executor: ``tvm`` or ``onnxruntime``.
            threads: worker threads, or None for what the target profile says, else one per core.
            target: whose compiled library runs, or None for the CPU's that fits this machine best.
            tables_on: False feeds zero rows, with which Engram sites add nothing; see `Session`.
            tables: how they are read, if they are.
            drafts: who drafts tokens that a forward pass verifies, several at once; the text stays the same, unless
                they are asked for unverified. Samples and beams are drawn without.
            announce: see `engram_runtime.session.open_sites`.
            trust: what is asked of who made the bundle and its library.

        Raises:
            BundleError: the bundle or an overlay is damaged, or the overlay is for another table.
            TargetError: the executor can't run it on this machine, or may not.
            RequestError: no such executor, not a positive number of threads, no room for resident tables, or no head
                or mask to draft with.
        """
        self.bundle = Bundle.open(Path(bundle), trust)
        self.executor = load_executor(executor, self.bundle, threads=threads, target=target)
        self._decoding = open_decoding(self.bundle, self.executor, drafts)
        self.session = Session.open(self.bundle, self.executor, options=tables, tables_on=tables_on, announce=announce)
        self._tokenizer: TextTokenizer | None = None
        self.last: Generation | None = None

    @property
    def tables(self) -> Sequence[TableChoice]:
        """How each table is read and why, in the manifest's order; none with tables off."""
        return self.session.tables

    @property
    def tokenizer(self) -> TextTokenizer:
        """The bundle's tokenizer, loaded when first needed."""
        if self._tokenizer is None:
            self._tokenizer = TextTokenizer.load(self.bundle.path)
        return self._tokenizer

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: SamplingOptions = GREEDY,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Continue a prompt, text or token ids, to its end.

        Raises:
            RequestError: an empty prompt, one beyond the context, or an id outside the vocabulary.
            TableError: a table's file no longer holds its rows; what can be read is served as before.
            NumericError: a logit is not a finite number.
        """
        for _ in self.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop):
            pass
        assert self.last is not None
        return self.last

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: SamplingOptions = GREEDY,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield pieces of text as they become certain; `last` holds the whole generation afterwards.

        Raises:
            RequestError, TableError: as for `generate`.
        """
        text = GrowingText(self.tokenizer, stop, max_tokens)
        counters = self.session.counters
        started = time.perf_counter()
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        logits, computed = self._prefill(prompt_ids)
        first = last = prefilled = time.perf_counter()
        experts = self.executor.experts_read
        tokens, drafts = self._decoding(
            self.session,
            logits,
            make_sampler(sampling),
            max_tokens=max_tokens,
            end_ids=self.tokenizer.eos_token_ids,
        )
        with contextlib.closing(tokens), self._forgetting_numbers():
            for token_id in tokens:
                last = time.perf_counter()
                first = first if text.token_ids else last
                if piece := text.push(token_id):
                    yield piece
                if text.stopped:
                    break
        if rest := text.finish():
            yield rest
        self.last = Generation(
            text=text.text,
            token_ids=tuple(text.token_ids),
            finish_reason=text.finish_reason or "context",
            prompt_tokens=len(prompt_ids),
            prefilled_tokens=computed,
            prefill_s=prefilled - started,
            ttft_s=first - started,
            decode_s=last - first,
            tables={site: now - counters[site] for site, now in self.session.counters.items()},
            drafts=drafts,
            experts=added(experts, self.executor.experts_read),
        )

    def record(self, recorder: Recorder) -> None:
        """Have what runs from now on recorded; see `engram_runtime.tracing`. Samples and beams only in part."""
        self.session.record(recorder)
        self._decoding = recorded(self._decoding, recorder)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: SamplingOptions = GREEDY,
    ) -> Iterator[str]:
        """Yield pieces of the answer to a conversation, each message with ``role`` and ``content``."""
        prompt_ids = self.tokenizer.encode_chat(messages)
        return self.stream(prompt_ids, max_tokens=max_tokens, sampling=sampling)

    def samples(
        self,
        prompt: str | Sequence[int],
        count: int,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: SamplingOptions,
        stop: Sequence[str] = (),
    ) -> Generator[Sample, None, None]:
        """Yield ``count`` continuations of a prompt as they finish, drawn together; nothing else is to be asked before.

        Sample i has the tokens that `generate` draws with the seed ``sampling.seed + i``. See `best_of` and `vote`.

        Raises:
            RequestError, TableError: as for `generate`, no sample, or several at temperature 0.
        """
        if max_tokens < 1:
            raise RequestError(f"max_tokens is {max_tokens}, expected at least 1")
        each = seeded(sampling, count)
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        logits, _ = self._prefill(prompt_ids)
        yield from draw_samples(self.session, logits, self.tokenizer, each, max_tokens=max_tokens, stop=stop)

    def beam_search(
        self,
        prompt: str | Sequence[int],
        width: int,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        length_penalty: float = 1.0,
    ) -> list[Beam]:
        """Return the likeliest continuations of a prompt that a beam search finds, the best first.

        Raises:
            RequestError, TableError: as for `generate`, or an option out of range.
        """
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        logits, _ = self._prefill(prompt_ids)
        return beam_search(
            self.session,
            logits,
            width=width,
            max_tokens=max_tokens,
            end_ids=self.tokenizer.eos_token_ids,
            length_penalty=length_penalty,
        )

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return ``[T, V]`` logits after each of ``token_ids``, run as a new sequence."""
        self.session.trim(len(self.session))
        return np.concatenate(list(self.session.logits(token_ids)))

    def _prefill(self, prompt_ids: Sequence[int]) -> tuple[NDArray[np.float32], int]:
        """Make the session hold the prompt; returns logits ``[V]`` and how many tokens were computed."""
        shared = common_length(self.session.token_ids, prompt_ids[:-1])
        again = self.session.trim(len(self.session) - shared)
        return self.session.prefill(prompt_ids[shared:]), again + len(prompt_ids) - shared

    @contextlib.contextmanager
    def _forgetting_numbers(self) -> Iterator[None]:
        """Have the next prompt computed anew where what this one computed is no numbers."""
        try:
            yield
        except NumericError:
            self.session.trim(len(self.session))
            raise

    def close(self) -> None:
        """Close the tables."""
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
