"""Turn tokens into text while they are generated, without broken characters, up to a stop string."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer

from engram_runtime.errors import BundleError, EngramError, RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256  # a stop string is compared with the end of the text at every token
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")  # the library's parser takes "+A" too
STREAMABLE_DECODERS = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Sequence", "Strip"}
LONG_WINDOW, SHORT_WINDOW = 8, 4  # a character has at most 4 bytes, so 4 tokens hold the start of any incomplete one


@contextmanager
def native_errors(kind: type[EngramError], problem: str) -> Iterator[None]:
    """Turn whatever the tokenizers library raises into ``kind``; wrap nothing but calls into it.

    It raises bare ``Exception`` on purpose and ``PanicException``, a ``BaseException``, by accident; a panic has
    already been printed to stderr by then.
    """
    try:
        yield
    except BaseException as error:
        panic = (type(error).__module__, type(error).__name__) == ("pyo3_runtime", "PanicException")
        if panic or isinstance(error, Exception):
            raise kind(f"{problem}: {error}") from error
        raise


class TextStream:
    """The text of a growing sequence of tokens, piece by piece.

    The pieces add up to ``tokenizer.decode(token_ids, skip_special_tokens=True)``, cut before the stop string that is
    complete first (of two that end together, the longer). Only these are held back: an incomplete character, what may
    be the start of a stop string, and byte tokens like ``<0x0A>`` until another kind of token follows, because one
    invalid byte turns all of its neighbours into U+FFFD.

    A token costs the same however long the text is: it is decoded after the few tokens before it only.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._holds_byte_tokens = _has_byte_fallback(tokenizer)
        self._special_ids = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._window: list[int] = []  # the last tokens; those before cannot change the text to come
        self._num_taken = 0  # characters of the window's text that have left it
        self._stop = _StopScanner(stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, None as long as there was none."""
        return self._stop.found

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is certain now; empty once stopped."""
        token = self._tokenizer.id_to_token(token_id)
        if self.stopped is not None or token is None or token_id in self._special_ids:
            return ""  # decode() leaves out the same tokens
        self._window.append(token_id)
        if self._holds_byte_tokens and BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._decode(self._window)
        certain = len(text) - text.endswith(REPLACEMENT)
        piece = text[self._num_taken : certain]
        self._num_taken = certain
        self._shorten_window()
        return self._stop.push(piece)

    def finish(self) -> str:
        """Return the rest of the text; what is still incomplete becomes U+FFFD."""
        piece = self._decode(self._window)[self._num_taken :]
        self._window, self._num_taken = [], 0
        return self._stop.push(piece) + self._stop.finish()

    def _decode(self, token_ids: list[int]) -> str:
        with native_errors(BundleError, f"tokenizer.json can't decode the tokens {token_ids}"):
            return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _shorten_window(self) -> None:
        """Forget old tokens, keeping enough that no decoder takes the next token for the first of a text."""
        if len(self._window) <= LONG_WINDOW:
            return
        window = self._window[-SHORT_WINDOW:]
        text = self._decode(window)
        certain = len(text) - text.endswith(REPLACEMENT)
        if certain:  # else stripping the start of the text could go on into the next token
            self._window, self._num_taken = window, certain


class _StopScanner:
    """Passes text on up to a stop string, holding back what may be the start of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(f"there are {len(stop)} stop strings, wanted at most {MAX_STOP_STRINGS}")
        for text in stop:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise RequestError(
                    f"stop string {text[:20]!r} has {len(text)} characters, wanted 1 to {MAX_STOP_CHARS}"
                )
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        if self.found is not None:
            return ""
        if not self._stop:
            return piece
        text = self._held + piece
        hits = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if hits:
            _, start, self.found = min(hits)
            self._held = ""
            return text[:start]
        num_certain = len(text) - self._longest_start_of_stop(text)
        self._held = text[num_certain:]
        return text[:num_certain]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _longest_start_of_stop(self, text: str) -> int:
        longest = min(len(text), max(map(len, self._stop)) - 1)
        ends = (text[-size:] for size in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)


def _has_byte_fallback(tokenizer: Tokenizer) -> bool:
    """Return whether tokens like ``<0x0A>`` are bytes, after checking that decoding can be done in pieces."""
    if tokenizer.decoder is None:
        return False
    steps = list(decoder_steps(json.loads(tokenizer.decoder.__getstate__())))
    joined = False  # whether a step sees the text of all tokens as one
    for step in steps:
        if step["type"] not in STREAMABLE_DECODERS or step.get("stop") or (joined and step["type"] == "Replace"):
            raise BundleError(
                f"tokenizer.json has the decoder {step}, whose text can change with later tokens; wanted steps among "
                f"{', '.join(sorted(STREAMABLE_DECODERS))} that strip nothing at the end and replace before they fuse"
            )
        joined = joined or step["type"] in {"ByteLevel", "Fuse"}
    return any(step["type"] == "ByteFallback" for step in steps)


def decoder_steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a decoder of tokenizer.json and those within it."""
    yield decoder
    for step in decoder.get("decoders", ()):
        yield from decoder_steps(step)
