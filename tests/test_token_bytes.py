"""A token's bytes are those that it adds to a text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import END_OF_TEXT, VOCAB, save_tokenizer
from tokenizers import Tokenizer, decoders, models

from engram_runtime.token_bytes import TokenBytes
from engram_runtime.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return TextTokenizer.load(folder)


@given(text=st.text())
def test_the_tokens_of_a_text_have_its_bytes(tokenizer: TextTokenizer, text: str) -> None:
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_special_tokens_are_spelled_and_unknown_ids_are_empty(tokenizer: TextTokenizer) -> None:
    assert tokenizer.token_bytes(min(tokenizer.eos_token_ids)) == END_OF_TEXT.encode()
    assert tokenizer.token_bytes(VOCAB) == b""


@pytest.mark.parametrize(("token", "expected"), [("\u2581tide", b" tide"), ("<0x0A>", b"\n"), ("<0xE6>", b"\xe6")])
def test_sentencepiece_s_spaces_and_bytes_are_what_they_stand_for(token: str, expected: bytes) -> None:
    model = Tokenizer(models.BPE(vocab={token: 0}, merges=[]))
    model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert TokenBytes(model)(0) == expected
