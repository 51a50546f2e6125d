"""Token history -> row ids of an n-gram table: the one definition export and runtime share.

Equations and constants: Engram, arXiv 2601.07372, and the demo ``engram_demo_v1.py`` of deepseek-ai/Engram.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

INT64_MAX = 2**63 - 1
LAYER_SEED_STRIDE = 10007  # distance between the seeds of two layers in the published demo


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NgramHash:
    """Multiplicative-xor hash of suffix n-grams, modulo one prime per (order, head).

    Attributes:
        orders: n-gram lengths, ascending, e.g. ``(2, 3)``.
        num_heads: hash heads per order; columns are order-major: ``c = order_index * num_heads + head``.
        multipliers: ``[max(orders)]`` int64; entry k multiplies the id k tokens back.
        primes: ``[C]`` int64, the modulus of each column.
        offsets: ``[C]`` int64, where each column's rows begin in the table.
        pad_id: compressed id seen before the first token.
        token_map: ``[V]`` int64 raw id -> compressed id, or None where raw ids are hashed.
    """

    orders: tuple[int, ...]
    num_heads: int
    multipliers: NDArray[np.int64]
    primes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    pad_id: int
    token_map: NDArray[np.int64] | None

    @property
    def num_columns(self) -> int:
        """Rows read per token, C."""
        return len(self.primes)

    @property
    def num_rows(self) -> int:
        """Rows of the table: the sum of the primes."""
        return int(self.primes.sum())

    @property
    def context_tokens(self) -> int:
        """How many earlier tokens a row id depends on."""
        return max(self.orders) - 1

    def largest_id(self, vocab_size: int) -> int:
        """Return the largest id that can be hashed."""
        largest = vocab_size - 1 if self.token_map is None else int(self.token_map.max())
        return max(largest, self.pad_id)

    def row_ids(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Hash every suffix n-gram that ends at one of ``token_ids``.

        Args:
            history: raw ids before ``token_ids``; only the last `context_tokens` matter.
            token_ids: ``[T]`` raw ids.

        Returns:
            ``[T, C]`` row ids in ``[0, num_rows)``.
        """
        recent = np.asarray(history[max(0, len(history) - self.context_tokens) :], dtype=np.int64)
        known = self._compress(np.concatenate([recent, token_ids]))
        missing = self.context_tokens - len(recent)
        ids = np.concatenate([np.full(missing, self.pad_id, dtype=np.int64), known])
        count = len(token_ids)
        columns = np.empty((count, self.num_columns), dtype=np.int64)
        mixed = np.zeros(count, dtype=np.int64)
        column = 0
        for back in range(max(self.orders)):
            start = self.context_tokens - back
            # id < V' and multiplier < (2**63 - 1) // V', so the product can't overflow
            mixed ^= ids[start : start + count] * self.multipliers[back]
            if back + 1 in self.orders:
                heads = slice(column, column + self.num_heads)
                columns[:, heads] = mixed[:, None] % self.primes[heads] + self.offsets[heads]
                column += self.num_heads
        return columns

    def _compress(self, token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return token_ids if self.token_map is None else self.token_map[token_ids]


def derive_multipliers(*, vocab_size: int, max_order: int, layer_id: int, seed: int = 0) -> NDArray[np.int64]:
    """Return ``[max_order]`` odd multipliers of a layer, as the published demo draws them.

    Args:
        vocab_size: number of distinct ids that are hashed (the compressed vocabulary where there is one).
    """
    half = max(1, INT64_MAX // vocab_size // 2)
    draws = np.random.default_rng(seed + LAYER_SEED_STRIDE * layer_id).integers(0, half, size=max_order, dtype=np.int64)
    return draws * 2 + 1


def derive_primes(*, layers: int, rows_per_head: Sequence[int], num_heads: int) -> list[NDArray[np.int64]]:
    """Return one ``[C]`` array of moduli per layer: ascending primes, none used twice over all layers.

    Args:
        rows_per_head: for each order, the size a head's range should at least have.
    """
    seen: set[int] = set()
    tables: list[NDArray[np.int64]] = []
    for _ in range(layers):
        primes: list[int] = []
        for size in rows_per_head:
            cursor = size - 1
            for _ in range(num_heads):
                cursor = _next_unused_prime(cursor, seen)
                seen.add(cursor)
                primes.append(cursor)
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
