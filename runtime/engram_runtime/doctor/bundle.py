"""Checks of a bundle on this machine: where it lies, what runs it, and what it takes."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from engram_runtime.bundle import Bundle
from engram_runtime.doctor.finding import Finding
from engram_runtime.doctor.install import DISTRIBUTION, installed_version
from engram_runtime.doctor.machine import HERE, Roots, more_memory, process_limits
from engram_runtime.errors import BundleError, TableError, TargetError
from engram_runtime.executor import state_bytes
from engram_runtime.golden import GOLDEN_FILE, Golden
from engram_runtime.library import LibraryInfo, find_library
from engram_runtime.manifest import DECODER, GraphSpec
from engram_runtime.memory import FreeMemory, free_memory
from engram_runtime.sizes import format_seconds, format_size
from engram_runtime.tables.disk import AT_ONCE, DiskFacts, disk_facts, remembered_facts
from engram_runtime.tables.place import MEMORY, Place, place_of
from engram_runtime.tables.policy import UNSAFE_TO_MAP
from engram_runtime.trust.library import UNTRUSTED, mend, reason

LIBRARY_SHARE = 1.2  # of the graphs' weights: packed ones, machine code and TVM's runtime
SPARE_FILES = 64  # beside those of tables
SLOW_BATCH_S = 5e-3  # of `AT_ONCE` reads: every token that waits for them is slower by as much
TVM_FFI = "apache-tvm-ffi"


def bundle_findings(path: Path, *, probe: bool, roots: Roots = HERE) -> Iterator[Finding]:
    """Look at a bundle, its place, its library, its tables and golden values.

    Args:
        probe: measure disks that nothing is known of.
    """
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        yield Finding.of_error("bundle", error)
        return
    yield producer(bundle, installed_version(DISTRIBUTION))
    for place, largest in largest_files(data_files(bundle)).items():
        yield file_system(place)
        if place.kind != MEMORY:
            yield disk(bundle, place, largest, probe=probe, roots=roots)
    if DECODER in bundle.manifest.graphs:
        yield from decoder_findings(bundle, bundle.manifest.decoder)
    if bundle.manifest.tables:
        yield table_files(bundle, process_limits(roots)["Max open files"])
        yield table_memory(bundle, free_memory())
    yield golden(bundle)


def decoder_findings(bundle: Bundle, decoder: GraphSpec) -> Iterator[Finding]:
    """Look at the library that this machine would run, the memory that takes, and room for another library."""
    yield free_space(bundle, shutil.disk_usage(bundle.path).free)
    try:
        folder, info = find_library(bundle)
    except (TargetError, BundleError) as error:
        yield Finding.of_error("library", error)
        return
    yield library(bundle, folder, info)
    yield trusted(bundle, folder, info)
    yield compiled_with(bundle, info, installed_version(TVM_FFI))
    yield model_memory(info.weights_bytes, state_bytes(decoder.states, info.float16_states), free_memory())


def producer(bundle: Bundle, version: str | None) -> Finding:
    """Check what made a bundle against what is installed."""
    made_by = bundle.manifest.producer
    detail = f"{bundle.manifest.model.name}, by {made_by}"
    if made_by == f"{DISTRIBUTION} {version}":
        return Finding("bundle", "ok", detail)
    return Finding("bundle", "warn", f"{detail}; {version} is installed", f"engram verify {bundle.path}")


def data_files(bundle: Bundle) -> list[Path]:
    """Return the files of weights and tables; of those outside the bundle, which have absolute paths, what is there."""
    weights = [graph.weights for graph in bundle.manifest.graphs.values()]
    tables = [rows.file for table in bundle.manifest.tables for rows in table.ranges]
    return [path for name in (*weights, *tables) if (path := bundle.file(name)).exists()]


def largest_files(paths: Iterable[Path]) -> dict[Place, Path]:
    """Return the largest file of each place."""
    by_size = sorted(paths, key=lambda path: path.stat().st_size)
    return {place_of(path): path for path in by_size}


def file_system(place: Place) -> Finding:
    """Check that files stay what they are while they are mapped."""
    if place.kind not in UNSAFE_TO_MAP:
        return Finding("file system", "ok", f"{place.file_system} on {place.device}")
    return Finding(
        "file system",
        "warn",
        f"weights or tables lie {UNSAFE_TO_MAP[place.kind]} ({place.file_system}, {place.device})",
        "copy them to a disk of this machine: a map of a file that goes away ends the process",
    )


def disk(bundle: Bundle, place: Place, largest: Path, *, probe: bool, roots: Roots) -> Finding:
    """Check that a disk is fast, by what is remembered of it or, with ``probe``, by reading its largest file."""
    if (facts := remembered_facts(place)) is not None:
        return disk_speed(place, facts)
    if probe:
        try:
            return disk_speed(place, disk_facts(largest, place))
        except OSError as error:
            return Finding("disk", "warn", f"{place.device} can't be measured: {error.strerror}")
    how = f"engram doctor {bundle.path} --probe"
    rotational = roots.sys / "block" / place.device / "queue" / "rotational"
    if rotational.exists() and rotational.read_text().strip() == "1":
        return Finding(
            "disk", "warn", f"{place.device} says that it turns, as virtual disks do too", f"measure it: {how}"
        )
    return Finding("disk", "ok", f"{place.device}, not measured yet; {how} does")


def disk_speed(place: Place, facts: DiskFacts) -> Finding:
    """Check that reading a token's rows takes little."""
    detail = (
        f"{place.device}: {AT_ONCE} reads in {format_seconds(facts.batch_p50_s)}, "
        f"{format_size(int(facts.bytes_per_s))} a second"
    )
    if facts.batch_p50_s <= SLOW_BATCH_S:
        return Finding("disk", "ok", detail)
    return Finding(
        "disk", "warn", f"{detail}: tokens whose rows aren't in memory wait", "put tables on a flash disk, or in memory"
    )


def free_space(bundle: Bundle, free_bytes: int) -> Finding:
    """Check that a library can be compiled beside what there is."""
    weights = {graph.weights for graph in bundle.manifest.graphs.values()}
    size = sum(entry.bytes for entry in bundle.manifest.files if entry.path in weights)
    if free_bytes >= (needed := int(size * LIBRARY_SHARE)):
        return Finding("free space", "ok", format_size(free_bytes))
    return Finding(
        "free space",
        "warn",
        f"{format_size(free_bytes)}, compiling a library takes {format_size(needed)}",
        "make room before the next engram compile",
    )


def table_files(bundle: Bundle, most_open: float) -> Finding:
    """Check that tables' files are those of the export, wherever they lie, and can all be open."""
    ranges = [rows for table in bundle.manifest.tables for rows in table.ranges]
    try:
        count = len({bundle.table_path(rows) for rows in ranges})
    except TableError as error:
        return Finding.of_error("table files", error)
    if count + SPARE_FILES <= most_open:
        return Finding("table files", "ok", f"{count}, all there")
    return Finding(
        "table files", "fail", f"{count}, {most_open:g} files may be open", f"ulimit -n {count + SPARE_FILES}"
    )


def library(bundle: Bundle, folder: Path, info: LibraryInfo) -> Finding:
    """Check that a library that fits this machine is whole."""
    missing = [name for name in info.files.values() if not (folder / name).is_file()]
    if missing:
        return Finding("library", "fail", f"{folder} lacks {', '.join(missing)}", f"engram compile {bundle.path}")
    return Finding("library", "ok", f"{info.target}, fits this machine")


def compiled_with(bundle: Bundle, info: LibraryInfo, version: str | None) -> Finding:
    """Check what compiled a library against what will load it."""
    if f"{TVM_FFI} {version}" in info.compiler.split(", "):
        return Finding("compiled with", "ok", info.compiler)
    detail = f"{info.compiler}; {TVM_FFI} {version} is installed"
    return Finding("compiled with", "warn", detail, f"engram compile {bundle.path}")


def trusted(bundle: Bundle, folder: Path, info: LibraryInfo) -> Finding:
    """Check that this user may run a library."""
    try:
        why = reason(bundle, folder, info)
    except (TargetError, BundleError) as error:
        return Finding.of_error("trust", error)
    if why is not None:
        return Finding("trust", "ok", f"{folder.name} is {why}")
    return Finding("trust", "fail", f"{folder.name} {UNTRUSTED}", mend(bundle, info))


def model_memory(weights: int, caches: int, free: FreeMemory) -> Finding:
    """Check that weights and caches fit in memory."""
    detail = (
        f"{format_size(weights)} of weights and, of a text as long as the context, {format_size(caches)} of caches; "
        f"{format_size(free.num_bytes)} available"
    )
    if weights > free.num_bytes:
        return Finding("model memory", "fail", detail, more_memory(free))
    if weights + caches > free.num_bytes:
        return Finding("model memory", "warn", detail, f"keep texts short, or {more_memory(free)}")
    return Finding("model memory", "ok", detail)


def table_memory(bundle: Bundle, free: FreeMemory) -> Finding:
    """Check whether tables fit in memory."""
    size = sum(table.num_rows * table.record.record_bytes for table in bundle.manifest.tables)
    detail = f"{format_size(size)} in all, {format_size(free.num_bytes)} available"
    if size <= free.num_bytes:
        return Finding("table memory", "ok", detail)
    mend = f"engram bench tables {bundle.path} says what that costs"
    return Finding("table memory", "warn", f"{detail}: rows are read from disk", mend)


def golden(bundle: Bundle) -> Finding:
    """Check that there are golden values to verify results by."""
    if all(entry.path != GOLDEN_FILE for entry in bundle.manifest.files):
        return Finding("golden values", "warn", "none, so engram verify can't check results", "export it again")
    try:
        values = Golden.read(bundle)
    except BundleError as error:
        return Finding.of_error("golden values", error)
    return Finding("golden values", "ok", f"{len(values.token_ids)} tokens, for engram verify")
