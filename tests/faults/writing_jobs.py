"""What writes files and folders, each as the faults of B3 want it: prepare a place, do it, say what is wrong there."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
from tests.faults.warm import contents, warm_compile, warm_export, whole, write_folder

from engram_runtime.bundle import Bundle
from engram_runtime.library import LIBRARY_FOLDER


@dataclass(frozen=True, slots=True)
class Job:
    """Something that is written.

    Attributes:
        prepare: makes in an empty folder what is there before.
        run: writes below the folder.
        wrong: says what is wrong in the folder, of something that ended well if the second argument is True.
    """

    prepare: Callable[[Path], object]
    run: Callable[[Path], object]
    wrong: Callable[[Path, bool], str]


def export_job(root: Path) -> Job:
    """Return an export to a new place."""
    warm = warm_export(root)

    def wrong(place: Path, well: bool) -> str:
        if (place / "out").exists():
            return whole(place / "out", warm.new)
        return "there is nothing" if well else ""

    return Job(lambda place: None, lambda place: warm.run(place / "out", replace=(place / "out").exists()), wrong)


def replacement_job(root: Path) -> Job:
    """Return an export in place of a bundle."""
    warm = warm_export(root)
    old = contents(warm.old)

    def wrong(place: Path, well: bool) -> str:
        return whole(place / "out", warm.new, *([] if well else [old]))

    return Job(
        lambda place: write_folder(place / "out", old), lambda place: warm.run(place / "out", replace=True), wrong
    )


def compile_job(root: Path) -> Job:
    """Return a compilation in place of a library; the linker, whose calls aren't seen, is stood in for by a copy."""
    warm = warm_compile(root)
    bundle, library = contents(warm.bundle), Path(LIBRARY_FOLDER) / warm.target
    from engram_compilers import build

    def copied(executable: object, profile: object, folder: Path, report: object) -> str:
        (folder / "model.so").write_bytes(warm.new["model.so"])
        return "model.so"

    mock.patch.object(build, "_link", copied).start()

    def prepare(place: Path) -> None:
        write_folder(place / "out", bundle)
        write_folder(place / "out" / library, warm.old)

    def wrong(place: Path, well: bool) -> str:
        found = contents(place / "out" / library)
        return "" if found in ([warm.new] if well else [warm.old, warm.new]) else f"library of {sorted(found)}"

    return Job(prepare, lambda place: warm.run(place / "out"), wrong)


def pack_job(root: Path) -> Job:
    """Return a folder with a copy of a bundle in place of another one, as on another disk than the bundle's."""
    from engram_compilers.pack.bundle_copy import link_or_copy
    from engram_runtime.new_folder import new_folder

    source = _bundle().path
    files = {**contents(source), "mark": b""}
    old = {"mark": b"old"}

    def run(place: Path) -> None:
        with new_folder(place / "out", "mark", "a pack", replace=True) as folder:
            for name in contents(source):
                link_or_copy(source / name, folder / name)
            (folder / "mark").write_bytes(b"")

    mock.patch("os.link", side_effect=OSError).start()
    return Job(
        lambda place: write_folder(place / "out", old),
        run,
        lambda place, well: _one_of(contents(place / "out"), files, *([] if well else [old])),
    )


def overlay_job(root: Path) -> Job:
    """Return an overlay."""
    from engram_runtime.tables.overlay_file import OverlaySpec, write_overlay

    bundle = _bundle()
    spec = OverlaySpec.of(bundle, bundle.manifest.tables[0])
    records = np.zeros((3, spec.record.record_bytes), dtype=np.uint8)
    return _file_job(root, lambda path: write_overlay(path, spec, np.arange(3), records, replace=True))


def trace_job(root: Path) -> Job:
    """Return a trace."""
    from engram_runtime.lens.recording import record_trace
    from engram_runtime.lens.trace_file import write_trace

    trace = record_trace(_bundle(), np.arange(9), text="text", command="engram", progress=lambda count: None)
    return _file_job(root, lambda path: write_trace(path, trace, replace=True))


def batch_job(root: Path) -> Job:
    """Return the answers of a batch, added to those that are there; the last one may be in part there."""
    from engram_runtime.batch.output_file import OutputFile
    from engram_runtime.batch.result import result_text

    lines = [result_text(number, f"request {number}", {}, None) for number in range(4)]
    mock.patch("engram_runtime.batch.output_file.SYNC_S", -1.0).start()

    def run(place: Path) -> None:
        with OutputFile(place / "out") as file:
            for line in lines[len(file.index) :]:
                file.append(line)

    def wrong(place: Path, well: bool) -> str:
        found = (place / "out").read_bytes()
        everything = b"".join(lines)
        right = found == everything if well else everything.startswith(found) and found.startswith(lines[0])
        return "" if right else f"answers are {found!r}"

    return Job(lambda place: (place / "out").write_bytes(lines[0]), run, wrong)


def _file_job(root: Path, write: Callable[[Path], object]) -> Job:
    """Return the writing of a file in place of another one."""
    write(root / "reference")
    new = {"out": (root / "reference").read_bytes()}
    old = {"out": b"old"}

    def wrong(place: Path, well: bool) -> str:
        if well:
            return _one_of(contents(place), new)
        return _one_of({"out": (place / "out").read_bytes()}, new, old)

    return Job(lambda place: write_folder(place, old), lambda place: write(place / "out"), wrong)


def _one_of(found: dict[str, bytes], *wanted: dict[str, bytes]) -> str:
    return "" if found in wanted else f"there are {[(name, len(data)) for name, data in found.items()]}"


@cache
def _bundle() -> Bundle:
    root = Path(tempfile.mkdtemp())
    warm_export(root)
    return Bundle.open(root / "new")


JOBS: Mapping[str, Callable[[Path], Job]] = {
    "export": export_job,
    "replacement": replacement_job,
    "compile": compile_job,
    "pack": pack_job,
    "overlay": overlay_job,
    "trace": trace_job,
    "batch": batch_job,
}
