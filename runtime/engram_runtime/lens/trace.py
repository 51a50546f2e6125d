"""A trace: the row ids a text reads, token by token, with what tells which table they are of.

A safetensors file: a tensor ``rows.<site> [T, C]`` of int32 or int64 for each site, and its facts as JSON in the
metadata. A trace may come from anywhere, so everything in it is checked before it is used.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, RequestError, TableError
from engram_runtime.keyer_digest import keyer_digest
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.keyers import NO_ROW
from engram_runtime.lens.addresses import PartAddresses, part_addresses
from engram_runtime.new_file import new_file
from engram_runtime.safetensors_layout import SafetensorsLayout, TensorPlan
from engram_runtime.strict_json import Fields, parse_facts
from engram_runtime.table_spec import TableSpec

FORMAT_VERSION = 1
FACTS = "engram_trace"  # key of the metadata
COMPARED = (("num_rows", "number of rows"), ("record_bytes", "record size"), ("keyer_sha256", "keyer digest"))
MAX_TOKENS = 10_000_000
MAX_ROW_IDS = 160_000_000  # over all sites: 10 M tokens of 16 rows, 640 MB
MAX_RECORD_BYTES = 1 << 18  # 7 times that of Gemma 3n; each read is taken apart into its pages
MAX_TABLE_BYTES = 1 << 60  # keeps addresses far from int64
MAX_PARTS = 16  # of a record; payload and scale are two
BLOCK_READS = 1 << 16
DTYPES = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}  # as safetensors call them


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


def tensor_name(site: str) -> str:
    """Return the name of a site's tensor."""
    return f"rows.{site}"


def check_size(tokens: int, columns: int) -> None:
    """Refuse a trace that would not fit; raises TableError."""
    if tokens > MAX_TOKENS or tokens * columns > MAX_ROW_IDS:
        most = min(MAX_TOKENS, MAX_ROW_IDS // columns)
        raise TableError(
            f"a trace of {tokens} tokens of {columns} rows is too large, {most} tokens are the most; use --tokens"
        )


def write_trace(path: Path, trace: Trace, *, replace: bool = False) -> None:
    """Write a trace, whole or not at all; raises RequestError where a file is there that may not be replaced."""
    facts = {
        "format_version": FORMAT_VERSION,
        "model": trace.model,
        "text": trace.text,
        "command": trace.command,
        "tokens": trace.tokens,
        "sites": [dataclasses.asdict(site) for site in trace.sites],
    }
    tensors = {tensor_name(site.site): trace.row_ids[site.site] for site in trace.sites}
    plans = [TensorPlan(name, ids.dtype.name, ids.shape) for name, ids in tensors.items()]
    layout = SafetensorsLayout.of(plans, metadata={FACTS: json.dumps(facts)})
    with new_file(path, replace=replace) as file:
        file.write(layout.header)
        for name in layout.offsets:
            file.write(np.ascontiguousarray(tensors[name]).data)


def read_trace(path: Path) -> Trace:
    """Read a trace; nothing in it is trusted.

    Raises:
        TableError: not a trace, of another version, too large, or with row ids its table doesn't have.
    """
    if not path.is_file():
        raise TableError(f"{path} is not a trace: there is no such file; make one with engram tables trace")
    try:
        with safe_open(path, framework="numpy") as file:
            return _read(file)
    except (SafetensorError, BundleError, OSError) as error:
        raise TableError(f"{path} is not a trace that can be used: {error}") from error


def _read(file: Any) -> Trace:
    facts = parse_facts(file.metadata(), FACTS, "make one with engram tables trace")
    version = facts.count("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(f"it has format version {version}, this runtime reads {FORMAT_VERSION}; record it again")
    tokens = facts.count("tokens", least=1)
    model, text, command = (facts.take(name, str) for name in ("model", "text", "command"))
    sites = tuple(TraceSite.from_fields(item) for item in facts.objects("sites"))
    facts.finish()
    _check_names([site.site for site in sites], list(file.keys()))
    check_size(tokens, sum(site.columns for site in sites))
    row_ids = {site.site: _row_ids(file, site, tokens) for site in sites}
    return Trace(model=model, text=text, command=command, sites=sites, row_ids=row_ids)


def _check_names(sites: Sequence[str], tensors: Sequence[str]) -> None:
    if not sites or len(set(sites)) != len(sites) or sorted(map(tensor_name, sites)) != sorted(tensors):
        raise BundleError(f"it has tensors {sorted(tensors)[:8]} for sites {sorted(sites)[:8]}")


def _row_ids(file: Any, site: TraceSite, tokens: int) -> NDArray[np.signedinteger[Any]]:
    tensor = file.get_slice(tensor_name(site.site))
    dtype, shape = tensor.get_dtype(), list(tensor.get_shape())
    if DTYPES.get(dtype) != site.dtype or shape != [tokens, site.columns]:
        raise BundleError(
            f"row ids of site {site.site} are {dtype} {shape}, expected {site.dtype} {[tokens, site.columns]}"
        )
    row_ids: NDArray[np.signedinteger[Any]] = file.get_tensor(tensor_name(site.site))
    for column, (first, end) in enumerate(itertools.pairwise((*site.first_rows, site.num_rows))):
        _check_rows(site, column, row_ids[:, column], first, end)
    return row_ids


def _check_rows(site: TraceSite, column: int, row_ids: NDArray[np.signedinteger[Any]], first: int, end: int) -> None:
    outside = (row_ids != NO_ROW) & ((row_ids < first) | (row_ids >= end))
    if outside.any():
        found = int(row_ids[outside.argmax()])
        raise BundleError(f"row id {found} of column {column} of site {site.site} is outside [{first}, {end})")
