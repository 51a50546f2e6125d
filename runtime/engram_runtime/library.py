"""A compiled library of a bundle, ``lib/<target>/``: what it was made from, what it needs, how it is called."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from engram_runtime.bundle import Bundle
from engram_runtime.cpu import cpu_flags, machine
from engram_runtime.errors import BundleError, TargetError
from engram_runtime.strict_json import Fields, read_json_object

LIBRARY_FOLDER = "lib"
LIBRARY_INFO_NAME = "compile.json"
LIBRARY_INFO_VERSION = 1


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
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryInfo:
    """The content of ``compile.json``.

    The library's functions are ``forward_<T>_<R>`` for each (T, R) of ``passes``; their arguments are token_ids,
    position, logit_rows, the rows of each table, the states, then the packed weights, each in manifest order.
    """

    target: str
    machine: str
    cpu_flags: tuple[str, ...]
    graph_sha256: str
    compiler: str
    library: str
    runtime: str
    weights: str
    weights_bytes: int
    passes: tuple[tuple[int, int], ...]
    tensors: tuple[PackedTensor, ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Parse; raises BundleError naming the key."""
        fields = Fields(raw, LIBRARY_INFO_NAME)
        if (version := fields.count("version")) != LIBRARY_INFO_VERSION:
            raise BundleError(
                f"library has version {version}, this runtime reads {LIBRARY_INFO_VERSION}; compile again"
            )
        info = cls(
            target=fields.take("target", str),
            machine=fields.take("machine", str),
            cpu_flags=tuple(fields.items("cpu_flags")),
            graph_sha256=fields.take("graph_sha256", str),
            compiler=fields.take("compiler", str),
            library=fields.take("library", str),
            runtime=fields.take("runtime", str),
            weights=fields.take("weights", str),
            weights_bytes=fields.count("weights_bytes"),
            passes=tuple((int(tokens), int(rows)) for tokens, rows in fields.items("passes")),
            tensors=tuple(PackedTensor.from_fields(Fields(item, "tensor")) for item in fields.items("tensors")),
        )
        fields.finish()
        return info

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        return {"version": LIBRARY_INFO_VERSION, **asdict(self)}

    def misfit(self) -> str | None:
        """Say why this machine can't run the library, or None if it can."""
        if self.machine != machine():
            return f"{self.target} is for {self.machine}, this machine is {machine()}"
        if lacking := sorted(set(self.cpu_flags) - cpu_flags()):
            return f"{self.target} needs CPU features {lacking} this machine lacks"
        return None


def graph_digest(bundle: Bundle) -> str:
    """Return the SHA-256 of the decoder graph and its weights as the manifest states them."""
    digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    decoder = bundle.manifest.decoder
    return f"{digests[decoder.file]}+{digests[decoder.weights]}"


def find_library(bundle: Bundle) -> tuple[Path, LibraryInfo]:
    """Return folder and description of the library that fits this machine; the most specific one wins.

    Raises:
        TargetError: none was compiled, or none fits, with each one's reason.
    """
    folder = bundle.file(LIBRARY_FOLDER)
    found = sorted(folder.glob(f"*/{LIBRARY_INFO_NAME}"))
    mend = f"run: engram compile {bundle.path} --target native"
    if not found:
        raise TargetError(f"bundle {bundle.path} has no compiled library; {mend}")
    infos = [(path.parent, LibraryInfo.from_dict(read_json_object(path))) for path in found]
    fitting = [(path, info) for path, info in infos if info.misfit() is None]
    if not fitting:
        reasons = "; ".join(str(info.misfit()) for _, info in infos)
        raise TargetError(f"no library of bundle {bundle.path} runs here: {reasons}; {mend}")
    path, info = max(fitting, key=lambda pair: len(pair[1].cpu_flags))
    if info.graph_sha256 != graph_digest(bundle):
        raise TargetError(f"library {path} was compiled from another graph than this bundle holds; {mend}")
    return path, info
