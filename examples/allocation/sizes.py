"""The sizes of a model, and how its parameters are divided between experts and the table.

Every division has the same number of parameters in all and the same number that take part in a token. Parameters that
a token does not touch are the sparse budget; the share of it that the table gets is what the sweep varies (one minus
the allocation ratio of arXiv 2601.07372, section 3).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes
from engram_runtime.keyers import NgramKeyer

NO_IDS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all divisions have in common.

    Attributes:
        expert_hidden: width of one expert's SwiGLU.
        active_experts: experts that a token is sent to, in every block.
        most_experts: experts of a block where nothing goes into the table.
        site_block: block that reads the table, from 0, before its attention.
        orders: n-gram lengths of the table's keys.
        hash_heads: rows read per n-gram length.
        row_dim: values of a row.
    """

    vocab_size: int = 4096
    hidden: int = 128
    blocks: int = 3
    heads: int = 4
    expert_hidden: int = 96
    active_experts: int = 2
    most_experts: int = 34
    site_block: int = 1
    orders: tuple[int, ...] = (2, 3)
    hash_heads: int = 4
    row_dim: int = 16

    @property
    def memory_dim(self) -> int:
        """Values of all rows that a token reads."""
        return len(self.orders) * self.hash_heads * self.row_dim

    @property
    def inactive_experts(self) -> int:
        """Experts of a block that a token does not touch where nothing goes into the table."""
        return self.most_experts - self.active_experts

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert in every block: the smallest step of a division."""
        return 3 * self.hidden * self.expert_hidden * self.blocks


@dataclass(frozen=True)
class Division:
    """A model in which each block has ``experts`` experts and the table gets what the others leave.

    Attributes:
        experts: from ``sizes.active_experts``, all of the sparse budget in the table, to ``sizes.most_experts``.
    """

    sizes: Sizes
    experts: int

    def __post_init__(self) -> None:
        """Refuse what leaves too few experts for a token or nothing to divide."""
        if not self.sizes.active_experts <= self.experts <= self.sizes.most_experts:
            raise ValueError(
                f"a block has {self.experts} experts, expected {self.sizes.active_experts} to {self.sizes.most_experts}"
            )

    @property
    def share(self) -> float:
        """Part of the sparse budget that goes into the table, 0 to 1."""
        return (self.sizes.most_experts - self.experts) / self.sizes.inactive_experts

    @property
    def has_table(self) -> bool:
        """Whether anything goes into the table."""
        return self.experts < self.sizes.most_experts

    @property
    def dense_hidden(self) -> int:
        """Width of the dense MLP in the site's block: what a smaller router and a missing site free is put there."""
        spare = (self.sizes.most_experts - self.experts) * self.sizes.hidden * self.sizes.blocks
        return (spare + (0 if self.has_table else self._site_parameters)) // (3 * self.sizes.hidden)

    @property
    def _site_parameters(self) -> int:
        """Parameters of the site that take part in a token: two projections, two gains and the rows it reads."""
        memory = self.sizes.memory_dim
        return 2 * self.sizes.hidden * memory + 2 * self.sizes.hidden + memory

    @cached_property
    def primes(self) -> NDArray[np.int64]:
        """``[C]`` rows of each column of the table."""
        sizes, columns = self.sizes, len(self.sizes.orders) * self.sizes.hash_heads
        freed = (sizes.most_experts - self.experts) * sizes.expert_parameters
        rows = freed // (columns * sizes.row_dim)
        return derive_primes(layers=1, rows_per_head=[rows] * len(sizes.orders), num_heads=sizes.hash_heads)[0]

    def keyer(self, token_map: NDArray[np.int64], end_id: int) -> NgramKeyer:
        """Return how rows are found; no n-gram reaches back over the end of a document."""
        vocab_size, orders = int(token_map.max()) + 1, self.sizes.orders
        multipliers = derive_multipliers(vocab_size=vocab_size, max_order=max(orders), layer_id=self.sizes.site_block)
        return NgramKeyer(
            orders=orders,
            num_heads=self.sizes.hash_heads,
            multipliers=multipliers,
            primes=self.primes,
            offsets=column_offsets(self.primes),
            pad_id=int(token_map[end_id]),
            barrier_ids=np.array([end_id], dtype=np.int64),
            silent_ids=NO_IDS,
            token_map=token_map,
        )
