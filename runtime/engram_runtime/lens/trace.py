"""A trace: the row ids a text reads, token by token, with what tells which table they are of."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, RequestError, TableError
from engram_runtime.keyer_digest import keyer_digest
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.keyers import NO_ROW
from engram_runtime.lens.addresses import PartAddresses, part_addresses
from engram_runtime.strict_json import Fields
from engram_runtime.table_spec import TableSpec

COMPARED = (("num_rows", "number of rows"), ("record_bytes", "record size"), ("keyer_sha256", "keyer digest"))
MAX_RECORD_BYTES = 1 << 18  # 7 times that of Gemma 3n; each read is taken apart into its pages
MAX_TABLE_BYTES = 1 << 60  # keeps addresses far from int64
MAX_PARTS = 16  # of a record; payload and scale are two
BLOCK_READS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSite:
    """A table whose rows were read.

    Attributes:
        keyer_sha256: see `keyer_digest`.
        orders: n-gram lengths; columns are order-major.
        first_rows: ``[C]``, where the rows of each column begin.
        parts: where the rows lie.
    """

    site: str
    num_rows: int
    record_bytes: int
    keyer_sha256: str
    orders: tuple[int, ...]
    first_rows: tuple[int, ...]
    parts: tuple[PartAddresses, ...]

    @classmethod
    def of(cls, bundle: Bundle, spec: TableSpec) -> Self:
        """Return what tells a bundle's table from others."""
        keyer = spec.keyer
        orders, first_rows = (keyer.orders, keyer.offsets) if isinstance(keyer, NgramKeyerSpec) else ((1,), (0,))
        return cls(
            site=spec.site,
            num_rows=spec.num_rows,
            record_bytes=spec.record.record_bytes,
            keyer_sha256=keyer_digest(bundle, keyer),
            orders=orders,
            first_rows=first_rows,
            parts=part_addresses(spec),
        )

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse and check."""
        site = cls(
            site=fields.take("site", str),
            num_rows=fields.count("num_rows", least=1),
            record_bytes=fields.count("record_bytes", least=1),
            keyer_sha256=fields.take("keyer_sha256", str),
            orders=fields.integers("orders"),
            first_rows=fields.integers("first_rows"),
            parts=tuple(PartAddresses.from_fields(item) for item in fields.objects("parts")),
        )
        fields.finish()
        site.check()
        return site

    def check(self) -> None:
        """Refuse facts that contradict each other."""
        orders, starts = list(self.orders), list(self.first_rows)
        if not starts or not orders or len(starts) % len(orders) or orders != sorted(set(orders)) or orders[0] < 1:
            raise BundleError(f"site {self.site} has {len(starts)} columns for n-grams of {orders[:8]}")
        if starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= self.num_rows:
            raise BundleError(f"columns of site {self.site} begin at rows {starts[:4]}, expected ascending ones from 0")
        if len(self.parts) > MAX_PARTS:
            raise BundleError(f"site {self.site} has records of {len(self.parts)} parts, expected at most {MAX_PARTS}")
        if sum(part.row_bytes for part in self.parts) != self.record_bytes:
            raise BundleError(f"parts of site {self.site} don't sum to {self.record_bytes} bytes")
        if self.record_bytes > MAX_RECORD_BYTES or self.num_rows * self.record_bytes > MAX_TABLE_BYTES:
            raise BundleError(
                f"site {self.site} has {self.num_rows} rows of {self.record_bytes} bytes, expected records of at most "
                f"{MAX_RECORD_BYTES} and {MAX_TABLE_BYTES} in all"
            )
        if any(part.first_rows[-1] >= self.num_rows for part in self.parts):
            raise BundleError(f"parts of site {self.site} go beyond its {self.num_rows} rows")

    @property
    def columns(self) -> int:
        """Rows read per token."""
        return len(self.first_rows)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest dtype of a trace that holds its row ids."""
        return np.dtype(np.int32 if self.num_rows <= np.iinfo(np.int32).max else np.int64)

    def check_table(self, bundle: Bundle, spec: TableSpec) -> None:
        """Refuse a table other than the one that was read; raises TableError."""
        found = TraceSite.of(bundle, spec)
        for name, what in COMPARED:
            if (mine := getattr(self, name)) != (other := getattr(found, name)):
                raise TableError(
                    f"the trace is of another table {self.site}: its {what} is {mine}, the bundle's {other}; "
                    f"record a trace of this bundle"
                )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """What a text reads.

    Attributes:
        model: name of the model.
        text: name of the text file.
        command: the command line that made the trace.
        sites: in the order of the bundle.
        row_ids: by site ``[T, C]`` of its dtype, `NO_ROW` where a token reads none; T is the same for all.
    """

    model: str
    text: str
    command: str
    sites: tuple[TraceSite, ...]
    row_ids: dict[str, NDArray[np.signedinteger[Any]]]

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return len(self.row_ids[self.sites[0].site])

    def chosen(self, name: str | None) -> tuple[TraceSite, ...]:
        """Return the site of a name, or all; raises RequestError for a name it hasn't."""
        sites = tuple(site for site in self.sites if name in (None, site.site))
        if not sites:
            raise RequestError(f"the trace has no site {name!r}, it has {[site.site for site in self.sites]}")
        return sites

    def num_reads(self, site: TraceSite) -> int:
        """Return how many rows were read, with repetition."""
        return int((self.row_ids[site.site] != NO_ROW).sum())

    def blocks(self, site: TraceSite) -> Iterator[NDArray[np.int64]]:
        """Yield the rows read, ``[n]`` at a time, in their order."""
        step = max(1, BLOCK_READS // site.columns)
        for start in range(0, self.tokens, step):
            block = self.row_ids[site.site][start : start + step].ravel().astype(np.int64)
            yield block[block != NO_ROW]

    def counts(self, site: TraceSite) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the distinct rows read, ``[N]`` ascending, and how often each was."""
        # Column by column, whose rows are apart: what is sorted at once stays small.
        columns = [np.unique(column[column != NO_ROW], return_counts=True) for column in self.row_ids[site.site].T]
        row_ids, counts = (np.concatenate(part) for part in zip(*columns, strict=True))
        return row_ids.astype(np.int64), counts
