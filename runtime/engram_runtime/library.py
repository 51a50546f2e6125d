"""A compiled library of a bundle, ``lib/<target>/``: what it was made from, what it needs, how it is called."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from engram_runtime.bundle import Bundle, file_sha256, plain_file
from engram_runtime.cpu import TILE_FLAGS, cpu_flags, machine, request_tiles
from engram_runtime.errors import BundleError, TargetError
from engram_runtime.executor import ALIGNMENT_BYTES, MOST_THREADS
from engram_runtime.manifest import DECODER, DRAFT_HEAD, contained_path
from engram_runtime.strict_json import Fields, read_json_object, version_error
from engram_runtime.table_spec import TableSpec

LIBRARY_FOLDER = "lib"
LIBRARY_INFO_NAME = "compile.json"
LIBRARY_INFO_VERSION = 8
AWAIT_ROWS = "engram.await_rows"  # a global function of the process that a library calls, see `LibraryInfo`
CPU, NPU, OPENCL, CUDA, METAL = DEVICES = ("cpu", "npu", "opencl", "cuda", "metal")  # that run libraries
GPUS = (OPENCL, CUDA, METAL)
LIBRARY_PARTS = ("library", "runtime", "weights", "commands")
ITEM_BYTES = {"int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "int32": 4, "float32": 4, "int64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """A weight in the packed file: ``shape`` of ``dtype`` at ``offset``, 64-byte aligned."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        tensor = cls(
            name=fields.take("name", str),
            dtype=fields.take("dtype", str),
            shape=fields.integers("shape"),
            offset=fields.count("offset"),
        )
        fields.finish()
        if tensor.dtype not in ITEM_BYTES or min(tensor.shape, default=1) < 1 or tensor.offset % ALIGNMENT_BYTES:
            raise BundleError(
                f"packed tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)} at byte {tensor.offset}, "
                f"which can't be mapped; compile again"
            )
        return tensor

    @property
    def end(self) -> int:
        """Offset of the first byte after the tensor."""
        return self.offset + math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryInfo:
    """The content of ``compile.json``.

    The library has a `pass_function` of the decoder and, where there is one, the draft head for each (T, R) of
    ``passes``; its arguments are the graph's inputs and states in manifest order, then the packed weights that
    ``graph_tensors`` names by their place in ``tensors``.
    It has a `batch_function` of the decoder for each number of sequences in ``batches``, ascending: those arguments, a
    token and a position of each sequence, and all states of the first one, then of the second one, ...
    It returns the logits, the graph's `told_outputs`, the windows and recurrent states, and, of the decoder, for each
    entry of ``expert_bytes``, a layer with experts, how many experts of that size it has read, int32 ``[1]``.
    Before they read the rows of a table, they call `AWAIT_ROWS` with that argument and the table's place in manifest
    order, which returns the argument once it is filled.
    A `row_function` for each kind of records takes the arguments of `engram_runtime.tables.decoding.RowDecoder`.
    ``threads`` is how many run it unless told otherwise, 0 for one on each core this process may use.
    States in ``float16_states`` are float16, the others float32.
    ``runtime`` is TVM's runtime library, None for a kind of machine for which no wheel of apache-tvm has one.
    ``device`` is what runs the linear layers, beside a CPU as ``machine`` and ``cpu_flags`` say that runs the rest.
    Another device than that CPU finds its streams of commands in the file ``commands``, which is None for a CPU.
    A GPU (``GPUS``) has no part of a library run by a processor: ``machine`` and ``ffi`` are empty, ``library`` is the
    source of its kernels and ``commands`` the plan of launches that `engram_runtime.gpu.plan` describes.
    ``ffi`` is the version of apache-tvm-ffi that it was compiled for.
    ``sha256`` holds the digests of `files`.
    """

    target: str
    device: str
    machine: str
    cpu_flags: tuple[str, ...]
    graph_sha256: str
    compiler: str
    ffi: str
    library: str
    runtime: str | None
    weights: str
    commands: str | None
    weights_bytes: int
    sha256: dict[str, str]
    passes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    tensors: tuple[PackedTensor, ...]
    graph_tensors: dict[str, tuple[int, ...]]
    expert_bytes: tuple[int, ...]
    threads: int
    float16_states: tuple[str, ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Parse; raises BundleError naming the key."""
        fields = Fields(raw, LIBRARY_INFO_NAME)
        _check_version(fields)
        info = cls(
            target=fields.take("target", str),
            device=fields.take("device", str),
            machine=fields.take("machine", str),
            cpu_flags=fields.texts("cpu_flags"),
            graph_sha256=fields.take("graph_sha256", str),
            compiler=fields.take("compiler", str),
            ffi=fields.take("ffi", str),
            library=contained_path(fields.take("library", str)),
            runtime=None if (runtime := fields.optional_text("runtime")) is None else contained_path(runtime),
            weights=contained_path(fields.take("weights", str)),
            commands=None if (commands := fields.optional_text("commands")) is None else contained_path(commands),
            weights_bytes=fields.count("weights_bytes", least=1),
            sha256=_digests(fields.fields("sha256"), [part for part in LIBRARY_PARTS if raw.get(part) is not None]),
            passes=tuple(_forward_pass(item) for item in fields.integer_lists("passes")),
            batches=fields.integers("batches"),
            tensors=tuple(
                PackedTensor.from_fields(Fields(item, f"{LIBRARY_INFO_NAME}.tensors[{i}]"))
                for i, item in enumerate(fields.items("tensors"))
            ),
            graph_tensors=_graph_tensors(fields.fields("graph_tensors")),
            expert_bytes=fields.integers("expert_bytes"),
            threads=fields.count("threads"),
            float16_states=fields.texts("float16_states"),
        )
        fields.finish()
        info.check()
        return info

    def check(self) -> None:
        """Refuse a library that can't run every number of tokens, or whose tensors lie outside its weights."""
        self._check_device()
        counts = {1, *(tokens for tokens, _ in self.passes)}
        needed = {(tokens, rows) for tokens in counts for rows in (1, tokens)}
        if lacking := sorted(needed - set(self.passes)):
            raise BundleError(f"library lacks the forward passes {lacking}; compile again")
        if min(self.batches, default=2) < 2 or list(self.batches) != sorted(set(self.batches)):
            raise BundleError(
                f"library runs {list(self.batches)} sequences at once, expected ascending numbers from 2; compile again"
            )
        for tensor in self.tensors:
            if tensor.end > self.weights_bytes:
                raise BundleError(
                    f"packed tensor {tensor.name} ends at byte {tensor.end} of {self.weights_bytes}; compile again"
                )
        for graph, used in self.graph_tensors.items():
            if outside := [place for place in used if not 0 <= place < len(self.tensors)]:
                raise BundleError(
                    f"{graph} takes packed tensor {outside[0]}, the library has {len(self.tensors)}; compile again"
                )
        if self.threads > MOST_THREADS:
            raise BundleError(f"library asks for {self.threads} threads, the most are {MOST_THREADS}; compile again")
        if min(self.expert_bytes, default=1) < 1:
            raise BundleError(f"experts have {list(self.expert_bytes)} bytes, which can't be; compile again")

    def _check_device(self) -> None:
        if self.device not in DEVICES:
            raise BundleError(f"library is for device {self.device!r}, there are {list(DEVICES)}; compile again")
        if (self.commands is None) != (self.device == CPU):
            raise BundleError(
                f"library is for device {self.device!r} and has commands {self.commands!r}, "
                f"which only another device than the CPU takes; compile again"
            )

    @property
    def files(self) -> dict[str, str]:
        """Names of its files by `LIBRARY_PARTS`, of those it has."""
        names = {part: getattr(self, part) for part in LIBRARY_PARTS}
        return {part: name for part, name in names.items() if name is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        return {"version": LIBRARY_INFO_VERSION, **asdict(self)}

    def to_bytes(self) -> bytes:
        """Return the bytes of ``compile.json``."""
        return json.dumps(self.to_dict()).encode()

    @property
    def digest(self) -> str:
        """The SHA-256 of `to_bytes`, and so of all the library's files: by it a library is known to be trusted."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def misfit(self) -> str | None:
        """Say why this machine can't run the library, or None if it can."""
        if self.device in GPUS:
            return None  # its driver builds the source, for whatever it has
        if self.machine != machine():
            return f"{self.target} is for {self.machine}, this machine is {machine()}"
        if lacking := sorted(set(self.cpu_flags) - cpu_flags()):
            return f"{self.target} needs CPU features {lacking} this machine lacks"
        if TILE_FLAGS & set(self.cpu_flags) and not request_tiles():
            return f"{self.target} needs AMX tiles, which the kernel keeps from this process (arch_prctl is denied)"
        if (found := installed_ffi()) not in (self.ffi, None):
            return f"{self.target} was compiled for apache-tvm-ffi {self.ffi}, this Python has {found}"
        return None


@runtime_checkable
class Compiled(Protocol):
    """An executor that runs a compiled library, which lies in ``folder``."""

    folder: Path
    info: LibraryInfo


def installed_ffi() -> str | None:
    """Return the version of apache-tvm-ffi that this Python has."""
    try:
        return version("apache-tvm-ffi")
    except PackageNotFoundError:
        return None


def pass_function(graph: str, tokens: int, rows: int) -> str:
    """Return the name of the function that runs a graph over so many tokens, with so many rows of logits."""
    return f"{'forward' if graph == DECODER else graph}_{tokens}_{rows}"


def batch_function(sequences: int) -> str:
    """Return the name of the function that runs the decoder over a token of each of so many sequences."""
    return f"batch_{sequences}"


def row_function(table: TableSpec) -> str:
    """Return the name of the function that decodes records like a table's."""
    record = table.record
    factor = np.float32(float.fromhex(record.factor)).tobytes().hex()
    parts = "_".join(str(part.row_bytes) for part in table.parts)
    return f"rows_{record.payload}_{record.columns}_{record.scale}_{record.scale_columns}_{factor}_{parts}"


def _check_version(fields: Fields) -> None:
    if (found := fields.count("version")) != LIBRARY_INFO_VERSION:
        raise version_error("library has", found, LIBRARY_INFO_VERSION, "compile again")


def _forward_pass(counts: tuple[int, ...]) -> tuple[int, int]:
    if len(counts) != 2 or min(counts) < 1:
        raise BundleError(f"{LIBRARY_INFO_NAME} has forward pass {list(counts)}, expected tokens and rows of logits")
    tokens, rows = counts
    return tokens, rows


def _graph_tensors(fields: Fields) -> dict[str, tuple[int, ...]]:
    used = {DECODER: fields.integers(DECODER)}
    if fields.given(DRAFT_HEAD):
        used[DRAFT_HEAD] = fields.integers(DRAFT_HEAD)
    fields.finish()
    return used


def _digests(fields: Fields, parts: Sequence[str]) -> dict[str, str]:
    digests = {part: fields.take(part, str) for part in parts}
    fields.finish()
    return digests


def verify_library(folder: Path, info: LibraryInfo) -> None:
    """Hash a library's files; raises what `verify_part` does of the first one that is not what was compiled."""
    for part in info.files:
        verify_part(folder, info, part)


def verify_part(folder: Path, info: LibraryInfo, part: str) -> None:
    """Hash one of `LibraryInfo.files`.

    Raises:
        BundleError: it is missing, or no plain file: a pipe would be waited for, and a device has no end.
        TargetError: its contents are not those compiled.
    """
    path = folder / info.files[part]
    plain_file(folder, info.files[part])
    if file_sha256(path) != info.sha256[part]:
        raise TargetError(f"{path} is not what was compiled; compile the bundle again")


def graph_digest(bundle: Bundle) -> str:
    """Return the SHA-256 of the graphs that are compiled and their weights as the manifest states them."""
    decoder = bundle.manifest.decoder
    heads = [graph.file for name, graph in bundle.manifest.graphs.items() if name == DRAFT_HEAD]
    return "+".join(bundle.manifest.entry(path).sha256 for path in (decoder.file, decoder.weights, *heads))


def find_library(bundle: Bundle, target: str | None = None) -> tuple[Path, LibraryInfo]:
    """Return folder and description of the library for ``target``, or of the one for a CPU that fits this machine best.

    Without a target, the most specific one wins, and libraries for other devices than CPUs are passed over.

    Raises:
        BundleError: the bundle has no decoder to compile.
        TargetError: none was compiled, or none fits, with each one's reason.
    """
    digest = graph_digest(bundle)
    mend = _mend(bundle, target or "native")
    path, info = _most_specific(bundle, mend) if target is None else _of_target(bundle, target)
    if info.graph_sha256 != digest:
        raise TargetError(f"library {path} was compiled from another graph than this bundle holds; {mend}")
    states = {state.name for graph in bundle.manifest.graphs.values() for state in graph.states}
    if unknown := sorted(set(info.float16_states) - states):
        raise TargetError(f"library {path} has states {unknown} this bundle lacks; {mend}")
    return path, info


def library_infos(bundle: Bundle) -> list[tuple[Path, LibraryInfo]]:
    """Return folder and description of all libraries of a bundle; raises BundleError where one is damaged."""
    paths = _info_paths(bundle).values()
    return [(path.parent, LibraryInfo.from_dict(read_json_object(path))) for path in paths]


def library_device(bundle: Bundle, target: str | None) -> str:
    """Return the device that the library for ``target`` is for, a CPU without one.

    Raises:
        BundleError: the library's description is damaged or of another version.
        TargetError: none was compiled for the target.
    """
    if target is None:
        return CPU
    fields = Fields(read_json_object(_info_path(bundle, target)), LIBRARY_INFO_NAME)
    _check_version(fields)
    return fields.take("device", str)


def _mend(bundle: Bundle, target: str) -> str:
    """Return how to get a library: a packed bundle has no graph to compile."""
    if bundle.manifest.omitted:
        return "pack the bundle it was made of for this machine: engram pack BUNDLE --target NAME"
    return f"run: engram compile {bundle.path} --target {target}"


def _info_paths(bundle: Bundle) -> dict[str, Path]:
    """Return the descriptions of a bundle's libraries by target."""
    if bundle.file(LIBRARY_FOLDER).is_symlink():
        raise BundleError(f"{LIBRARY_FOLDER} in bundle {bundle.path} is a link; bundles hold plain files only")
    found = sorted(bundle.file(LIBRARY_FOLDER).glob(f"[!.]*/{LIBRARY_INFO_NAME}"))
    for path in found:
        plain_file(bundle.path, path.relative_to(bundle.path).as_posix())
    return {path.parent.name: path for path in found}


def _info_path(bundle: Bundle, target: str) -> Path:
    found = _info_paths(bundle)
    if target not in found:
        raise TargetError(
            f"bundle {bundle.path} has no library for target {target!r}, it has {list(found)}; {_mend(bundle, target)}"
        )
    return found[target]


def _of_target(bundle: Bundle, target: str) -> tuple[Path, LibraryInfo]:
    path = _info_path(bundle, target)
    info = LibraryInfo.from_dict(read_json_object(path))
    if misfit := info.misfit():
        raise TargetError(f"library {path.parent} can't run here: {misfit}")
    return path.parent, info


def _most_specific(bundle: Bundle, mend: str) -> tuple[Path, LibraryInfo]:
    contents = [(path.parent, read_json_object(path)) for path in _info_paths(bundle).values()]
    # What an older engram-edge compiled for another target may stand beside what replaces it.
    current = [(path, raw) for path, raw in contents if raw.get("version") == LIBRARY_INFO_VERSION]
    for_cpus = [(path, raw) for path, raw in current or contents if raw.get("device", CPU) == CPU]
    if not for_cpus:
        others = f" but for {[path.name for path, _ in contents]}, which --target picks" if contents else ""
        raise TargetError(f"bundle {bundle.path} has no compiled library{others}; {mend}")
    infos = [(path, LibraryInfo.from_dict(raw)) for path, raw in for_cpus]
    fitting = [(path, info) for path, info in infos if info.misfit() is None]
    if not fitting:
        reasons = "; ".join(str(info.misfit()) for _, info in infos)
        raise TargetError(f"no library of bundle {bundle.path} runs here: {reasons}; {mend}")
    return max(fitting, key=lambda pair: len(pair[1].cpu_flags))
