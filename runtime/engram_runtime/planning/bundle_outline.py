"""The outline of a bundle, from its manifest, the header of its weights and its library's description."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TargetError
from engram_runtime.library import LibraryInfo, find_library
from engram_runtime.manifest import DECODER
from engram_runtime.planning.onnx_nodes import node_numbers
from engram_runtime.planning.outline import DRAFT, EXPERTS, ROTATIONS, Outline, Part, Table, layers_before, role_of
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.opening import table_facts

EXPERT_OPERATORS = ("MoE", "QMoE", "UnnormalisedMoE")
CHOSEN = "k"  # their attribute that says how many experts a token reads
ITEM_BYTES = {"F32": 4, "I64": 8, "U8": 1}
CODES, MULTIPLIER, ZERO, SCALE, BLOCK_SCALE = "codes", "multiplier", "zero", "scale", "block_scale"
PARAMETERS = (CODES, MULTIPLIER, ZERO, SCALE, BLOCK_SCALE, "weight")
INT4_BLOCK_BYTES = 16  # of 32 codes

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # dtype and shape of tensors by name


def outline_bundle(bundle: Bundle) -> Outline:
    """Return the outline of a bundle.

    Raises:
        BundleError: the decoder's graph can't be read.
    """
    manifest = bundle.manifest
    model, decoder = manifest.model, manifest.graphs.get(DECODER)
    library = _library(bundle)
    parts = [] if decoder is None else list(bundle_parts(bundle, library))
    return Outline(
        path=bundle.path,
        model=model.name,
        family=model.family,
        quantisation=model.quantisation,
        parameters=sum(part.values for part in parts if part.role != ROTATIONS),
        source_bytes=sum(entry.bytes for entry in manifest.files),
        read_from="the bundle's manifest, header and graph",
        vocab_size=model.vocab_size,
        num_layers=model.num_layers,
        context_length=model.context_length,
        parts=parts,
        states=() if decoder is None else decoder.states,
        tables=[_table(bundle, spec) for spec in manifest.tables],
        foreign={},
        export=None,
        weights_file=None if decoder is None else bundle.file(decoder.weights),
        target=None if library is None else library.target,
        float16_states=frozenset() if library is None else frozenset(library.float16_states),
    )


def _library(bundle: Bundle) -> LibraryInfo | None:
    if DECODER not in bundle.manifest.graphs:
        return None
    try:
        return find_library(bundle)[1]
    except TargetError:  # none was compiled, or none fits: that is for the plan to say
        return None


def bundle_parts(bundle: Bundle, library: LibraryInfo | None) -> Iterator[Part]:
    """Yield the parts of a decoder; packed as the library has them, or as one would."""
    decoder = bundle.manifest.decoder
    shapes = _shapes(bundle.graph_file(decoder.weights))
    chosen = node_numbers(bundle.file(decoder.file), EXPERT_OPERATORS, CHOSEN)
    packed = {} if library is None else _packed(library)
    tied = not any(name.startswith("lm_head.") for name in shapes)
    groups = _grouped(shapes)
    for name, own in groups.items():
        packed_bytes = None if library is None else packed.get(name, 0)
        yield _part(name, own, tied=tied, top_k=chosen[0] if chosen else 1, packed=packed_bytes)
    for name in sorted(packed.keys() - groups.keys()):  # rows of the embedding, which a draft head has a copy of
        yield Part(name=name, role=DRAFT, outputs=0, inputs=0, stored_bytes=0, packed_bytes=packed[name])


def _part(name: str, own: Shapes, *, tied: bool, top_k: int, packed: int | None) -> Part:
    stored = {key: prod(shape) * ITEM_BYTES[dtype] for key, (dtype, shape) in own.items()}
    role = role_of(name, tied=tied)
    copies, outputs, inputs = _matrix(own, role)
    return Part(
        name=name,
        role=role,
        outputs=outputs,
        inputs=inputs,
        stored_bytes=sum(stored.values()),
        # The packed form of int4 has a byte a block for multiplier and zero together.
        packed_bytes=sum(stored.values()) - stored.get(ZERO, 0) if packed is None else packed,
        copies=copies,
        chosen=top_k if role == EXPERTS else 1,
    )


def _matrix(own: Shapes, role: str) -> tuple[int, int, int]:
    """Return the number of matrices, their outputs and their inputs."""
    key = CODES if CODES in own else next(iter(own))
    _, shape = own[key]
    if role == EXPERTS:
        copies, outputs, columns = shape
        return copies, outputs, columns * (2 if MULTIPLIER in own else 1)
    int4 = key == CODES and shape[-1] == INT4_BLOCK_BYTES
    return 1, shape[0], prod(shape[1:]) * (2 if int4 else 1)


def _shapes(path: Path) -> Shapes:
    with safe_open(path, "numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _grouped(shapes: Shapes) -> Mapping[str, Shapes]:
    """Return the tensors of each part by their last name."""
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, entry in shapes.items():
        part, _, parameter = name.rpartition(".")
        if parameter in PARAMETERS:
            groups[part][parameter] = entry
        else:
            groups[name][parameter] = entry
    return groups


def _packed(library: LibraryInfo) -> Mapping[str, int]:
    """Return the packed bytes of each part; what a tensor was made of comes before a colon."""
    sizes: dict[str, int] = defaultdict(int)
    for tensor in library.tensors:
        name = tensor.name.split(":")[0]
        part, _, parameter = name.rpartition(".")
        sizes[part if parameter in PARAMETERS else name] += tensor.end - tensor.offset
    return sizes


def _table(bundle: Bundle, spec: TableSpec) -> Table:
    return Table(
        num_rows=spec.num_rows,
        record_bytes=spec.record.record_bytes,
        rows=spec.keyer.columns,
        parts=len(spec.parts),
        layers_before=layers_before(spec.site, bundle.manifest.model.num_layers),
        facts=table_facts(bundle, spec),
    )
