"""Text to token ids and back, with the special tokens and the chat template of a bundle."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from engram_runtime.chat_limits import MAX_PROMPT_CHARS, MAX_TEMPLATE_BYTES
from engram_runtime.detokenise import TextStream, native_errors
from engram_runtime.errors import BundleError, LengthError, RequestError
from engram_runtime.strict_json import read_json_object
from engram_runtime.token_bytes import TokenBytes
from engram_runtime.tokenizer_limits import MOST_GROWN_CHARS, check_expressions, text_growth

if TYPE_CHECKING:
    from engram_runtime.chat import ChatTemplate

MAX_TOKENIZER_BYTES = 64 << 20  # tokenizer.json of a 260 000 token vocabulary is 35 MB
PART_CHARS = 32 << 10  # counted at a time, where it matters whether there are too many tokens
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextTokenizer:
    """The tokenizer of a bundle.

    ``vocab_size`` is the number of tokens that have a text; the logits of a model can be wider. ``eos_token_ids``, the
    tokens that end a text, is empty if the bundle names none. ``sampling_defaults`` are those options of
    `SamplingOptions` that the model's makers recommend.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        template_source: str | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = _special_tokens(config)
        self._template_source = template_source
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids = self._token_ids("eos_token", generation_config)
        self.bos_token_id = min(self._token_ids("bos_token", generation_config), default=None)
        self.sampling_defaults = _sampling_defaults(generation_config)
        self._token_bytes = TokenBytes(tokenizer)
        self._most_chars = min(MAX_PROMPT_CHARS, int(MOST_GROWN_CHARS / text_growth(tokenizer)))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read ``tokenizer.json`` and, where present, the other tokenizer files of a bundle."""
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        config = _read_optional_json(folder / "tokenizer_config.json")
        return cls(
            tokenizer,
            config=config,
            generation_config=_read_optional_json(folder / "generation_config.json"),
            template_source=_read_template(folder / "chat_template.jinja", config),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, most_tokens: int | None = None) -> list[int]:
        """Return the ids of a text; special tokens written out in the text become those tokens.

        Args:
            text: at most ``MAX_PROMPT_CHARS`` characters.
            add_special_tokens: let ``tokenizer.json`` add what it wants around a text, such as a BOS.
            most_tokens: how many are of use; a text of twice as many is refused while it is read, as each takes some
                two hundred bytes and a million of them a second. Fewer may still be more than these.

        Raises:
            LengthError: it has more than twice ``most_tokens``.
            RequestError: it is too long, has half of a surrogate pair, or the tokenizer can't take it.
        """
        if most_tokens is not None:
            self._require_tokens(text, most_tokens)
        return self._encode(text, add_special_tokens=add_special_tokens).ids

    def _require_tokens(self, text: str, most: int) -> None:
        """Count the tokens of a long text part by part, which adds a few where it is cut."""
        count = 0
        for start in range(0, len(text), PART_CHARS) if len(text) > PART_CHARS else ():
            count += len(self._encode(text[start : start + PART_CHARS], add_special_tokens=False))
            if count > 2 * most:
                raise LengthError(f"the prompt has more than {count} tokens, wanted at most {most}; shorten it")

    def encode_with_bytes(self, text: str) -> tuple[list[int], NDArray[np.int64]]:
        """Return the ids of a text as `encode` does, and how many bytes of its UTF-8 each of them adds.

        A character of several tokens counts at the first of them; tokens that stand for no text have none.
        """
        encoded = self._encode(text, add_special_tokens=True)
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + sum((code_points >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
        ends = np.concatenate([[0], np.cumsum(widths)])
        stops = np.array([stop for _, stop in encoded.offsets], dtype=np.int64)
        reached = np.maximum.accumulate(ends[stops])
        return encoded.ids, np.diff(reached, prepend=0)

    def _encode(self, text: str, *, add_special_tokens: bool) -> Encoding:
        if len(text) > self._most_chars:
            raise RequestError(f"the prompt has {len(text)} characters, wanted at most {self._most_chars}; shorten it")
        _require_unicode(text)
        with native_errors(RequestError, "the tokenizer can't take the prompt"):
            # As a batch, since encode() lets no other Python thread run: a second of standstill for a megabyte.
            return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None where there is none."""
        return self._tokenizer.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text; UTF-8 but for parts of a character. Empty where an id has no token."""
        return self._token_bytes(token_id)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        most_tokens: int | None = None,
    ) -> list[int]:
        """Return the ids of a chat up to where the model's answer begins; the template writes the special tokens.

        Args:
            messages, tools: see `engram_runtime.chat.ChatTemplate.render`.
            most_tokens: see `encode`.
        """
        text = self.chat_template.render(messages, tools=tools)
        return self.encode(text, add_special_tokens=False, most_tokens=most_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of a sequence; ids without a text are left out."""
        with native_errors(RequestError, "the tokenizer can't decode the tokens"):
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """Start a text that is decoded token by token and ends before a stop string."""
        return TextStream(self._tokenizer, stop)

    @cached_property
    def chat_template(self) -> "ChatTemplate":
        """The template that turns messages into a prompt; RequestError if the bundle has none."""
        if self._template_source is None:
            raise RequestError("the bundle has no chat template, so it takes no messages; give a plain prompt")
        # Here, as jinja2 takes a tenth of the time from starting Python to a first token.
        from engram_runtime.chat import ChatTemplate

        return ChatTemplate(self._template_source, self._special_tokens)

    def _token_ids(self, name: str, generation_config: Mapping[str, Any]) -> frozenset[int]:
        """Return the ids of ``eos_token`` or ``bos_token``: the generation config's, else the tokenizer config's."""
        value = generation_config.get(f"{name}_id")
        if value is not None:
            return _checked_ids(value, f"{name}_id")
        text = self._special_tokens.get(name)
        if text is None:
            return frozenset()
        token_id = self._tokenizer.token_to_id(text)
        if token_id is None:
            raise BundleError(
                f"{name} {text!r} of tokenizer_config.json is not in tokenizer.json; export the bundle again"
            )
        return frozenset({token_id})


def _read_tokenizer(path: Path) -> Tokenizer:
    text = _read_text(path, MAX_TOKENIZER_BYTES)
    check_expressions(text)
    with native_errors(BundleError, f"{path} is not a tokenizer this runtime can read"):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()  # left from training; it would cut prompts silently
        tokenizer.no_padding()
    return tokenizer


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}; export the bundle again") from error
    if len(content) > max_bytes:
        raise BundleError(f"{path} holds more than {max_bytes} bytes, the most that is allowed")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(
            f"{path} is not utf-8 text: byte {error.start} is invalid; export the bundle again"
        ) from error


def _read_optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _read_template(path: Path, config: Mapping[str, Any]) -> str | None:
    if path.exists():
        return _read_text(path, MAX_TEMPLATE_BYTES)
    source = config.get("chat_template")
    if source is not None and not isinstance(source, str):
        raise BundleError(
            f"chat_template of tokenizer_config.json is a {type(source).__name__}, wanted a string; correct the file"
        )
    return source


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the text of each special token that is set; the file has it as a string or as an object."""
    texts = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
        elif value is not None:
            raise BundleError(f"{name} of tokenizer_config.json is {value!r}, wanted a string; correct the file")
    return texts


def _checked_ids(value: object, name: str) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise BundleError(f"{name} of generation_config.json is {value!r}, wanted a token id or a list of them")
    return frozenset(ids)


def _sampling_defaults(generation_config: Mapping[str, Any]) -> Mapping[str, float]:
    given = {name: generation_config[name] for name in SAMPLING_NAMES if generation_config.get(name) is not None}
    for name, value in given.items():
        if type(value) not in (int, float):
            raise BundleError(f"{name} of generation_config.json is {value!r}, wanted a number; correct the file")
    return given


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start} of the prompt is {text[error.start]!r}, half of a surrogate pair, "
            "wanted whole characters; decode the input as utf-8"
        ) from error
