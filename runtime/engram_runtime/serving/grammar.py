"""Texts that follow a grammar: which tokens may come next, by llguidance."""

import importlib
import threading
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError, TargetError

MAX_GRAMMAR_CHARS = 64 << 10  # a constant as long as that takes 0.1 s a token, in which all texts wait
MAX_ERROR_CHARS = 300  # of what llguidance says, which may quote the grammar
MAX_SYMBOLS = 50_000  # in productions; a schema of a thousand properties has fewer
FORBIDDEN = np.finfo(np.float32).min  # not minus infinity: samplers refuse logits that aren't finite


def _llguidance() -> ModuleType:
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError as error:
        raise TargetError("a grammar needs llguidance: pip install 'engram-edge[serve]'") from error


class Guide:
    """How far a text has come in its grammar; takes what llguidance's matcher says."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)

    @property
    def ended(self) -> bool:
        """Whether nothing can come after the text so far."""
        return bool(self._matcher.is_stopped())

    def restrict(self, logits: NDArray[np.float32]) -> None:
        """Make what can't come next all but impossible in ``logits [V]``.

        Raises:
            RequestError: the grammar takes more work than is allowed.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
        logits[allowed == 0] = FORBIDDEN
        logits[len(allowed) :] = FORBIDDEN

    def push(self, token_id: int) -> None:
        """Go on with a token that can come next.

        Raises:
            RequestError: as for `restrict`.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar can't be followed: {_first_line(self._matcher.get_error())}")


class Grammars:
    """What grammars are about: the tokens of a bundle. Usable from any thread."""

    def __init__(self, tokenizer_file: Path, end_ids: Collection[int]) -> None:
        """Read ``tokenizer.json`` when the first grammar comes; a text that a grammar accepts may end with these."""
        self._file = tokenizer_file
        self._end_ids = sorted(end_ids)
        self._lock = threading.Lock()
        self._tokens: Any = None

    def guide(self, grammar: str) -> Guide:
        """Begin a text.

        Raises:
            RequestError: the grammar is too large or has an error, or the bundle's tokenizer can't be used with one.
            TargetError: llguidance isn't installed.
        """
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise RequestError(
                f"the grammar has {len(grammar)} characters, wanted at most {MAX_GRAMMAR_CHARS}; simplify it"
            )
        llguidance, tokens = _llguidance(), self._loaded()
        limits = llguidance.LLParserLimits(max_grammar_size=MAX_SYMBOLS, verbose_errors=False)
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"the grammar has an error: {_first_line(matcher.get_error())}")
        return Guide(matcher, tokens.vocab_size)

    def _loaded(self) -> Any:
        with self._lock:
            if self._tokens is None:
                text = self._file.read_text(encoding="utf-8")
                try:
                    self._tokens = _llguidance().LLTokenizer(text, eos_token=self._end_ids or None)
                except ValueError as error:
                    raise RequestError(f"grammars can't be used with this bundle's tokenizer: {error}") from error
            return self._tokens


def _first_line(message: str) -> str:
    line = message.strip().partition("\n")[0]
    return line if len(line) <= MAX_ERROR_CHARS else f"{line[:MAX_ERROR_CHARS]}..."
