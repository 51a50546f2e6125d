"""Row ids equal the published equations in plain integers, and the published constants come out of the rules."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.reference import row_ids
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextConfig, Qwen4ExpTextNGramEmbedding

from engram_runtime.hashing import (
    INT64_MAX,
    column_offsets,
    derive_multipliers,
    derive_primes,
    derive_splitmix_multipliers,
)
from engram_runtime.keyers import NO_ROW, NgramKeyer, TokenKeyer

SMOLLM2 = Path(__file__).parents[1] / "assets" / "smollm2-engram"

# DeepSeek-V4.1-Flash: layers 1 and 14, orders 2 to 4, 8 heads, 99,092 compressed ids.
DEEPSEEK_LAYERS = (1, 14)
DEEPSEEK_VOCAB = 99_092
DEEPSEEK_MULTIPLIERS = {
    1: [76632096046245, 4839876093313, 35959672319349, 73987337458391],
    14: [67716810739261, 51510806800915, 30921347202721, 82619226485591],
}
DEEPSEEK_PRIMES = {
    1: [
        *(16000057, 16000079, 16000081, 16000097, 16000121, 16000129, 16000133, 16000183),
        *(16000189, 16000207, 16000211, 16000253, 16000277, 16000289, 16000307, 16000321),
        *(16000339, 16000381, 16000393, 16000399, 16000403, 16000409, 16000447, 16000463),
    ],
    14: [
        *(16000477, 16000487, 16000499, 16000507, 16000511, 16000573, 16000609, 16000627),
        *(16000667, 16000669, 16000693, 16000697, 16000711, 16000729, 16000759, 16000769),
        *(16000781, 16000799, 16000813, 16000819, 16000841, 16000877, 16000879, 16000889),
    ],
}
DEEPSEEK_ROWS = {1: 384_006_168, 14: 384_016_682}
DEEPSEEK_LAST_OFFSET = {1: 368_005_705, 14: 368_015_793}
# Row ids of the already compressed tokens 5, 6, 7, 8 with pad 2: layer, token, columns, rows.
DEEPSEEK_VECTORS = [
    (1, 3, [0, 1, 2], [11754974, 24210124, 42797160]),
    (1, 3, [8, 9], [143641730, 148232863]),
    (1, 3, [16, 17], [259287126, 280637906]),
    (1, 3, [23], [371888815]),
    (14, 0, [0, 1, 2], [6939818, 27264717, 45254833]),
    (14, 0, [23], [382274687]),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class HashedText:
    """A hash in plain integers, and the tokens it is given."""

    orders: list[int]
    num_heads: int
    multipliers: list[int]
    primes: list[int]
    pad_id: int
    barrier_ids: list[int]
    silent_ids: list[int]
    token_map: list[int] | None
    token_ids: list[int]

    def offsets(self) -> list[int]:
        return [sum(self.primes[:column]) for column in range(len(self.primes))]

    def keyer(self) -> NgramKeyer:
        return NgramKeyer(
            orders=tuple(self.orders),
            num_heads=self.num_heads,
            multipliers=np.array(self.multipliers, dtype=np.int64),
            primes=np.array(self.primes, dtype=np.int64),
            offsets=np.array(self.offsets(), dtype=np.int64),
            pad_id=self.pad_id,
            barrier_ids=as_ids(self.barrier_ids),
            silent_ids=as_ids(self.silent_ids),
            token_map=None if self.token_map is None else np.array(self.token_map, dtype=np.int64),
        )

    def rows_by_definition(self) -> list[list[int]]:
        """row = (x_0 m_0 xor ... xor x_{n-1} m_{n-1}) mod prime + offset, x_k the id k tokens back.

        x_k is the pad where there is no such token, and where it or one between it and the current token is a barrier.
        """
        ids = self.token_ids if self.token_map is None else [self.token_map[token] for token in self.token_ids]
        rows = []
        for position, token in enumerate(self.token_ids):
            if token in self.silent_ids:
                rows.append([NO_ROW] * len(self.primes))
                continue
            mixed = [0]
            for back, multiplier in enumerate(self.multipliers):
                between = self.token_ids[max(0, position - back) : position]
                hidden = position < back or set(between) & set(self.barrier_ids)
                mixed.append(mixed[-1] ^ (self.pad_id if hidden else ids[position - back]) * multiplier)
            sums = [mixed[order] for order in self.orders for _ in range(self.num_heads)]
            rows.append([h % p + o for h, p, o in zip(sums, self.primes, self.offsets(), strict=True)])
        return rows


@st.composite
def hashed_texts(draw: st.DrawFn) -> HashedText:
    """Hashes whose products reach up to 2**63 - 1, and texts both shorter and longer than an n-gram."""
    orders = sorted(draw(st.sets(st.integers(1, 6), min_size=1, max_size=4)))
    num_heads = draw(st.integers(1, 4))
    columns = len(orders) * num_heads
    distinct = draw(st.integers(1, 200_000))
    largest = distinct - 1
    ids = st.integers(0, largest) | st.just(largest)
    multipliers = st.integers(1, INT64_MAX // max(1, largest))
    vocab = draw(st.integers(1, 40))
    token_map = draw(st.none() | st.lists(ids, min_size=vocab, max_size=vocab))
    tokens = ids if token_map is None else st.integers(0, vocab - 1)
    few = st.integers(0, min(3, largest if token_map is None else vocab - 1))  # texts repeat them
    return HashedText(
        orders=orders,
        num_heads=num_heads,
        multipliers=draw(st.lists(multipliers, min_size=max(orders), max_size=max(orders))),
        primes=draw(st.lists(st.integers(2, 2**40), min_size=columns, max_size=columns)),
        pad_id=draw(ids),
        barrier_ids=draw(st.lists(few, max_size=2)),
        silent_ids=draw(st.lists(few, max_size=1)),
        token_map=token_map,
        token_ids=draw(st.lists(tokens | few, max_size=12)),
    )


def as_ids(token_ids: list[int]) -> NDArray[np.int64]:
    return np.array(token_ids, dtype=np.int64)


def deepseek_keyer(layer: int) -> NgramKeyer:
    primes = np.array(DEEPSEEK_PRIMES[layer], dtype=np.int64)
    return NgramKeyer(
        orders=(2, 3, 4),
        num_heads=8,
        multipliers=np.array(DEEPSEEK_MULTIPLIERS[layer], dtype=np.int64),
        primes=primes,
        offsets=column_offsets(primes),
        pad_id=2,
        barrier_ids=as_ids([]),
        silent_ids=as_ids([]),
        token_map=None,
    )


def deepseek_primes() -> dict[int, NDArray[np.int64]]:
    derived = derive_primes(layers=2, rows_per_head=[16_000_000] * 3, num_heads=8)
    return dict(zip(DEEPSEEK_LAYERS, derived, strict=True))


def smollm2_config() -> dict[str, Any]:
    """Return the engram block of the site that was trained for SmolLM2."""
    block: dict[str, Any] = json.loads((SMOLLM2 / "config.json").read_text())["engram"]
    return block


def smollm2_keyer() -> NgramKeyer:
    block = smollm2_config()
    hashing = block["hash"]
    tensors = safetensors.numpy.load_file(SMOLLM2 / "engram.safetensors")
    return NgramKeyer(
        orders=tuple(block["ngram_orders"]),
        num_heads=block["num_hash_heads"],
        multipliers=as_ids(hashing["multipliers"]),
        primes=as_ids(hashing["primes"]),
        offsets=as_ids(hashing["offsets"]),
        pad_id=hashing["pad_id"],
        barrier_ids=as_ids(hashing.get("barrier_ids", [])),
        silent_ids=as_ids(hashing.get("silent_ids", [])),
        token_map=tensors["engram.token_map"].astype(np.int64),
    )


@settings(max_examples=300, deadline=None)
@given(text=hashed_texts())
def test_row_ids_equal_the_definition_in_big_integers(text: HashedText) -> None:
    assert text.keyer().row_ids([], as_ids(text.token_ids)).tolist() == text.rows_by_definition()


@settings(max_examples=200, deadline=None)
@given(text=hashed_texts())
def test_prefill_at_once_equals_token_by_token(text: HashedText) -> None:
    keyer, ids = text.keyer(), text.token_ids
    single = [keyer.row_ids(ids[:end], as_ids(ids[end : end + 1]))[0].tolist() for end in range(len(ids))]
    assert keyer.row_ids([], as_ids(ids)).tolist() == single


@settings(max_examples=200, deadline=None)
@given(text=hashed_texts(), cut=st.integers(0, 12))
def test_a_text_in_two_parts_equals_the_whole(text: HashedText, cut: int) -> None:
    head, tail = text.token_ids[:cut], text.token_ids[cut:]
    keyer = text.keyer()
    parts = np.concatenate([keyer.row_ids([], as_ids(head)), keyer.row_ids(head, as_ids(tail))])
    np.testing.assert_array_equal(parts, keyer.row_ids([], as_ids(text.token_ids)), strict=True)


@settings(max_examples=200, deadline=None)
@given(text=hashed_texts())
def test_every_row_id_lies_in_the_range_of_its_column(text: HashedText) -> None:
    keyer = dataclasses.replace(text.keyer(), silent_ids=as_ids([]))
    within = keyer.row_ids([], as_ids(text.token_ids)) - keyer.offsets
    assert ((within >= 0) & (within < keyer.primes)).all()


@settings(max_examples=100, deadline=None)
@given(text=hashed_texts())
def test_only_the_last_context_matter(text: HashedText) -> None:
    keyer = text.keyer()
    context = [0] * keyer.context
    np.testing.assert_array_equal(
        keyer.row_ids(text.token_ids + context, as_ids(text.token_ids)),
        keyer.row_ids(context, as_ids(text.token_ids)),
        strict=True,
    )


def test_the_shape_facts_of_a_hash_are_those_of_its_constants() -> None:
    keyer = deepseek_keyer(1)
    assert (keyer.columns, keyer.primes.sum(), keyer.context) == (24, 384_006_168, 3)


@pytest.mark.parametrize(
    ("token_map", "pad_id", "largest"), [(None, 2, 99), (None, 200, 200), ([0, 7, 3], 2, 7), ([0, 7, 3], 8, 8)]
)
def test_the_largest_hashed_id_is_found_among_raw_or_compressed_ids_and_the_pad(
    token_map: list[int] | None, pad_id: int, largest: int
) -> None:
    keyer = NgramKeyer(
        orders=(2,),
        num_heads=1,
        multipliers=as_ids([1, 3]),
        primes=as_ids([5]),
        offsets=as_ids([0]),
        pad_id=pad_id,
        barrier_ids=as_ids([]),
        silent_ids=as_ids([]),
        token_map=None if token_map is None else as_ids(token_map),
    )
    assert keyer.largest_id(100) == largest


def test_a_barrier_hides_itself_and_what_came_before_it() -> None:
    keyer = dataclasses.replace(deepseek_keyer(1), barrier_ids=as_ids([9]))
    after_barrier = keyer.row_ids([], as_ids([5, 9, 6, 7]))[2:]
    np.testing.assert_array_equal(after_barrier, keyer.row_ids([], as_ids([6, 7])), strict=True)


def test_a_barrier_sees_what_came_before_it() -> None:
    keyer = dataclasses.replace(deepseek_keyer(1), barrier_ids=as_ids([9]))
    expected = deepseek_keyer(1).row_ids([5, 6], as_ids([9]))
    np.testing.assert_array_equal(keyer.row_ids([5, 6], as_ids([9])), expected, strict=True)


def test_dead_tokens_read_no_row_and_latch_the_look_back() -> None:
    keyer = dataclasses.replace(deepseek_keyer(14), barrier_ids=as_ids([9]), silent_ids=as_ids([9]))
    row_ids = keyer.row_ids([], as_ids([5, 9, 9, 6]))
    assert row_ids[1:3].tolist() == [[NO_ROW] * 24] * 2
    np.testing.assert_array_equal(row_ids[[0, 3]], keyer.row_ids([], as_ids([5, 9, 6]))[[0, 2]], strict=True)


@settings(max_examples=200, deadline=None)
@given(history=st.lists(st.integers(0, 99), max_size=4), token_ids=st.lists(st.integers(0, 99), max_size=9))
def test_a_token_keyer_gives_each_token_its_own_row_and_the_pads_beyond_the_table(
    history: list[int], token_ids: list[int]
) -> None:
    keyer = TokenKeyer(vocab_size=60, pad_id=3)
    assert keyer.row_ids(history, as_ids(token_ids)).tolist() == [[i if i < 60 else 3] for i in token_ids]
    assert (keyer.columns, keyer.context) == (1, 0)


QWEN_EOS = 3
QWEN_TEXTS = st.lists(st.just(QWEN_EOS) | st.integers(0, 63), min_size=1, max_size=12)


def qwen_embedding(layer_index: int) -> Qwen4ExpTextNGramEmbedding:
    """Return transformers' own module, whose rows are their numbers."""
    config = Qwen4ExpTextConfig(
        vocab_size=64, ngram_size=3, heads_per_ngram=2, ngram_vocab_size_base=31, eos_token_id=QWEN_EOS
    )
    module = Qwen4ExpTextNGramEmbedding(config, embedding_dim=4, layer_idx=1, ple_layer_index=layer_index)
    rows = torch.arange(module.ngram_embedding.num_embeddings)
    module.ngram_embedding.weight.data = rows[:, None].to(torch.float32)
    return module


def qwen_keyer(layer_index: int) -> NgramKeyer:
    primes = derive_primes(layers=layer_index + 1, rows_per_head=[31, 31], num_heads=2)[layer_index]
    return NgramKeyer(
        orders=(2, 3),
        num_heads=2,
        multipliers=derive_splitmix_multipliers(vocab_size=64, max_order=3, layer_index=layer_index),
        primes=primes,
        offsets=column_offsets(primes),
        pad_id=QWEN_EOS,
        barrier_ids=as_ids([QWEN_EOS]),
        silent_ids=as_ids([]),
        token_map=None,
    )


@pytest.mark.parametrize("layer_index", [0, 2])
@settings(max_examples=200, deadline=None)
@given(token_ids=QWEN_TEXTS)
def test_row_ids_of_qwen_are_those_of_transformers(layer_index: int, token_ids: list[int]) -> None:
    with torch.no_grad():
        expected = qwen_embedding(layer_index)(torch.tensor([token_ids]), None)[0]
    found = qwen_keyer(layer_index).row_ids([], as_ids(token_ids))
    np.testing.assert_array_equal(found, expected.numpy().astype(np.int64), strict=True)


def test_constants_of_qwen_are_the_published_ones() -> None:
    multipliers = derive_splitmix_multipliers(vocab_size=248_320, max_order=3, layer_index=0)
    (primes,) = derive_primes(layers=1, rows_per_head=[20_000_000] * 2, num_heads=8)
    assert multipliers.tolist() == [23703573157769, 20109073645365, 8052911324071]
    assert (int(primes[0]), int(primes[-1]), int(primes.sum())) == (20_000_003, 20_000_171, 320_001_446)


def is_prime_by_trial_division(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 3),
    rows_per_head=st.lists(st.integers(1, 5_000), min_size=1, max_size=3),
    num_heads=st.integers(1, 5),
)
def test_moduli_are_the_next_unused_primes_of_each_order(layers: int, rows_per_head: list[int], num_heads: int) -> None:
    used: list[int] = []
    for _ in range(layers):
        for size in rows_per_head:
            unused = (n for n in range(size, 10**6) if is_prime_by_trial_division(n) and n not in used)
            used += [prime for prime, _ in zip(unused, range(num_heads), strict=False)]
    derived = derive_primes(layers=layers, rows_per_head=rows_per_head, num_heads=num_heads)
    assert np.concatenate(derived).tolist() == used


# 2,047 fools base 2 of the Miller-Rabin test, 3,215,031,751 bases 2 to 7; 561 and 62,745 are Carmichael numbers.
@pytest.mark.parametrize("composite", [561, 2_047, 62_745, 3_215_031_751])
def test_composites_that_fool_weak_primality_tests_are_no_moduli(composite: int) -> None:
    (primes,) = derive_primes(layers=1, rows_per_head=[composite], num_heads=1)
    following = next(n for n in range(composite + 1, composite + 1_000) if is_prime_by_trial_division(n))
    assert primes.tolist() == [following]


def test_column_offsets_are_the_exclusive_running_sum() -> None:
    np.testing.assert_array_equal(column_offsets(as_ids([5, 7, 11])), as_ids([0, 5, 12]), strict=True)


def test_tables_of_the_published_demo_have_the_published_rows() -> None:
    first, second = derive_primes(layers=2, rows_per_head=[646_400, 646_400], num_heads=8)
    assert first[:3].tolist() == [646_403, 646_411, 646_421]
    assert (int(first.sum()), int(second.sum())) == (10_344_164, 10_348_242)


@pytest.mark.parametrize("layer", DEEPSEEK_LAYERS)
def test_multipliers_of_deepseek_are_drawn_from_its_seed(layer: int) -> None:
    derived = derive_multipliers(vocab_size=DEEPSEEK_VOCAB, max_order=4, layer_id=layer)
    assert derived.tolist() == DEEPSEEK_MULTIPLIERS[layer]


@pytest.mark.parametrize("layer", DEEPSEEK_LAYERS)
def test_primes_of_deepseek_are_derived_from_its_size(layer: int) -> None:
    assert deepseek_primes()[layer].tolist() == DEEPSEEK_PRIMES[layer]


@pytest.mark.parametrize("layer", DEEPSEEK_LAYERS)
def test_rows_and_last_offset_of_deepseek_are_the_published_ones(layer: int) -> None:
    primes = deepseek_primes()[layer]
    assert (int(primes.sum()), int(column_offsets(primes)[-1])) == (DEEPSEEK_ROWS[layer], DEEPSEEK_LAST_OFFSET[layer])


@pytest.mark.parametrize(("layer", "token", "columns", "rows"), DEEPSEEK_VECTORS)
def test_rows_of_deepseek_are_the_published_vectors(
    layer: int, token: int, columns: list[int], rows: list[int]
) -> None:
    row_ids = deepseek_keyer(layer).row_ids([], as_ids([5, 6, 7, 8]))
    assert row_ids[token, columns].tolist() == rows


def test_no_product_of_deepseek_overflows() -> None:
    largest = (DEEPSEEK_VOCAB - 1) * max(*DEEPSEEK_MULTIPLIERS[1], *DEEPSEEK_MULTIPLIERS[14])
    assert largest <= INT64_MAX


def test_rows_of_smollm2_are_those_of_the_definition() -> None:
    block, keyer = smollm2_config(), smollm2_keyer()
    token_ids = [1, 4093, 198, 31530, 549, 732, 20418, 314, 30, 2, 198, 1, 520, 9531, 198]
    assert keyer.token_map is not None
    ids = keyer.token_map[token_ids].tolist()
    silent = set(keyer.silent_ids.tolist())
    expected = [
        [NO_ROW] * keyer.columns if token_id in silent else row_ids(ids[: end + 1], block)
        for end, token_id in enumerate(token_ids)
    ]
    assert keyer.row_ids([], as_ids(token_ids)).tolist() == expected


def test_constants_of_smollm2_are_derived_from_its_seed_and_sizes() -> None:
    block = smollm2_config()
    hashing, heads = block["hash"], block["num_hash_heads"]
    multipliers = derive_multipliers(
        vocab_size=hashing["compressed_vocab_size"],
        max_order=max(block["ngram_orders"]),
        layer_id=hashing["seed_layer"],
        seed=hashing["seed"],
    )
    (primes,) = derive_primes(layers=1, rows_per_head=hashing["primes"][::heads], num_heads=heads)
    assert (multipliers.tolist(), primes.tolist()) == (hashing["multipliers"], hashing["primes"])
    assert column_offsets(primes).tolist() == hashing["offsets"]
