"""Token history -> row ids of a host table: the one definition export and runtime share.

Equations of the n-gram hash: Engram, arXiv 2601.07372, and the demo ``engram_demo_v1.py`` of deepseek-ai/Engram.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

NO_ROW = -1  # in place of a row id where a token reads no row and gets zeros
_FEW_TOKENS = 8  # up to here plain Python is faster than numpy's many calls: 15 us for 60 at one token


class Keyer(Protocol):
    """What a table's row ids are made from."""

    @property
    def columns(self) -> int:
        """Rows read per token, C."""
        ...

    @property
    def context(self) -> int:
        """How many earlier tokens a row id depends on."""
        ...

    def row_ids(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ``[T, C]`` row ids in ``[0, min_rows)`` of the keyer's spec, or `NO_ROW`.

        Args:
            history: raw ids before ``token_ids``; only the last `context` matter.
            token_ids: ``[T]`` raw ids.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenKeyer:
    """One row per token, at the token's id: per-layer embeddings.

    Attributes:
        vocab_size: ids that have a row.
        pad_id: whose row any other id gets.
    """

    vocab_size: int
    pad_id: int

    @property
    def columns(self) -> int:
        """See `Keyer.columns`."""
        return 1

    @property
    def context(self) -> int:
        """See `Keyer.context`."""
        return 0

    def row_ids(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Keyer.row_ids`."""
        return np.where(token_ids < self.vocab_size, token_ids, self.pad_id)[:, None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NgramKeyer:
    """Multiplicative-xor hash of suffix n-grams, modulo one prime per (order, head).

    With x_k the id k tokens back: h_n = x_0 m_0 xor ... xor x_(n-1) m_(n-1); row = h_n mod prime + offset.

    Attributes:
        orders: n-gram lengths, ascending, e.g. ``(2, 3)``.
        num_heads: hash heads per order; columns are order-major: ``c = order_index * num_heads + head``.
        multipliers: ``[max(orders)]`` int64; entry k multiplies the id k tokens back.
        primes: ``[C]`` int64, the modulus of each column.
        offsets: ``[C]`` int64, where each column's rows begin in the table.
        pad_id: compressed id seen before the first token and where a barrier hides tokens.
        barrier_ids: raw ids that hide themselves and all before them from the tokens after them.
        silent_ids: raw ids that read no row.
        token_map: ``[V]`` int64 raw id -> compressed id, or None where raw ids are hashed.
    """

    orders: tuple[int, ...]
    num_heads: int
    multipliers: NDArray[np.int64]
    primes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    pad_id: int
    barrier_ids: NDArray[np.int64]
    silent_ids: NDArray[np.int64]
    token_map: NDArray[np.int64] | None

    @property
    def columns(self) -> int:
        """See `Keyer.columns`."""
        return len(self.primes)

    @property
    def context(self) -> int:
        """See `Keyer.context`."""
        return max(self.orders) - 1

    def largest_id(self, vocab_size: int) -> int:
        """Return the largest id that can be hashed."""
        largest = vocab_size - 1 if self.token_map is None else int(self.token_map.max())
        return max(largest, self.pad_id)

    def row_ids(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Keyer.row_ids`."""
        few = len(token_ids) <= _FEW_TOKENS
        return self._each_row_id(history, token_ids) if few else self._all_row_ids(history, token_ids)

    def _all_row_ids(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        ids, barriers = self._with_context(history, token_ids)
        count = len(token_ids)
        row_ids = np.empty((count, self.columns), dtype=np.int64)
        mixed = np.zeros(count, dtype=np.int64)
        hidden = np.zeros(count, dtype=np.bool_)
        for back, multiplier in enumerate(self.multipliers):
            seen = slice(self.context - back, self.context - back + count)
            if back > 0:
                hidden |= barriers[seen]
            # id < V' and multiplier < (2**63 - 1) // V', so the product can't overflow
            mixed ^= np.where(hidden, self.pad_id, ids[seen]) * multiplier
            if back + 1 in self.orders:
                first = self.orders.index(back + 1) * self.num_heads
                heads = slice(first, first + self.num_heads)
                row_ids[:, heads] = mixed[:, None] % self.primes[heads] + self.offsets[heads]
        row_ids[np.isin(token_ids, self.silent_ids)] = NO_ROW
        return row_ids

    def _with_context(
        self, history: Sequence[int], token_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the ids to hash and whether each is a barrier, both ``[context + T]``, padded at the front."""
        recent = np.asarray(history[max(0, len(history) - self.context) :], dtype=np.int64)
        raw = np.concatenate([recent, token_ids])
        ids = np.full(self.context + len(token_ids), self.pad_id, dtype=np.int64)
        barriers = np.zeros(len(ids), dtype=np.bool_)
        known = slice(self.context - len(recent), None)
        ids[known] = raw if self.token_map is None else self.token_map[raw]
        barriers[known] = np.isin(raw, self.barrier_ids)
        return ids, barriers

    def _each_row_id(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        seen = [*history[max(0, len(history) - self.context) :], *token_ids.tolist()]
        ids = seen if self.token_map is None else self.token_map[seen].tolist()
        barriers, silent = set(self.barrier_ids.tolist()), set(self.silent_ids.tolist())
        longest = [order - 1 for order in self.orders for _ in range(self.num_heads)]
        columns = list(zip(longest, self.primes.tolist(), self.offsets.tolist(), strict=True))
        row_ids = np.full((len(token_ids), len(columns)), NO_ROW, dtype=np.int64)
        for row, end in enumerate(range(len(seen) - len(token_ids), len(seen))):
            if seen[end] not in silent:
                hashes = self._hashes(seen, ids, end, barriers)
                row_ids[row] = [hashes[back] % prime + offset for back, prime, offset in columns]
        return row_ids

    def _hashes(self, seen: Sequence[int], ids: Sequence[int], end: int, barriers: Set[int]) -> list[int]:
        """Return the hashes of the 1, 2 ... context + 1 tokens up to place ``end``; ``ids`` are the compressed ones."""
        hashes, mixed, hidden = [], 0, False
        for back, multiplier in enumerate(self.multipliers.tolist()):
            place = end - back
            hidden = hidden or place < 0 or (back > 0 and seen[place] in barriers)
            mixed ^= (self.pad_id if hidden else ids[place]) * multiplier
            hashes.append(mixed)
        return hashes
