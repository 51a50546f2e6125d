"""The manifest ``engram.json``, format version 3: what a bundle says about itself. No floats, no unknown keys."""

import math
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from engram_runtime.errors import BundleError
from engram_runtime.strict_json import Fields
from engram_runtime.table_spec import RowRange, TableSpec, checksums_bytes

FORMAT_VERSION = 3
READ_VERSIONS = (2, FORMAT_VERSION)  # version 2 has no seal and no checksums of tables
AXIS_NAMES = ("T", "R")
STATE_KINDS = ("positional", "window", "recurrent")
MAX_STATE_VALUES = 1 << 34  # 64 GiB of float32; a cache of a million positions is 4 GiB
DECODER = "decoder"
DRAFT_HEAD = "mtp"  # the graph that drafts the token after the next
HIDDEN, NEXT_HIDDEN = "hidden", "next.hidden"  # what a draft head goes on from, and what it leaves for that
EMBEDDINGS = "embeddings"  # a decoder's input for positions that are no tokens
SITE_GRAPH = "site."  # before the name of the site whose graph it is
ROWS = "rows."  # before the name of the site whose input it is
ACTIVITY = "activity."  # before the name of the site whose output it is
ACTIVITY_VALUES = 3  # of each token and stream: gate, norm of what is added, norm of the stream


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
    ``window`` states hold the last few steps and ``recurrent`` ones a summary of all, so going back means going back to
    a copy and computing the kept tokens since then again.
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
            shape = reprlib.repr(list(spec.shape))
            raise BundleError(f"state {spec.name} is {spec.dtype} {shape} {spec.kind}, which can't be held")
        return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """An ONNX graph, its external weights and its interface.

    A decoder's ``outputs`` are the logits and, of sites that gate their rows, ``activity.<site>`` ``[T, G, 3]``; see
    `engram_runtime.activity`. Bundles exported before there were such outputs have the logits alone. For a draft head,
    or beside input embeddings, there is ``hidden`` ``[T, D]`` as well, the last hidden states after the final norm.
    """

    file: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        graph = cls(
            file=fields.take("file", str),
            weights=fields.take("weights", str),
            inputs=tuple(TensorSpec.from_fields(item) for item in fields.objects("inputs")),
            outputs=tuple(TensorSpec.from_fields(item) for item in fields.objects("outputs")),
            states=tuple(StateSpec.from_fields(item) for item in fields.objects("states")),
        )
        fields.finish()
        return graph

    @property
    def activity_outputs(self) -> tuple[str, ...]:
        """Names of the outputs that say what sites do."""
        return tuple(output.name for output in self.outputs if output.name.startswith(ACTIVITY))

    @property
    def takes_embeddings(self) -> bool:
        """Whether there is an input ``embeddings`` ``[T, D]``, read in place of the tokens whose ids are negative."""
        return any(value.name == EMBEDDINGS for value in self.inputs)

    @property
    def told_outputs(self) -> tuple[str, ...]:
        """Names of the outputs beside the logits."""
        return tuple(output.name for output in self.outputs[1:])


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
    """The whole of ``engram.json``; ``graphs`` are named ``decoder``, ``mtp`` and ``site.<site>``.

    Attributes:
        draft_vocabulary: file of the ids that the draft head's logits are for, little-endian int32, or None where
            there is no head.
        omitted: files of graphs that this copy of the bundle does without, as a packed one runs a compiled library;
            size and digest are those they had.
    """

    producer: str
    model: ModelInfo
    graphs: Mapping[str, GraphSpec]
    tables: tuple[TableSpec, ...]
    files: tuple[FileEntry, ...]
    draft_vocabulary: str | None = None
    omitted: tuple[FileEntry, ...] = ()

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Parse and check; raises BundleError naming the key."""
        fields = Fields(raw, "manifest")
        _check_version(fields.count("format_version"))
        manifest = cls(
            producer=fields.take("producer", str),
            model=ModelInfo.from_fields(fields.fields("model")),
            graphs={name: GraphSpec.from_fields(item) for name, item in fields.named_objects("graphs").items()},
            tables=tuple(TableSpec.from_fields(item) for item in fields.objects("tables")),
            files=tuple(FileEntry.from_fields(item) for item in fields.objects("files")),
            draft_vocabulary=(
                contained_path(fields.take("draft_vocabulary", str)) if fields.given("draft_vocabulary") else None
            ),
            omitted=(
                tuple(FileEntry.from_fields(item) for item in fields.objects("omitted"))
                if fields.given("omitted")
                else ()
            ),
        )
        fields.fields("extensions").remaining()
        fields.finish()
        manifest.check()
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        facts = asdict(self)
        if self.draft_vocabulary is None:  # as in bundles of before there were heads
            del facts["draft_vocabulary"]
        if not self.omitted:
            del facts["omitted"]
        for rows in (rows for table in facts["tables"] for part in table["parts"] for rows in part["ranges"]):
            if rows["checksums"] is None:
                del rows["checksums"]
        return {"format_version": FORMAT_VERSION, **facts, "extensions": {}}

    @property
    def decoder(self) -> GraphSpec:
        """The graph from tokens to logits; raises BundleError where there is none."""
        return self.graph(DECODER)

    def graph(self, name: str) -> GraphSpec:
        """Return a graph; raises BundleError where there is none of that name."""
        if name in self.graphs:
            return self.graphs[name]
        if name == DECODER:
            raise BundleError(
                "this bundle holds tables and sites only, no decoder; export without --tables-only to run it"
            )
        raise BundleError(f"this bundle has no graph {name!r}, only {sorted(self.graphs)}")

    @property
    def graph_files(self) -> frozenset[str]:
        """Paths of the graphs and their weights, be they omitted or not."""
        return frozenset(path for graph in self.graphs.values() for path in (graph.file, graph.weights))

    def entry(self, path: str) -> FileEntry:
        """Return what is stated of a file that graphs or tables refer to, be it omitted or not."""
        return next(entry for entry in (*self.files, *self.omitted) if entry.path == path)

    def check(self) -> None:
        """Refuse references to files that the manifest does not list, and names that stand twice."""
        paths = [entry.path for entry in self.files]
        omitted = [entry.path for entry in self.omitted]
        if others := sorted(set(omitted) - self.graph_files):
            raise BundleError(f"manifest omits {others[0]!r}, which is no graph's file")
        listed = {*paths, *omitted}
        graph_files = [path for graph in self.graphs.values() for path in (graph.file, graph.weights)]
        vocabulary = [] if self.draft_vocabulary is None else [self.draft_vocabulary]
        for path in [*graph_files, *vocabulary, *(path for table in self.tables for path in table.files)]:
            if path not in listed:
                raise BundleError(f"manifest refers to {path!r}, which is not among its files")
        _refuse_twice([*paths, *omitted], "file")
        _refuse_twice([path.casefold() for path in (*paths, *omitted)], "file (upper case aside)")
        _refuse_twice([table.site for table in self.tables], "table site")
        for table in self.tables:
            table.keyer.check_vocabulary(self.model.vocab_size)
            for rows in table.ranges:
                self._check_checksums(rows)
        for name, graph in self.graphs.items():
            _refuse_twice([state.name for state in graph.states], "state")
            self._check_graph(name, graph)
        self._check_draft_parts()

    def _check_checksums(self, rows: RowRange) -> None:
        """Refuse checksums that are not one for each block of their file."""
        if rows.checksums is None:
            return
        expected = checksums_bytes(self.entry(rows.file).bytes)
        if (found := self.entry(rows.checksums).bytes) != expected:
            raise BundleError(f"checksums {rows.checksums} hold {found} bytes, those of {rows.file} take {expected}")

    def _check_draft_parts(self) -> None:
        """Refuse some parts of a draft head without the others."""
        decoder = self.graphs.get(DECODER)
        told = decoder is not None and HIDDEN in decoder.told_outputs
        parts = {
            f"graph {DRAFT_HEAD!r}": DRAFT_HEAD in self.graphs,
            f"output {HIDDEN!r} of the decoder": told,
            "draft_vocabulary": self.draft_vocabulary is not None,
        }
        if told and decoder is not None and decoder.takes_embeddings:  # they are told without a head as well
            del parts[f"output {HIDDEN!r} of the decoder"]
        if len(set(parts.values())) > 1:
            missing = [part for part, there in parts.items() if not there]
            raise BundleError(f"the draft head lacks {' and '.join(missing)}; export the bundle again")

    def _check_graph(self, name: str, graph: GraphSpec) -> None:
        """Hold a graph against the model and the tables: compiled code takes its arguments by position, unchecked."""
        sites = {f"{SITE_GRAPH}{table.site}": table for table in self.tables}
        if name == DECODER:
            self._check_decoder(graph)
        elif name == DRAFT_HEAD:
            self._check_draft_head(graph)
        elif name in sites:
            _check_site_graph(name, graph, sites[name])
        else:
            raise BundleError(
                f"graph {name!r} is unknown; expected {DECODER!r}, {DRAFT_HEAD!r} or one of "
                f"{reprlib.repr(sorted(sites))}"
            )
        for state in graph.states:
            if state.rolls_back and state.shape[-2] != self.model.context_length:
                raise BundleError(
                    f"state {state.name} has shape {list(state.shape)}, expected {self.model.context_length} positions "
                    f"on its second-last axis"
                )

    def _check_decoder(self, decoder: GraphSpec) -> None:
        inputs: list[Interface] = [
            *POSITIONS,
            *(_rows_input(table) for table in self.tables),
            *([self._hidden(EMBEDDINGS)] if decoder.takes_embeddings else []),
        ]
        if (found := _interfaces(decoder.inputs)) != inputs:
            raise BundleError(
                f"the graph's inputs are {reprlib.repr(found)}, its tables call for {reprlib.repr(inputs)}"
            )
        logits: list[Interface] = [("logits", "float32", ("R", self.model.vocab_size))]
        if (found := _interfaces(decoder.outputs))[:1] != logits:
            raise BundleError(f"the graph's outputs are {reprlib.repr(found)}, its vocabulary calls for {logits}")
        sites = {f"{ACTIVITY}{table.site}" for table in self.tables}
        for output in found[1:]:
            if output != self._hidden(HIDDEN):
                _check_activity(output, sites)
        _refuse_twice([name for name, _, _ in found], "output")

    def _check_draft_head(self, head: GraphSpec) -> None:
        inputs = [*POSITIONS, self._hidden(HIDDEN)]
        if (found := _interfaces(head.inputs)) != inputs:
            raise BundleError(f"the draft head's inputs are {reprlib.repr(found)}, expected {reprlib.repr(inputs)}")
        found = _interfaces(head.outputs)
        size = head.outputs[0].shape[-1] if head.outputs and head.outputs[0].shape else 0
        expected: list[Interface] = [("logits", "float32", ("R", size)), self._hidden(NEXT_HIDDEN)]
        if found != expected or type(size) is not int or size > self.model.vocab_size:
            raise BundleError(
                f"the draft head's outputs are {reprlib.repr(found)}, expected logits of at most "
                f"{self.model.vocab_size} tokens and {self._hidden(NEXT_HIDDEN)}"
            )

    def _hidden(self, name: str) -> "Interface":
        return name, "float32", ("T", self.model.hidden_size)


Interface = tuple[str, str, tuple[int | str, ...]]  # name, dtype, shape of a tensor
POSITIONS: tuple[Interface, ...] = (
    ("token_ids", "int64", ("T",)),
    ("position", "int64", (1,)),
    ("logit_rows", "int64", ("R",)),
)


def _interfaces(tensors: tuple[TensorSpec, ...]) -> list[Interface]:
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


def _rows_input(table: TableSpec) -> Interface:
    return f"{ROWS}{table.site}", "float32", ("T", table.keyer.columns, table.record.columns)


def _check_activity(output: Interface, names: Collection[str]) -> None:
    name, dtype, shape = output
    sized = len(shape) == 3 and shape[0] == "T" and type(shape[1]) is int and shape[2] == ACTIVITY_VALUES
    if name not in names or dtype != "float32" or not sized:
        raise BundleError(
            f"the graph has output {reprlib.repr(output)}, expected one of {reprlib.repr(sorted(names))}, "
            f"float32 ('T', streams, {ACTIVITY_VALUES})"
        )


def _check_site_graph(name: str, graph: GraphSpec, table: TableSpec) -> None:
    rows = _rows_input(table)
    found = [tensor for tensor in _interfaces(graph.inputs) if tensor[0].startswith(ROWS)]
    if found != [rows]:
        raise BundleError(f"graph {name} takes rows {reprlib.repr(found)}, its table gives {[rows]}")


def _check_version(version: int) -> None:
    if version not in READ_VERSIONS:
        advice = "export it again" if version < FORMAT_VERSION else "it needs a newer engram-edge"
        versions = " and ".join(map(str, READ_VERSIONS))
        raise BundleError(f"bundle has format version {version}, this runtime reads {versions}; {advice}")


def contained_path(path: str) -> str:
    """Return ``path`` if it is a plain relative POSIX path that stays inside its folder."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise BundleError(f"path {path!r} leaves the bundle; only plain relative paths are allowed")
    return path


def _refuse_twice(names: list[str], what: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise BundleError(f"manifest names {what} {name!r} twice")
