"""Pack a bundle as C: sources, generated code, packed weights and tables, for any C11 compiler to make a program of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from engram_compilers.c.constants import FileKey, PackedFile, PackedModel, file_key, manifest_source
from engram_compilers.c.model import EmittedModel, emit_model
from engram_compilers.pack.bundle_copy import link_or_copy
from engram_runtime.bundle import Bundle, file_identity, file_sha256
from engram_runtime.errors import BundleError
from engram_runtime.keyer_spec import KeyerSpec, NgramKeyerSpec
from engram_runtime.sizes import format_size
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.record_files import RecordFiles
from engram_runtime.tokenizer import TextTokenizer
from engram_targets import CProfile

WEIGHTS_FILE, MANIFEST_FILE, README_FILE = "weights.bin", "manifest.c", "README.txt"
INT32_MAX = 2**31 - 1
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedC:
    """What was written.

    Attributes:
        source_bytes: of C and its Makefile, generated or not.
        table_bytes: of tables and token maps.
        state_bytes: that a full context takes when the program runs.
    """

    source_bytes: int
    weights_bytes: int
    table_bytes: int
    state_bytes: int


def pack_c(bundle: Bundle, profile: CProfile, folder: Path, report: Report = lambda text: None) -> PackedC:
    """Fill an empty folder with a program that decodes greedily, without Python: see ``docs/embedded.md``.

    The decoder alone is packed: no draft head, no tokenizer. Tables that the bundle refers to are copied too.

    Args:
        report: told each step before it begins.

    Raises:
        BundleError: the bundle has no decoder, is damaged, or has ids that don't fit 32 bits.
        CompileError: the graph has something that C can't be made of.
        TableError: a table's file is missing, too short or another one.
    """
    decoder, width = bundle.manifest.decoder, embedding_width(bundle)
    bundle.verify_digests(only={decoder.file, decoder.weights})
    for table in bundle.manifest.tables:
        _check_table(bundle, table)
    report("copying tables")
    places, tables = copy_tables(bundle, folder)
    report("packing weights and generating C")
    emitted = emit_model(bundle, pass_sizes(profile), folder, cache_dtype=profile.cache_dtype)
    model = PackedModel(
        info=bundle.manifest.model,
        end_ids=end_ids(bundle),
        embedding_width=width,
        files=[_described(folder, WEIGHTS_FILE), *tables],
        tables=bundle.manifest.tables,
        places=places,
    )
    (folder / MANIFEST_FILE).write_text(manifest_source(model), encoding="ascii")
    _copy_sources(folder)
    _write_readme(folder, model, emitted)
    return PackedC(
        source_bytes=sum(path.stat().st_size for path in folder.iterdir() if _is_source(path)),
        weights_bytes=emitted.weights_bytes,
        table_bytes=sum(file.bytes for file in tables),
        state_bytes=emitted.state_bytes,
    )


def pass_sizes(profile: CProfile) -> Sequence[tuple[int, int]]:
    """Return (tokens, rows of logits) of the passes a program holds: logits of the last token are all it wants."""
    return [(tokens, 1) for tokens in (*profile.decode_tokens, *profile.prefill_tokens)]


def embedding_width(bundle: Bundle) -> int:
    """Return the width of the decoder's input embeddings, 0 where it takes none; BundleError without a decoder."""
    return bundle.manifest.model.hidden_size if bundle.manifest.decoder.takes_embeddings else 0


def end_ids(bundle: Bundle) -> Sequence[int]:
    """Return the ids that end an answer, ascending; none where the bundle has no tokenizer to say so."""
    if not bundle.file("tokenizer.json").is_file():
        return ()
    return sorted(TextTokenizer.load(bundle.path).eos_token_ids)


def _check_table(bundle: Bundle, table: TableSpec) -> None:
    """Refuse what the Python runtime would refuse when it opens a table, and ids of more than 32 bits."""
    bundle.keyer(table.keyer)
    RecordFiles(table, bundle.table_path).close()
    if (largest := _largest_id(table.keyer)) > INT32_MAX:
        raise BundleError(f"keyer of table {table.site} has id {largest}, C programs take ids up to {INT32_MAX}")


def _largest_id(keyer: KeyerSpec) -> int:
    if isinstance(keyer, NgramKeyerSpec):
        return max((keyer.pad_id, *keyer.barrier_ids, *keyer.silent_ids))
    return keyer.vocab_size


def copy_tables(bundle: Bundle, folder: Path) -> tuple[dict[FileKey, int], list[PackedFile]]:
    """Put every file of the tables into the folder once, those that a bundle refers to as well.

    Returns:
        Their places behind the weights, by key, and what they are.

    Raises:
        BundleError: a file of the bundle is not what its manifest says.
        TableError: one outside it is gone or another one.
    """
    places: dict[FileKey, int] = {}
    files: list[PackedFile] = []
    for key, source in _table_files(bundle):
        if key in places:
            continue
        places[key] = 1 + len(files)
        # Numbered, so that no name a bundle gives takes the place of another file or of a source.
        relative = f"tables/{places[key]:03d}-{source.name}"
        link_or_copy(source, folder / relative)
        files.append(_described(folder, relative))
        _check_digest(bundle, key, files[-1])
    return places, files


def _table_files(bundle: Bundle) -> Iterator[tuple[FileKey, Path]]:
    for table in bundle.manifest.tables:
        yield from ((file_key(rows), bundle.table_path(rows)) for rows in table.ranges)
        yield from (((file, None), bundle.file(file)) for file in table.keyer.files)


def _described(folder: Path, relative: str) -> PackedFile:
    path = folder / relative
    return PackedFile(path=relative, bytes=path.stat().st_size, identity=file_identity(path), sha256=file_sha256(path))


def _check_digest(bundle: Bundle, key: FileKey, copied: PackedFile) -> None:
    """Refuse a file of the bundle whose copy is not what the manifest says."""
    listed = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    name, identity = key
    if identity is None and copied.sha256 != listed[name]:
        raise BundleError(f"{name} has SHA-256 {copied.sha256}, the manifest says {listed[name]}; export again")


def _copy_sources(folder: Path) -> None:
    for source in resources.files("engram_compilers.c").joinpath("sources").iterdir():
        if source.name != README_FILE:
            (folder / source.name).write_bytes(source.read_bytes())


def _is_source(path: Path) -> bool:
    return path.suffix in (".c", ".h") or path.name == "Makefile"


def _write_readme(folder: Path, model: PackedModel, emitted: EmittedModel) -> None:
    text = resources.files("engram_compilers.c").joinpath("sources", README_FILE).read_text(encoding="utf-8")
    values = {
        "name": "".join(letter if letter.isprintable() else "?" for letter in model.info.name),
        "vocabulary": model.info.vocab_size - 1,
        "context": model.info.context_length,
        "end_ids": " ".join(map(str, model.end_ids)) or "none",
        "weights": format_size(emitted.weights_bytes),
        "tables": format_size(sum(file.bytes for file in model.files[1:])),
        "states": format_size(emitted.state_bytes),
        "scratch": format_size(emitted.scratch_bytes),
    }
    (folder / README_FILE).write_text(Template(text).substitute(values), encoding="utf-8")
