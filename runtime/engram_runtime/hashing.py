"""Constants of an n-gram hash, derived as the published models derive them; `engram_runtime.keyers` uses them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

INT64_MAX = 2**63 - 1
UINT64_MASK = 2**64 - 1
LAYER_SEED_STRIDE = 10007  # distance between the seeds of two layers in the published demo
SPLITMIX_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64: Steele, Lea and Flood, 2014
SPLITMIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def derive_multipliers(*, vocab_size: int, max_order: int, layer_id: int, seed: int = 0) -> NDArray[np.int64]:
    """Return ``[max_order]`` odd multipliers of a layer, as the published demo draws them.

    Args:
        vocab_size: number of distinct ids that are hashed (the compressed vocabulary where there is one).
    """
    rng = np.random.default_rng(seed + LAYER_SEED_STRIDE * layer_id)
    return rng.integers(0, _half_range(vocab_size), size=max_order, dtype=np.int64) * 2 + 1


def derive_splitmix_multipliers(
    *, vocab_size: int, max_order: int, layer_index: int, seed: int = 1234
) -> NDArray[np.int64]:
    """Return ``[max_order]`` odd multipliers of a layer, as Qwen3.8 (``qwen4_exp``) makes them.

    Args:
        vocab_size: number of distinct ids that are hashed.
        layer_index: place of the layer among those with a table, from 0.
    """
    base = seed + LAYER_SEED_STRIDE * layer_index
    draws = [_splitmix64(base + SPLITMIX_GAMMA * (back + 1)) for back in range(max_order)]
    return np.array([draw % _half_range(vocab_size) * 2 + 1 for draw in draws], dtype=np.int64)


def _half_range(vocab_size: int) -> int:
    """Return the bound below which 2r + 1 times any id stays within 63 bits."""
    return max(1, INT64_MAX // vocab_size // 2)


def _splitmix64(state: int) -> int:
    mixed = (state + SPLITMIX_GAMMA) & UINT64_MASK
    for shift, multiplier in zip((30, 27), SPLITMIX_MULTIPLIERS, strict=True):
        mixed = (mixed ^ mixed >> shift) * multiplier & UINT64_MASK
    return mixed ^ mixed >> 31


def derive_primes(*, layers: int, rows_per_head: Sequence[int], num_heads: int) -> list[NDArray[np.int64]]:
    """Return one ``[C]`` array of moduli per layer: ascending primes, none used twice over all layers.

    One size for all orders gives consecutive primes over all orders and layers: those of Qwen3.8.

    Args:
        rows_per_head: for each order, the size a head's range should at least have.
    """
    seen: set[int] = set()
    last: dict[int, int] = {}  # prime by size; every prime from the size up to it is seen
    tables: list[NDArray[np.int64]] = []
    for _ in range(layers):
        primes: list[int] = []
        for size in rows_per_head:
            for _ in range(num_heads):
                last[size] = _next_unused_prime(last.get(size, size - 1), seen)
                seen.add(last[size])
                primes.append(last[size])
        tables.append(np.array(primes, dtype=np.int64))
    return tables


def column_offsets(primes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``[C]`` first rows of the columns: the exclusive running sum of the primes."""
    return np.concatenate([[0], np.cumsum(primes)[:-1]]).astype(np.int64)


def _next_unused_prime(after: int, seen: set[int]) -> int:
    candidate = after + 1
    while candidate in seen or not _is_prime(candidate):
        candidate += 1
    return candidate


def _is_prime(number: int) -> bool:
    """Miller-Rabin with the bases that decide every number below 2**64 (Sorenson and Webster, 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if number < 2 or any(number % base == 0 for base in bases):
        return number in bases
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_passes(number, base, odd, twos) for base in bases)


def _passes(number: int, base: int, odd: int, twos: int) -> bool:
    power = pow(base, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False
