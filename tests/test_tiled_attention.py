"""Attention of many tokens over transposed key blocks has the bits of attention token by token."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.test_kernels import Array, call, compile_kernels, floats, same_bits

from engram_compilers.kernels import attention

POSITION = 60
# heads, key/value heads, head_dim, capacity, window
CASES = [
    pytest.param((6, 2, 64, 192, None), id="grouped"),
    pytest.param((4, 4, 16, 100, None), id="capacity is no whole block"),
    pytest.param((8, 1, 128, 128, 40), id="window"),
    pytest.param((2, 1, 256, 130, 7), id="wide"),
]
EVERY_CASE_AND_DTYPE = [
    pytest.param(
        *case.values, dtype, id=f"{case.id}, {dtype}", marks=[pytest.mark.exhaustive] if (at + wide) % 2 else []
    )
    for at, case in enumerate(CASES)
    for wide, dtype in enumerate(("float16", "float32"))
]
TOKENS = [16, 33]
Case = tuple[int, int, int, int, int | None]


@cache
def kernels(case: Case, dtype: str) -> dict[int, Callable[..., None]]:
    heads, kv_heads, head_dim, capacity, window = case
    return compile_kernels(
        {
            tokens: attention.attend(tokens, heads, kv_heads, head_dim, capacity, 0.1, window, dtype)
            for tokens in (1, *TOKENS)
        }
    )


def caches(case: Case, dtype: str, filled: int) -> list[Array]:
    """Return keys and values, of which the rows past ``filled`` are what nobody wrote."""
    _, kv_heads, head_dim, capacity, _ = case
    made: list[Array] = [floats(1, kv_heads, capacity, head_dim, seed=seed).astype(dtype) for seed in (1, 2)]
    for part in made:
        part[:, :, filled:] = np.nan
    return made


def attend(case: Case, dtype: str, q: Array, position: int) -> Array:
    tokens = len(q)
    return call(
        kernels(case, dtype)[tokens],
        q,
        *caches(case, dtype, position + tokens),
        np.array([position]),
        np.zeros_like(q),
    )[-1]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("case", "dtype"), EVERY_CASE_AND_DTYPE)
def test_tokens_at_once_are_tokens_one_by_one(case: Case, tokens: int, dtype: str) -> None:
    q: Any = floats(tokens, case[0] * case[2])
    alone = [attend(case, dtype, q[t : t + 1], POSITION + t) for t in range(tokens)]
    assert same_bits(attend(case, dtype, q, POSITION), np.concatenate(alone))
