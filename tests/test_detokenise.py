"""A stream of pieces equals the decoded whole, for byte-level and sentencepiece tokenizers, up to a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from engram_runtime.detokenise import LONG_WINDOW, TextStream
from engram_runtime.errors import BundleError, RequestError

LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
STRIP_THREE = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)])
SENTENCEPIECE_DECODERS = [
    LLAMA,
    GEMMA,
    STRIP_THREE,
    decoders.Metaspace(prepend_scheme="always"),
    decoders.Metaspace(prepend_scheme="never"),
    None,
]
PIECES = ["▁", "▁▁", "▁▁▁▁", "▁a", "b", "▁▁c", "é", "\ufffd", "日", "😀", "\n", "▁<", "x▁y"]


JOINED = [b"\xe2\x82", b"\xac\xe2", b"\x98\x80a", b"\xf0\x9f", b" the", b"\n\n", b"stop", b"\xff\xfe", "日本".encode()]


def byte_level_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes; then tokens of several bytes that begin and end inside characters."""
    letters = bytes_to_letters()
    names = [letters[byte] for byte in range(256)] + ["".join(letters[byte] for byte in token) for token in JOINED]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return with_added_tokens(tokenizer)


def bytes_to_letters() -> dict[int, str]:
    """GPT-2's alphabet: printable latin letters stand for their own byte, the letters from 256 on for the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def sentencepiece_tokenizer(decoder: Any) -> Tokenizer:
    """Ids 0 to 255 are the byte tokens; the pieces follow."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + PIECES
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    if decoder is not None:
        tokenizer.decoder = decoder
    return with_added_tokens(tokenizer)


def with_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<s>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool é ▁>", normalized=False)])
    return tokenizer


BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = [sentencepiece_tokenizer(decoder) for decoder in SENTENCEPIECE_DECODERS]
ALL_TOKENIZERS = [BYTE_LEVEL, *SENTENCEPIECE]
TEXT_BYTES = st.text(max_size=6).map(lambda text: list(text.encode(errors="ignore")))


def flat(runs: list[list[int]]) -> list[int]:
    return [token_id for run in runs for token_id in run]


def token_ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Whole characters as bytes, other tokens, and ids without a text, in any order."""
    any_token = st.integers(0, tokenizer.get_vocab_size() + 2).map(lambda token_id: [token_id])
    other_token = st.integers(256, tokenizer.get_vocab_size() + 2).map(lambda token_id: [token_id])
    return st.lists(st.one_of(TEXT_BYTES, any_token, other_token), max_size=30).map(flat)


any_tokenizer_and_ids = st.sampled_from(ALL_TOKENIZERS).flatmap(lambda t: st.tuples(st.just(t), token_ids_of(t)))


def decode(tokenizer: Tokenizer, token_ids: Iterable[int]) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)


def stream_pieces(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str] = ()
) -> tuple[list[str], str | None]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token_id) for token_id in token_ids]
    return [*pieces, stream.finish()], stream.stopped


def cut_at_first_complete(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Read character by character, as a person would, until the text ends with a stop string."""
    for end in range(len(text) + 1):
        hits = [candidate for candidate in stop if text[:end].endswith(candidate)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(any_tokenizer_and_ids)
def test_pieces_add_up_to_the_decoded_whole(case: tuple[Tokenizer, list[int]]) -> None:
    tokenizer, token_ids = case
    pieces, stopped = stream_pieces(tokenizer, token_ids)
    assert "".join(pieces) == decode(tokenizer, token_ids)
    assert stopped is None


@settings(max_examples=300, deadline=None)
@given(
    any_tokenizer_and_ids,
    st.lists(st.text(alphabet="ab \ufffdé日\ny", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_text_ends_before_the_stop_string_complete_first(case: tuple[Tokenizer, list[int]], stop: list[str]) -> None:
    tokenizer, token_ids = case
    pieces, stopped = stream_pieces(tokenizer, token_ids, stop)
    assert ("".join(pieces), stopped) == cut_at_first_complete(decode(tokenizer, token_ids), stop)


@settings(max_examples=300, deadline=None)
@given(token_ids_of(BYTE_LEVEL))
def test_byte_level_holds_back_an_incomplete_character_only(token_ids: list[int]) -> None:
    stream = TextStream(BYTE_LEVEL)
    text = ""
    for count, token_id in enumerate(token_ids, start=1):
        text += stream.push(token_id)
        assert text == decode(BYTE_LEVEL, token_ids[:count]).removesuffix("\ufffd")


@settings(max_examples=300, deadline=None)
@given(token_ids_of(SENTENCEPIECE[0]))
def test_byte_tokens_are_held_back_until_another_token_follows(token_ids: list[int]) -> None:
    tokenizer = SENTENCEPIECE[0]
    stream = TextStream(tokenizer)
    text = ""
    for count, token_id in enumerate(token_ids, start=1):
        text += stream.push(token_id)
        if 256 <= token_id < 256 + len(PIECES):
            assert text == decode(tokenizer, token_ids[:count]).removesuffix("\ufffd")


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1))
def test_every_character_comes_whole_with_its_last_byte(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    pieces, _ = stream_pieces(BYTE_LEVEL, list(text.encode()))
    expected = [piece for char in text for piece in [""] * (len(char.encode()) - 1) + [char]]
    # a real U+FFFD can't be told from half a character, so it comes with the next token
    if "\ufffd" not in text:
        assert pieces == [*expected, ""]
    assert "".join(pieces) == text


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=12))
def test_invalid_bytes_decode_as_pythons_decoder_does(data: bytes) -> None:
    pieces, _ = stream_pieces(BYTE_LEVEL, list(data))
    assert "".join(pieces) == codecs.getincrementaldecoder("utf-8")("replace").decode(data, final=True)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abc", max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3))
def test_only_the_start_of_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    stream = TextStream(BYTE_LEVEL, stop)
    passed = ""
    for count, byte in enumerate(text.encode(), start=1):
        passed += stream.push(byte)
        if stream.stopped is not None:
            break
        starts = [size for size in range(count + 1) if any(s.startswith(text[count - size : count]) for s in stop)]
        assert passed == text[: count - max(starts, default=0)]


def test_a_stop_string_split_over_tokens_is_not_shown() -> None:
    stream = TextStream(BYTE_LEVEL, ["</end>"])
    assert [stream.push(byte) for byte in b"a</en"] == ["a", "", "", "", ""]
    assert [stream.push(byte) for byte in b"d>b"] == ["", "", ""]
    assert (stream.finish(), stream.stopped) == ("", "</end>")


def test_what_was_held_back_is_shown_when_it_is_no_stop_string() -> None:
    stream = TextStream(BYTE_LEVEL, ["</end>"])
    assert [stream.push(byte) for byte in b"</e</"] == ["", "", "", "</e", ""]
    assert (stream.finish(), stream.stopped) == ("</", None)


@pytest.mark.parametrize("spelling", [[b"stop"], [b"s", b"t", b"o", b"p"]])
def test_which_stop_string_ends_the_text_does_not_depend_on_the_tokens(spelling: list[bytes]) -> None:
    token_ids = [256 + JOINED.index(part) if part in JOINED else part[0] for part in spelling]
    pieces, stopped = stream_pieces(BYTE_LEVEL, token_ids, ["stop", "to", "o"])
    assert ("".join(pieces), stopped) == ("s", "to")


@pytest.mark.parametrize("num_spaces", [1, 5, 6, 7, 8, 9, 30])
def test_leading_spaces_are_stripped_once_over_many_tokens(num_spaces: int) -> None:
    strip_six = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 6, 0)])
    tokenizer = sentencepiece_tokenizer(strip_six)
    spaces, letter = 256 + PIECES.index("▁"), 256 + PIECES.index("b")
    pieces, _ = stream_pieces(tokenizer, [spaces] * num_spaces + [letter, spaces, letter])
    assert "".join(pieces) == " " * max(0, num_spaces - 6) + "b b"


def test_an_incomplete_character_becomes_one_replacement_at_the_end() -> None:
    stream = TextStream(BYTE_LEVEL)
    assert [stream.push(byte) for byte in "a😀".encode()[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_left_out_and_do_not_part_a_character() -> None:
    special = cast(int, BYTE_LEVEL.token_to_id("<|im_end|>"))
    pieces, _ = stream_pieces(BYTE_LEVEL, [0xE2, special, 0x82, 10_000, 0xAC])
    assert pieces == ["", "", "", "", "€", ""]


class CountingTokenizer:
    """Passes calls on and notes how many tokens were decoded at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded: list[int] = []

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        self.decoded.append(len(token_ids))
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("tokenizer", ALL_TOKENIZERS)
@pytest.mark.parametrize("token_ids", [[0xFF], [256, 257, 258], [256 + PIECES.index("\ufffd")], [0xE2, 0x82]])
def test_a_token_costs_the_same_however_long_the_text(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    counting = CountingTokenizer(tokenizer)
    stream = TextStream(cast(Tokenizer, counting))
    for token_id in token_ids * 1000:
        stream.push(token_id)
    assert max(counting.decoded, default=0) <= LONG_WINDOW + 1
    assert len(counting.decoded) <= 2 * len(token_ids) * 1000


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ([""], "stop string '' has 0 characters, wanted 1 to 256"),
        (["x" * 257], f"stop string '{'x' * 20}' has 257 characters, wanted 1 to 256"),
        (["x"] * 17, "there are 17 stop strings, wanted at most 16"),
    ],
)
def test_stop_strings_out_of_range_are_refused(stop: list[str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        TextStream(BYTE_LEVEL, stop)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("decoder", "step"),
    [
        (decoders.CTC(), "'type': 'CTC'"),
        (decoders.Strip(" ", 0, 1), "'stop': 1"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), "'type': 'Replace'"),
    ],
)
def test_a_decoder_that_looks_ahead_is_refused(decoder: Any, step: str) -> None:
    with pytest.raises(BundleError, match="whose text can change with later tokens") as caught:
        TextStream(sentencepiece_tokenizer(decoder))
    assert step in str(caught.value)


class BrokenTokenizer(CountingTokenizer):
    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        raise Exception("regex too deep")


def test_an_error_of_the_library_while_decoding_is_a_bundle_error() -> None:
    stream = TextStream(cast(Tokenizer, BrokenTokenizer(BYTE_LEVEL)))
    with pytest.raises(BundleError) as caught:
        stream.push(65)
    assert str(caught.value) == "tokenizer.json can't decode the tokens [65]: regex too deep"
