"""Row ids of whole texts, cut into calls of any size, equal the equation in plain integers: no mismatch in any."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.test_hashing import DEEPSEEK_VOCAB, as_ids, deepseek_keyer, smollm2_keyer
from tests.test_manifest import sound_manifest

from engram_runtime.bundle import Bundle
from engram_runtime.hashing import INT64_MAX, column_offsets, derive_primes, derive_splitmix_multipliers
from engram_runtime.keyer_digest import keyer_digest
from engram_runtime.keyer_spec import KeyerSpec, NgramKeyerSpec, TokenKeyerSpec
from engram_runtime.keyers import NO_ROW, Keyer, NgramKeyer, TokenKeyer
from engram_runtime.manifest import Manifest

QWEN_VOCAB, QWEN_EOS = 248_320, 248_044
BIG_VOCAB = 300_000
CALL_SIZES = [1, 2, 4, 7, 8, 9, 16, 100]  # both sides of where the way of hashing changes
SPECIAL = [0, 1, 2, 3]  # ids texts are full of; some are barriers or silent


def smollm2() -> NgramKeyer:
    return dataclasses.replace(smollm2_keyer(), barrier_ids=as_ids([2]))


def deepseek() -> NgramKeyer:
    """DeepSeek's hash with a map of its tokens and its rule for dead ones: no row, and nothing is seen across them."""
    token_map = np.random.default_rng(0).integers(0, DEEPSEEK_VOCAB, 129_280)
    return dataclasses.replace(
        deepseek_keyer(14), token_map=token_map, barrier_ids=as_ids([0, 3]), silent_ids=as_ids([0, 3])
    )


def qwen() -> NgramKeyer:
    (primes,) = derive_primes(layers=1, rows_per_head=[20_000_000] * 2, num_heads=8)
    return NgramKeyer(
        orders=(2, 3),
        num_heads=8,
        multipliers=derive_splitmix_multipliers(vocab_size=QWEN_VOCAB, max_order=3, layer_index=0),
        primes=primes,
        offsets=column_offsets(primes),
        pad_id=QWEN_EOS,
        barrier_ids=as_ids([QWEN_EOS]),
        silent_ids=as_ids([]),
        token_map=None,
    )


def extreme() -> NgramKeyer:
    """A hash of single tokens up to 6, 48 columns, primes about 2**41 and products up to 2**63 - 1."""
    largest = INT64_MAX // (BIG_VOCAB - 1)
    (primes,) = derive_primes(layers=1, rows_per_head=[2**41, 2**40, 3, 2**31], num_heads=12)
    return NgramKeyer(
        orders=(1, 2, 3, 6),
        num_heads=12,
        multipliers=as_ids([largest, largest - 2, 1, largest - 4, 3, largest]),
        primes=primes,
        offsets=column_offsets(primes),
        pad_id=BIG_VOCAB - 1,
        barrier_ids=as_ids([1, 2]),
        silent_ids=as_ids([2, 3]),
        token_map=None,
    )


def per_layer_inputs() -> TokenKeyer:
    return TokenKeyer(vocab_size=1000, pad_id=7)


VOCABULARIES = {
    smollm2: 49_152,
    deepseek: 129_280,
    qwen: QWEN_VOCAB,
    extreme: BIG_VOCAB,
    per_layer_inputs: 1_100,
}
KEYERS = [pytest.param(make(), vocab, id=make.__name__) for make, vocab in VOCABULARIES.items()]


def text_of(length: int, vocab: int, seed: int) -> list[int]:
    """Return a random text, half of it special tokens and the largest ids."""
    rng = np.random.default_rng(seed)
    often = rng.choice([*SPECIAL, QWEN_EOS % vocab, vocab - 1], length)
    text: list[int] = np.where(rng.random(length) < 0.5, often, rng.integers(0, vocab, length)).tolist()
    return text


def stated(keyer: Keyer, text: Sequence[int], position: int) -> list[int]:
    """row = (x_0 m_0 xor ... xor x_(n-1) m_(n-1)) mod prime + offset in plain integers, x_k the id k tokens back."""
    if isinstance(keyer, TokenKeyer):
        return [text[position] if text[position] < keyer.vocab_size else keyer.pad_id]
    assert isinstance(keyer, NgramKeyer)
    if text[position] in keyer.silent_ids.tolist():
        return [NO_ROW] * keyer.columns
    visible = position
    while visible > 0 and position - visible < keyer.context and text[visible - 1] not in keyer.barrier_ids.tolist():
        visible -= 1
    seen = text[visible : position + 1][::-1]
    ids = seen if keyer.token_map is None else [int(keyer.token_map[token]) for token in seen]
    ids = [*ids, *[keyer.pad_id] * keyer.context]
    rows = []
    for column, (prime, offset) in enumerate(zip(keyer.primes.tolist(), keyer.offsets.tolist(), strict=True)):
        mixed = 0
        for back in range(keyer.orders[column // keyer.num_heads]):
            mixed ^= ids[back] * int(keyer.multipliers[back])
        rows.append(mixed % prime + offset)
    return rows


def in_calls(keyer: Keyer, text: Sequence[int], sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return the row ids of a text given in calls of these sizes, and the rest in one."""
    rows, start = [], 0
    for size in [*sizes, len(text)]:
        rows.append(keyer.row_ids(text[:start], as_ids(list(text[start : start + size]))))
        start = min(start + size, len(text))
    return np.concatenate(rows)


@pytest.mark.parametrize(("keyer", "vocab"), KEYERS)
@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(0, 60), seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.sampled_from(CALL_SIZES), max_size=20)
)
def test_row_ids_of_any_calls_are_those_of_plain_integers(
    keyer: Keyer, vocab: int, length: int, seed: int, sizes: list[int]
) -> None:
    text = text_of(length, vocab, seed)
    assert in_calls(keyer, text, sizes).tolist() == [stated(keyer, text, position) for position in range(length)]


@pytest.mark.parametrize(("keyer", "vocab"), KEYERS)
@pytest.mark.parametrize("sizes", [[], [1], [2048], [5, 700, 3, 1, 1]], ids=str)
def test_row_ids_of_chunks_of_thousands_are_those_of_plain_integers(keyer: Keyer, vocab: int, sizes: list[int]) -> None:
    text = text_of(3000, vocab, 0)
    assert in_calls(keyer, text, sizes).tolist() == [stated(keyer, text, position) for position in range(3000)]


@pytest.mark.parametrize(("keyer", "vocab"), KEYERS)
def test_one_token_at_a_time_gives_the_row_ids_of_all_at_once(keyer: Keyer, vocab: int) -> None:
    text = text_of(500, vocab, 1)
    np.testing.assert_array_equal(in_calls(keyer, text, [1] * 500), in_calls(keyer, text, []), strict=True)


@pytest.mark.parametrize(("keyer", "vocab"), KEYERS)
@pytest.mark.parametrize("count", [1, 20])
def test_row_ids_are_a_fresh_array(keyer: Keyer, vocab: int, count: int) -> None:
    ids = as_ids(text_of(count, vocab, 2))
    expected = keyer.row_ids([], ids).copy()
    keyer.row_ids([], ids)[...] = NO_ROW
    np.testing.assert_array_equal(keyer.row_ids([], ids), expected, strict=True)


NGRAMS = NgramKeyerSpec(
    orders=(2,), num_heads=1, multipliers=(3, 5), primes=(7,), offsets=(0,), pad_id=1, barrier_ids=(2,), token_map="map"
)
NGRAMS_AS_JSON = (
    '{"barrier_ids":[2],"kind":"xor_prime","multipliers":[3,5],"num_heads":1,"offsets":[0],"orders":[2],'
    '"pad_id":1,"primes":[7],"silent_ids":[]}'
)


@pytest.mark.parametrize(
    ("spec", "hashed"),
    [
        (TokenKeyerSpec(vocab_size=9, pad_id=1), '{"kind":"token","pad_id":1,"vocab_size":9}'),
        (NGRAMS, f"{NGRAMS_AS_JSON}bytes of the map"),
        (dataclasses.replace(NGRAMS, token_map=None), NGRAMS_AS_JSON),
    ],
)
def test_files_made_for_a_keyer_know_it_for_ever(tmp_path: Path, spec: KeyerSpec, hashed: str) -> None:
    """Overlays and traces hold this digest: with another spelling none of those written so far would fit."""
    (tmp_path / "map").write_text("bytes of the map")
    bundle = Bundle(tmp_path, Manifest.from_dict(sound_manifest()))
    assert keyer_digest(bundle, spec) == hashlib.sha256(hashed.encode()).hexdigest()
