"""The manifest ``engram.json``, format version 1: what a bundle says about itself. No floats, no unknown keys."""

import math
import reprlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import BundleError
from engram_runtime.hashing import NgramHash
from engram_runtime.records import RecordFormat
from engram_runtime.strict_json import Fields

FORMAT_VERSION = 1
AXIS_NAMES = ("T", "R")
STATE_KINDS = ("positional", "window", "recurrent")
MAX_STATE_VALUES = 1 << 34  # 64 GiB of float32; a cache of a million positions is 4 GiB
HASH_KINDS = ("xor_prime",)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file of the bundle: relative POSIX path, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        entry = cls(
            path=contained_path(fields.take("path", str)),
            bytes=fields.count("bytes"),
            sha256=fields.take("sha256", str),
        )
        fields.finish()
        return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A graph input or output; axes are numbers or the names T (tokens) and R (rows of logits)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        spec = cls(name=fields.take("name", str), dtype=fields.take("dtype", str), shape=tuple(fields.items("shape")))
        fields.finish()
        for axis in spec.shape:
            if axis not in AXIS_NAMES and (type(axis) is not int or not 0 < axis < 2**31):
                raise BundleError(
                    f"tensor {spec.name} has axis {reprlib.repr(axis)}, expected a size or one of {list(AXIS_NAMES)}"
                )
        return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """A cache the caller owns: input ``name``, output ``next.<name>``, written in place.

    ``positional`` states hold one entry per position on their second-last axis and roll back by forgetting positions;
    ``window`` states hold the last few steps and ``recurrent`` ones a summary of all, so going back means computing the
    kept tokens again.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str

    @property
    def rolls_back(self) -> bool:
        """Whether the last tokens are forgotten by moving the position, with no change of the contents."""
        return self.kind == "positional"

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        spec = cls(
            name=fields.take("name", str),
            dtype=fields.take("dtype", str),
            shape=fields.integers("shape"),
            kind=fields.take("kind", str),
        )
        fields.finish()
        sound = 2 <= len(spec.shape) <= 8 and min(spec.shape) > 0 and math.prod(spec.shape) <= MAX_STATE_VALUES
        if spec.kind not in STATE_KINDS or spec.dtype != "float32" or not sound:
            raise BundleError(f"state {spec.name} is {spec.dtype} {list(spec.shape)} {spec.kind}, which can't be held")
        return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """An ONNX graph, its external weights and its interface."""

    file: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]

    @classmethod
    def from_fields(cls, fields: Fields, where: str) -> Self:
        graph = cls(
            file=fields.take("file", str),
            weights=fields.take("weights", str),
            inputs=_each(fields, "inputs", TensorSpec, where),
            outputs=_each(fields, "outputs", TensorSpec, where),
            states=_each(fields, "states", StateSpec, where),
        )
        fields.finish()
        return graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A part of every row of a table: row i is ``row_bytes`` bytes at ``offset + i * row_bytes`` of ``file``.

    ``file`` is a path inside the bundle, or an absolute path where ``external`` (tables read in place); ``identity``
    then tells whether it is still the same file, see `engram_runtime.bundle.file_identity`.
    """

    file: str
    external: bool
    offset: int
    row_bytes: int
    identity: str | None = None

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        extent = cls(
            file=fields.take("file", str),
            external=fields.take("external", bool),
            offset=fields.count("offset"),
            row_bytes=fields.count("row_bytes", least=1),
            identity=fields.optional_text("identity"),
        )
        fields.finish()
        if extent.external != PurePosixPath(extent.file).is_absolute():
            raise BundleError(f"extent {extent.file} must be absolute if external and relative if not")
        if extent.external != (extent.identity is not None):
            raise BundleError(f"extent {extent.file} must have an identity if external and none if not")
        return extent


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyerSpec:
    """Constants of `engram_runtime.hashing.NgramHash`; ``token_map`` is a file of the bundle or None."""

    kind: str
    orders: tuple[int, ...]
    num_heads: int
    multipliers: tuple[int, ...]
    primes: tuple[int, ...]
    offsets: tuple[int, ...]
    pad_id: int
    token_map: str | None

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        keyer = cls(
            kind=fields.take("kind", str),
            orders=fields.integers("orders"),
            num_heads=fields.count("num_heads"),
            multipliers=fields.integers("multipliers"),
            primes=fields.integers("primes"),
            offsets=fields.integers("offsets"),
            pad_id=fields.count("pad_id"),
            token_map=fields.optional_text("token_map"),
        )
        fields.finish()
        keyer.check()
        return keyer

    def ngram_hash(self, token_map: NDArray[np.int64] | None) -> NgramHash:
        """Return the hash with these constants; ``token_map`` is ``[V]``, or None where raw ids are hashed."""
        return NgramHash(
            orders=self.orders,
            num_heads=self.num_heads,
            multipliers=np.array(self.multipliers, dtype=np.int64),
            primes=np.array(self.primes, dtype=np.int64),
            offsets=np.array(self.offsets, dtype=np.int64),
            pad_id=self.pad_id,
            token_map=token_map,
        )

    def check(self) -> None:
        """Refuse constants that contradict each other."""
        if self.kind not in HASH_KINDS:
            raise BundleError(f"keyer kind {self.kind!r} is unknown; known are {list(HASH_KINDS)}")
        ascending = list(self.orders) == sorted(set(self.orders))
        if not self.orders or not ascending or self.orders[0] < 1 or self.orders[-1] > 16:
            raise BundleError(f"n-gram orders are {list(self.orders)}, expected ascending lengths from 1 to 16")
        if len(self.multipliers) != max(self.orders) or min(self.multipliers) < 1:
            raise BundleError(f"keyer has multipliers {list(self.multipliers)}, expected {max(self.orders)} positive")
        columns = len(self.orders) * self.num_heads
        if not 0 < len(self.primes) == len(self.offsets) == columns:
            raise BundleError(
                f"keyer has {len(self.primes)} primes and {len(self.offsets)} offsets, expected {columns} of each"
            )
        if min(self.primes) < 2:
            raise BundleError(f"keyer has primes {list(self.primes)}, expected numbers from 2")
        running = 0
        for prime, offset in zip(self.primes, self.offsets, strict=True):
            if offset != running:
                raise BundleError(f"keyer offset is {offset}, the primes before it sum to {running}")
            running += prime


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """A host table: site name, rows, record format, where the records lie and how histories become row ids."""

    site: str
    num_rows: int
    record: RecordFormat
    extents: tuple[Extent, ...]
    keyer: KeyerSpec

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        record = fields.fields("record")
        table = cls(
            site=fields.take("site", str),
            num_rows=fields.count("num_rows"),
            record=RecordFormat(
                payload=record.take("payload", str), columns=record.count("columns"), scale=record.take("scale", str)
            ),
            extents=_each(fields, "extents", Extent, "table"),
            keyer=KeyerSpec.from_fields(fields.fields("keyer")),
        )
        record.finish()
        fields.finish()
        table.check()
        return table

    def check(self) -> None:
        """Refuse a table whose rows, records and hash disagree."""
        if (total := sum(self.keyer.primes)) != self.num_rows:
            raise BundleError(f"table {self.site} has {self.num_rows} rows, the primes of its hash sum to {total}")
        if (total := sum(extent.row_bytes for extent in self.extents)) != self.record.record_bytes:
            raise BundleError(
                f"table {self.site} has {total} bytes a row in its extents, its record {self.record.record_bytes}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a caller needs to know of the model."""

    name: str
    family: str
    quantisation: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        info = cls(
            name=fields.take("name", str),
            family=fields.take("family", str),
            quantisation=fields.take("quantisation", str),
            vocab_size=fields.count("vocab_size", least=1),
            hidden_size=fields.count("hidden_size", least=1),
            num_layers=fields.count("num_layers", least=1),
            context_length=fields.count("context_length", least=1),
        )
        fields.finish()
        return info


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole of ``engram.json``."""

    producer: str
    model: ModelInfo
    decoder: GraphSpec
    tables: tuple[TableSpec, ...]
    files: tuple[FileEntry, ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Parse and check; raises BundleError naming the key."""
        fields = Fields(raw, "manifest")
        version = fields.count("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(f"bundle has format version {version}, this runtime reads {FORMAT_VERSION}")
        graphs = fields.fields("graphs")
        manifest = cls(
            producer=fields.take("producer", str),
            model=ModelInfo.from_fields(fields.fields("model")),
            decoder=GraphSpec.from_fields(graphs.fields("decoder"), "decoder"),
            tables=_each(fields, "tables", TableSpec, "manifest"),
            files=_each(fields, "files", FileEntry, "manifest"),
        )
        graphs.finish()
        fields.fields("extensions").remaining()
        fields.finish()
        manifest.check()
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        raw = asdict(self)
        graphs = {"decoder": raw.pop("decoder")}
        return {"format_version": FORMAT_VERSION, **raw, "graphs": graphs, "extensions": {}}

    def check(self) -> None:
        """Refuse references to files that the manifest does not list, and names that stand twice."""
        listed = [entry.path for entry in self.files]
        known = set(listed)
        token_maps = [table.keyer.token_map for table in self.tables if table.keyer.token_map is not None]
        extents = [extent.file for table in self.tables for extent in table.extents if not extent.external]
        for path in [self.decoder.file, self.decoder.weights, *token_maps, *extents]:
            if path not in known:
                raise BundleError(f"manifest refers to {path!r}, which is not among its files")
        _refuse_twice(listed, "file")
        _refuse_twice([table.site for table in self.tables], "table site")
        _refuse_twice([state.name for state in self.decoder.states], "state")
        self._check_interface()

    def _check_interface(self) -> None:
        """Hold the graph against the model and the tables: compiled code takes its arguments by position, unchecked."""
        inputs: list[tuple[str, str, tuple[int | str, ...]]] = [
            ("token_ids", "int64", ("T",)),
            ("position", "int64", (1,)),
            ("logit_rows", "int64", ("R",)),
        ]
        for table in self.tables:
            inputs.append((f"rows.{table.site}", "float32", ("T", len(table.keyer.primes), table.record.columns)))
        found = [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.decoder.inputs]
        if found != inputs:
            raise BundleError(f"the graph's inputs are {found}, its tables call for {inputs}")
        outputs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.decoder.outputs]
        expected = [("logits", "float32", ("R", self.model.vocab_size))]
        if outputs != expected:
            raise BundleError(f"the graph's outputs are {outputs}, its vocabulary calls for {expected}")
        for state in self.decoder.states:
            if state.rolls_back and (len(state.shape) < 2 or state.shape[-2] != self.model.context_length):
                raise BundleError(
                    f"state {state.name} has shape {list(state.shape)}, expected {self.model.context_length} positions "
                    f"on its second-last axis"
                )


def contained_path(path: str) -> str:
    """Return ``path`` if it is a plain relative POSIX path that stays inside its folder."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise BundleError(f"path {path!r} leaves the bundle; only plain relative paths are allowed")
    return path


def _each(fields: Fields, name: str, kind: Any, where: str) -> tuple[Any, ...]:
    return tuple(kind.from_fields(Fields(item, f"{where}.{name}[{i}]")) for i, item in enumerate(fields.items(name)))


def _refuse_twice(names: list[str], what: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise BundleError(f"manifest names {what} {name!r} twice")
