"""Keys and values of attention as float16: half the memory, rounded once, and the promises made for float32."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Command
from tests.test_kernels import Array, call, compile_kernels, floats, same_bits
from tests.test_profiles import profile_message, raw_library, raw_profile
from tests.tiny import TinyModel
from tests.workshop import Workshop, bundle_logits, copy_folder, random_ids, stepwise_logits, tiny_profile

from engram_compilers import cli
from engram_compilers.kernels import attention
from engram_runtime.bundle import Bundle
from engram_runtime.executor import allocate_states, load_executor
from engram_runtime.library import LibraryInfo, find_library
from engram_targets import parse_profile

TOKENS, HEADS, KV_HEADS, HEAD_DIM, CAPACITY, POSITION = 5, 4, 2, 32, 100, 70
SIZES = (TOKENS, HEADS, KV_HEADS, HEAD_DIM, CAPACITY)
ALL_LIVE = np.full((TOKENS, 8), -1, np.int32)


@cache
def kernels() -> dict[Any, Callable[..., None]]:
    made: dict[Any, Any] = {}
    for dtype in ("float32", "float16"):
        made["append", dtype] = attention.rope_append(*SIZES, cache_dtype=dtype)
        made["attend", dtype] = attention.attend(*SIZES, 0.2, cache_dtype=dtype)
        made["selected", dtype] = attention.attend_selected(*SIZES, 0.2, dtype)
    return compile_kernels(made)


def caches(dtype: str) -> list[Array]:
    """Return keys and values that float16 holds exactly."""
    return [floats(1, KV_HEADS, CAPACITY, HEAD_DIM, seed=seed).astype(np.float16).astype(dtype) for seed in (1, 2)]


def append(dtype: str, head: Array | None = None) -> list[Array]:
    """Return queries, keys and values after tokens were appended; ``head`` is what all heads are instead of random."""
    qkv = floats(TOKENS, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    if head is not None:
        qkv[:] = np.tile(head, HEADS + 2 * KV_HEADS)
    turns = [np.cos(floats(CAPACITY, HEAD_DIM // 2)), np.sin(floats(CAPACITY, HEAD_DIM // 2))]
    q = np.zeros((TOKENS, HEADS * HEAD_DIM), np.float32)
    *_, keys, values, query = call(kernels()["append", dtype], qkv, *turns, np.array([POSITION]), *caches(dtype), q)
    return [query, keys, values]


def attend(kind: str, dtype: str) -> Array:
    q, live = floats(TOKENS, HEADS * HEAD_DIM), [ALL_LIVE] if kind == "selected" else []
    return call(kernels()[kind, dtype], q, *caches(dtype), np.array([POSITION]), *live, np.zeros_like(q))[-1]


def test_keys_and_values_are_rounded_once() -> None:
    (query, *narrow), (expected_query, *wide) = append("float16"), append("float32")
    assert same_bits(query, expected_query)
    assert [same_bits(a, b.astype(np.float16)) for a, b in zip(narrow, wide, strict=True)] == [True, True]


def test_what_float16_cannot_hold_becomes_its_largest_number() -> None:
    """Of every lane: 16 are converted together, and nothing else than a nan may end as one or as an infinity."""
    extremes = np.resize([65519.0, 65520.0, -70000.0, 3e38, -3e38, np.inf, -np.inf, np.nan], HEAD_DIM)
    (_, *narrow), (_, *wide) = append("float16", extremes), append("float32", extremes)
    largest = np.finfo(np.float16).max
    expected = [np.clip(part, -largest, largest).astype(np.float16) for part in wide]
    for found, stated in zip(narrow, expected, strict=True):
        np.testing.assert_array_equal(found, stated)
    assert np.isnan(narrow[1]).sum() == np.isnan(extremes).sum() * TOKENS * KV_HEADS
    assert not np.isinf(narrow).any()


@pytest.mark.parametrize("kind", ["attend", "selected"])
def test_attention_has_the_bits_of_attention_over_the_widened_cache(kind: str) -> None:
    assert same_bits(attend(kind, "float16"), attend(kind, "float32"))


def test_float16_caches_are_close_and_tokens_at_once_are_tokens_one_by_one(workshop: Workshop) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel()), quant="int8")
    narrow = workshop.compiled(bundle, cache_dtype="float16")
    wide = workshop.compiled(bundle)
    ids = random_ids(60)
    found, expected = (bundle_logits(compiled, ids, "tvm") for compiled in (narrow, wide))
    assert same_bits(found, stepwise_logits(narrow, ids, "tvm"))
    assert not same_bits(found, expected)
    # Two layers, each adding an error of at most 2^-11 of its values.
    assert np.abs(found - expected).max() <= 2**-9 * np.abs(expected).max()


def test_float16_caches_take_half_the_memory(workshop: Workshop) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel()), quant="int8")
    sizes = []
    for compiled in (workshop.compiled(bundle, cache_dtype="float16"), workshop.compiled(bundle)):
        executor = load_executor("tvm", compiled, threads=1)
        states = allocate_states(bundle.manifest.decoder.states, executor.float16_states)
        sizes.append(sum(state.nbytes for state in states.values()))
    assert 2 * sizes[0] == sizes[1]


def test_states_that_are_no_cache_of_attention_stay_float32(workshop: Workshop) -> None:
    bundle = workshop.uncompiled()
    info = find_library(workshop.compiled(bundle, cache_dtype="float16"))[1]
    names = [state.name for state in bundle.manifest.decoder.states]
    assert info.float16_states == ("key.0", "value.0", "key.1", "value.1")
    assert set(names) - set(info.float16_states) == {"window.layer_1"}
    assert load_executor("onnxruntime", bundle, threads=1).float16_states == ()


def test_the_library_says_which_states_are_float16() -> None:
    assert LibraryInfo.from_dict(raw_library()).float16_states == ("key.0",)


def test_a_profile_names_the_dtype_of_caches() -> None:
    assert parse_profile("mine", raw_profile(cache_dtype="float16")).cache_dtype == "float16"
    assert profile_message(cache_dtype="int8") == (
        "profile mine has cache_dtype 'int8', there are ['float32', 'float16']"
    )


def test_compile_takes_the_dtype_of_caches(
    workshop: Workshop, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "load_profile", lambda name: tiny_profile(decode_tokens=(1,), prefill_tokens=()))
    folder = copy_folder(workshop.uncompiled().path, tmp_path / "bundle")
    command("engram", "compile", folder, "--cache", "float16")
    assert len(find_library(Bundle.open(folder))[1].float16_states) == 4
