"""Token history -> row ids of a host table: the one definition export and runtime share.

Equations of the n-gram hash: Engram, arXiv 2601.07372, and the demo ``engram_demo_v1.py`` of deepseek-ai/Engram.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

NO_ROW = -1  # in place of a row id where a token reads no row and gets zeros
_FEW_TOKENS = 8  # up to here plain Python hashes faster than numpy with its many calls
NO_TOKEN = -1  # the id of a position that was no token: it reads no row, and hides all up to it from what follows


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
            token_ids: ``[T]`` raw ids, or `NO_TOKEN`.
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
    _constants: "_Constants" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Put the constants into the forms that are quick to use."""
        object.__setattr__(self, "_constants", _Constants(self))  # the way of frozen dataclasses

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
        known, count = self._constants, len(token_ids)
        if count > _FEW_TOKENS:
            row_ids = self._many_hashes(history, token_ids).take(known.order_of_column, axis=1)
            row_ids %= self.primes
            row_ids += self.offsets
        else:  # numpy is quicker where nothing is broadcast
            row_ids = self._few_hashes(history, token_ids).take(known.order_of_column, axis=1)
            row_ids %= known.primes_of_few[:count]
            row_ids += known.offsets_of_few[:count]
        silent = known.silent.take(token_ids, mode="clip")
        silent |= token_ids < 0
        if np.count_nonzero(silent):
            row_ids[silent] = NO_ROW
        return row_ids

    def _many_hashes(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the hash of each order, ``[T, orders]``."""
        ids, barriers = self._with_context(history, token_ids)
        count = len(token_ids)
        hashes = np.empty((count, len(self.orders)), dtype=np.int64)
        mixed = np.zeros(count, dtype=np.int64)
        hidden = np.zeros(count, dtype=np.bool_)
        for back, multiplier in enumerate(self.multipliers):
            seen = slice(self.context - back, self.context - back + count)
            if back > 0:
                hidden |= barriers[seen]
            # id < V' and multiplier < (2**63 - 1) // V', so the product can't overflow
            mixed ^= np.where(hidden, self.pad_id, ids[seen]) * multiplier
            if back + 1 in self.orders:
                hashes[:, self.orders.index(back + 1)] = mixed
        return hashes

    def _with_context(
        self, history: Sequence[int], token_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the ids to hash and whether each is a barrier, both ``[context + T]``, padded at the front."""
        recent = np.asarray(history[max(0, len(history) - self.context) :], dtype=np.int64)
        raw = np.concatenate([recent, token_ids])
        ids = np.full(self.context + len(token_ids), self.pad_id, dtype=np.int64)
        barriers = np.zeros(len(ids), dtype=np.bool_)
        known = slice(self.context - len(recent), None)
        ids[known] = raw if self.token_map is None else self.token_map.take(raw)
        barriers[known] = self._constants.barriers.take(raw, mode="clip") | (raw < 0)
        return ids, barriers

    def _few_hashes(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what `_many_hashes` does."""
        known = self._constants
        missing = max(0, known.context - len(history))
        seen = [*[NO_TOKEN] * missing, *history[len(history) - known.context + missing :], *token_ids.tolist()]
        hashes = [self._token_hashes(seen, end) for end in range(known.context, len(seen))]
        return np.array(hashes, dtype=np.int64).reshape(len(hashes), len(self.orders))

    def _token_hashes(self, seen: Sequence[int], end: int) -> list[int]:
        """Return the hash of each order at place ``end`` of raw ids."""
        known = self._constants
        hashes, mixed, hidden = [], 0, False
        for back, (multiplier, wanted) in enumerate(known.steps):
            token_id = seen[end - back]
            hidden = hidden or (back > 0 and token_id in known.hiding)
            mixed ^= (self.pad_id if hidden else known.compressed(token_id)) * multiplier
            if wanted:
                hashes.append(mixed)
        return hashes


class _Constants:
    """A keyer's constants as its calls use them, so that none converts them again."""

    def __init__(self, keyer: NgramKeyer) -> None:
        few = _FEW_TOKENS, 1
        self.context = keyer.context
        self.order_of_column = np.arange(len(keyer.orders)).repeat(keyer.num_heads)
        self.primes_of_few, self.offsets_of_few = np.tile(keyer.primes, few), np.tile(keyer.offsets, few)
        self.steps = [(factor, back + 1 in keyer.orders) for back, factor in enumerate(keyer.multipliers.tolist())]
        self.hiding = frozenset([NO_TOKEN, *keyer.barrier_ids.tolist()])
        self.barriers, self.silent = _membership(keyer.barrier_ids), _membership(keyer.silent_ids)
        self.compressed: Callable[[int], int] = int if keyer.token_map is None else keyer.token_map.item


def _membership(ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether each raw id is among ``ids``, for a clipped look-up: the last entry stands for all beyond."""
    members = np.zeros(int(ids.max(initial=-1)) + 2, dtype=np.bool_)
    members[ids] = True
    return members
