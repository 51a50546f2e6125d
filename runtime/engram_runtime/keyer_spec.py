"""How a manifest describes keyers: constants as data, parsed by their ``kind``."""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import BundleError
from engram_runtime.hashing import INT64_MAX
from engram_runtime.keyers import NgramKeyer, TokenKeyer
from engram_runtime.strict_json import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenKeyerSpec:
    """Constants of `engram_runtime.keyers.TokenKeyer`."""

    KIND: ClassVar[str] = "token"

    kind: str = KIND
    vocab_size: int
    pad_id: int

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse what follows ``kind``."""
        spec = cls(vocab_size=fields.count("vocab_size", least=1), pad_id=fields.count("pad_id"))
        fields.finish()
        spec.check()
        return spec

    @property
    def columns(self) -> int:
        """Rows read per token."""
        return 1

    @property
    def min_rows(self) -> int:
        """Rows a table must at least have."""
        return self.vocab_size

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the bundle that the keyer needs."""
        return ()

    def keyer(self, vocab_size: int, token_map: NDArray[np.int64] | None) -> TokenKeyer:
        """Return the keyer with these constants; the model's vocabulary and a token map don't matter to it."""
        return TokenKeyer(vocab_size=self.vocab_size, pad_id=self.pad_id)

    def check(self) -> None:
        """Refuse constants that contradict each other."""
        if self.pad_id >= self.vocab_size:
            raise BundleError(f"keyer has pad_id {self.pad_id}, expected an id below {self.vocab_size}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Nothing to refuse: ids beyond the keyer's vocabulary get the row of the pad."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramKeyerSpec:
    """Constants of `engram_runtime.keyers.NgramKeyer`; ``token_map`` is a file of the bundle or None."""

    KIND: ClassVar[str] = "xor_prime"

    kind: str = KIND
    orders: tuple[int, ...]
    num_heads: int
    multipliers: tuple[int, ...]
    primes: tuple[int, ...]
    offsets: tuple[int, ...]
    pad_id: int
    barrier_ids: tuple[int, ...] = ()
    silent_ids: tuple[int, ...] = ()
    token_map: str | None = None

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse what follows ``kind``."""
        spec = cls(
            orders=fields.integers("orders"),
            num_heads=fields.count("num_heads"),
            multipliers=fields.integers("multipliers"),
            primes=fields.integers("primes"),
            offsets=fields.integers("offsets"),
            pad_id=fields.count("pad_id"),
            barrier_ids=fields.integers("barrier_ids"),
            silent_ids=fields.integers("silent_ids"),
            token_map=fields.optional_text("token_map"),
        )
        fields.finish()
        spec.check()
        return spec

    @property
    def columns(self) -> int:
        """Rows read per token."""
        return len(self.primes)

    @property
    def min_rows(self) -> int:
        """Rows a table must at least have: the sum of the primes."""
        return sum(self.primes)

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the bundle that the keyer needs."""
        return () if self.token_map is None else (self.token_map,)

    def keyer(self, vocab_size: int, token_map: NDArray[np.int64] | None) -> NgramKeyer:
        """Return the keyer with these constants.

        Args:
            token_map: ``[V]``, or None where raw ids are hashed.

        Raises:
            BundleError: a product of id and multiplier goes beyond 64 bits.
        """
        keyer = NgramKeyer(
            orders=self.orders,
            num_heads=self.num_heads,
            multipliers=np.array(self.multipliers, dtype=np.int64),
            primes=np.array(self.primes, dtype=np.int64),
            offsets=np.array(self.offsets, dtype=np.int64),
            pad_id=self.pad_id,
            barrier_ids=np.array(self.barrier_ids, dtype=np.int64),
            silent_ids=np.array(self.silent_ids, dtype=np.int64),
            token_map=token_map,
        )
        if (limit := keyer.largest_id(vocab_size) * max(self.multipliers)) > INT64_MAX:
            raise BundleError(f"keyer multiplier {max(self.multipliers)} overflows 64 bits: products reach {limit}")
        return keyer

    def check(self) -> None:
        """Refuse constants that contradict each other."""
        ascending = list(self.orders) == sorted(set(self.orders))
        if not self.orders or not ascending or self.orders[0] < 1 or self.orders[-1] > 16:
            raise BundleError(
                f"n-gram orders are {reprlib.repr(list(self.orders))}, expected ascending lengths from 1 to 16"
            )
        if len(self.multipliers) != max(self.orders) or min(self.multipliers) < 1:
            found = reprlib.repr(list(self.multipliers))
            raise BundleError(f"keyer has multipliers {found}, expected {max(self.orders)} positive")
        self._check_columns()
        for name, ids in (("barrier_ids", self.barrier_ids), ("silent_ids", self.silent_ids)):
            if list(ids) != sorted(set(ids)) or min(ids, default=0) < 0:
                raise BundleError(f"keyer has {name} {reprlib.repr(list(ids))}, expected ascending ids from 0")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse ids with a part of their own that no token has."""
        if (largest := max((*self.barrier_ids, *self.silent_ids), default=0)) >= vocab_size:
            raise BundleError(f"keyer names token id {largest}, the vocabulary has {vocab_size} tokens")

    def _check_columns(self) -> None:
        columns = len(self.orders) * self.num_heads
        if not 0 < len(self.primes) == len(self.offsets) == columns:
            raise BundleError(
                f"keyer has {len(self.primes)} primes and {len(self.offsets)} offsets, expected {columns} of each"
            )
        if min(self.primes) < 2:
            raise BundleError(f"keyer has primes {reprlib.repr(list(self.primes))}, expected numbers from 2")
        running = 0
        for prime, offset in zip(self.primes, self.offsets, strict=True):
            if offset != running:
                raise BundleError(f"keyer offset is {offset}, the primes before it sum to {running}")
            running += prime


KeyerSpec = TokenKeyerSpec | NgramKeyerSpec
KEYER_KINDS: dict[str, Callable[[Fields], KeyerSpec]] = {
    NgramKeyerSpec.KIND: NgramKeyerSpec.from_fields,
    TokenKeyerSpec.KIND: TokenKeyerSpec.from_fields,
}


def parse_keyer(fields: Fields) -> KeyerSpec:
    """Parse a keyer by its kind; raises BundleError for one this runtime doesn't know."""
    kind = fields.take("kind", str)
    if kind not in KEYER_KINDS:
        raise BundleError(f"keyer kind {kind!r} is unknown; known are {sorted(KEYER_KINDS)}")
    return KEYER_KINDS[kind](fields)
