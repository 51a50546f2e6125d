"""What is known of a model before any weight is read: its weights by what reads them, its states and its tables."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from engram_runtime.manifest import DRAFT_HEAD, StateSpec
from engram_runtime.tables.place import Place
from engram_runtime.tables.policy import TableFacts

HEAD, DENSE, EXPERTS, EMBEDDING, ROTATIONS, DRAFT = "head", "dense", "experts", "embedding", "rotations", "draft head"
WHOLE = (DENSE, HEAD)  # what every token reads whole; of an embedding and of rotations it reads a row
FLOAT_BYTES, HALF_BYTES = 4, 2
OWN_LAYER = re.compile(r"layers\.(\d+)\.mixer\.")
CACHES = ("key.", "value.")  # the states that a profile may keep in float16
SITE_LAYER = re.compile(r"layer_([0-9]{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The weights of a layer or the like, ``copies`` matrices ``[outputs, inputs]`` or as many values.

    Attributes:
        role: who reads it: `DENSE`, `HEAD`, `EXPERTS`, `EMBEDDING`, `ROTATIONS` or `DRAFT`.
        copies, chosen: number of experts, and how many of them a token reads.
        stored_bytes, packed_bytes: in a bundle's graph, and in the file that a library maps.
    """

    name: str
    role: str
    outputs: int
    inputs: int
    stored_bytes: int
    packed_bytes: int
    copies: int = 1
    chosen: int = 1

    @property
    def values(self) -> int:
        """Return the number of weights."""
        return self.copies * self.outputs * self.inputs

    def read(self, size: int) -> int:
        """Return what a token reads of ``size``, which is of all copies."""
        return size * self.chosen // self.copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A host table.

    Attributes:
        record_bytes: of a row as the bundle holds it.
        rows: a token reads, each in as many places as ``parts``.
        layers_before: the share of the model's layers that run before its rows are needed.
        facts: what the choice of how to read it goes by.
    """

    num_rows: int
    record_bytes: int
    rows: int
    parts: int
    layers_before: float
    facts: TableFacts

    @property
    def site(self) -> str:
        """The name of its site."""
        return self.facts.site

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self.facts.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportNeeds:
    """What an export takes.

    Attributes:
        peak_bytes: memory above the interpreter and its imports, or None where it was never measured.
        disk_bytes: what is written: graph, tables and, once it is compiled, packed weights.
        quant, context, table_dtype: its options.
        tables_only: whether nothing but tables and sites can be exported.
    """

    peak_bytes: int | None
    disk_bytes: int
    quant: str
    context: int | None
    table_dtype: str | None
    tables_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model.

    Attributes:
        path: the bundle or checkpoint.
        source_bytes: what lies there now, or should by its index; None where that doesn't tell.
        read_from: what the sizes were read from, in words.
        parts: of the decoder and a draft head, or of sites alone.
        states: the decoder's; none where there is no decoder.
        foreign: bytes by what they hold, of parts that can't be exported.
        target: of the library that a bundle has for this machine, None where it has none.
        float16_states: those that this library keeps in float16.
        export: what exporting it takes, or None for what is a bundle already.
        weights_file: one that is there to be read, or None.
    """

    path: Path
    model: str
    family: str
    quantisation: str
    parameters: int
    source_bytes: int | None
    read_from: str
    vocab_size: int
    num_layers: int
    context_length: int
    parts: Sequence[Part]
    states: Sequence[StateSpec]
    tables: Sequence[Table]
    foreign: dict[str, int]
    export: ExportNeeds | None
    weights_file: Path | None
    target: str | None = None
    float16_states: frozenset[str] = frozenset()

    @property
    def runs(self) -> bool:
        """Whether there is a decoder to run."""
        return bool(self.states)

    def stored(self, *roles: str) -> int:
        """Return the bytes in the graph of parts with these roles."""
        return sum(part.stored_bytes for part in self.of(*roles))

    def packed(self, *roles: str) -> int:
        """Return their bytes in the packed file."""
        return sum(part.packed_bytes for part in self.of(*roles))

    def of(self, *roles: str) -> Iterable[Part]:
        """Return the parts with these roles, all of them where none is given."""
        return [part for part in self.parts if not roles or part.role in roles]

    @property
    def whole_bytes(self) -> int:
        """Bytes of weights that each pass reads whole."""
        return self.packed(*WHOLE)

    @property
    def expert_bytes(self) -> int:
        """Bytes of experts that a token reads."""
        return sum(part.read(part.packed_bytes) for part in self.of(EXPERTS))

    def cache_bytes(self, positions: int) -> int:
        """Return the bytes of the caches of so many positions."""
        return sum(self._state_bytes(state) * positions // state.shape[-2] for state in self.states if state.rolls_back)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states whose size doesn't depend on the length of a text."""
        return sum(self._state_bytes(state) for state in self.states if not state.rolls_back)

    @property
    def attention_width(self) -> int:
        """Channels of all heads of all layers that attend to earlier positions."""
        caching = {state.name.removeprefix("key.") for state in self.states if state.name.startswith("key.")}
        sharing = {found[1] for part in self.parts if part.name.endswith("mixer.query") and (found := _layer(part))}
        return sum(
            part.inputs
            for part in self.parts
            if part.name.endswith("mixer.output") and (found := _layer(part)) and found[1] in caching | sharing
        )

    def _state_bytes(self, state: StateSpec) -> int:
        return prod(state.shape) * (HALF_BYTES if state.name in self.float16_states else FLOAT_BYTES)


def _layer(part: Part) -> re.Match[str] | None:
    return OWN_LAYER.match(part.name)


def role_of(name: str, *, tied: bool) -> str:
    """Return who reads a parameter of that name; a tied embedding is the head, and read whole."""
    first = name.split(".")[0]
    if ".experts." in name:
        return EXPERTS
    if first == "embedding":
        return HEAD if tied else EMBEDDING
    return {"lm_head": HEAD, "rotations": ROTATIONS, DRAFT_HEAD: DRAFT}.get(first, DENSE)


def layers_before(site: str, num_layers: int) -> float:
    """Return the share of the layers that run before a site, none for one at the input."""
    found = SITE_LAYER.fullmatch(site)
    return 0.0 if found is None else int(found[1]) / num_layers


def half_caches(outline: Outline) -> Outline:
    """Return the outline with float16 keys and values, as a library not compiled yet would have them."""
    if outline.target is not None:
        return outline
    return dataclasses.replace(
        outline, float16_states=frozenset(state.name for state in outline.states if state.name.startswith(CACHES))
    )


def tables_on(outline: Outline, place: Place) -> Outline:
    """Return the outline with its tables elsewhere."""
    tables = [
        dataclasses.replace(table, facts=dataclasses.replace(table.facts, place=place, leased=True))
        for table in outline.tables
    ]
    return dataclasses.replace(outline, tables=tables)
