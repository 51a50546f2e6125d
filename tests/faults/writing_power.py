"""B2: power cuts, by what a recorded export or compilation may have left on a disk."""

import contextlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults import shim
from tests.faults.power import Disk, recorded, states
from tests.faults.preloaded import preloaded
from tests.faults.row import Outcome, Row
from tests.faults.warm import WarmExport, contents, ended, fork, warm_compile, warm_export, whole, write_folder

from engram_runtime.library import LIBRARY_FOLDER

OUT = "out"
MOST_MOMENTS, FEW_MOMENTS = 1000, 80  # of a recording; a library's files are large
RESUMED_EVERY = 30  # states; from each of these the same export is run once more
Wrong = Callable[[Path], str]


def power_cuts_of_exports(count: int) -> Outcome:
    """Cut the power of an export to a new place."""
    root = Path(tempfile.mkdtemp())
    warm = warm_export(root)
    return _cuts(
        "B2",
        count,
        _record(root, lambda out: warm.run(out, replace=False)),
        lambda out: whole(out, warm.new) if out.exists() else "",
        lambda place: _resumed(warm, place),
    )


def power_cuts_of_replacements(count: int) -> Outcome:
    """Cut the power of an export that replaces a bundle."""
    root = Path(tempfile.mkdtemp())
    warm = warm_export(root)
    (root / "place").mkdir()
    shutil.copytree(warm.old, root / "place" / OUT)
    old = contents(warm.old)
    return _cuts(
        "B2 replace",
        count,
        _record(root, lambda out: warm.run(out, replace=True)),
        lambda out: whole(out, warm.new, old),
        lambda place: _resumed(warm, place),
    )


def power_cuts_of_compilations(count: int) -> Outcome:
    """Cut the power of a compilation in place of a library."""
    root = Path(tempfile.mkdtemp())
    warm = warm_compile(root)
    library = Path(LIBRARY_FOLDER) / warm.target
    write_folder(root / "place" / OUT, contents(warm.bundle))
    write_folder(root / "place" / OUT / library, warm.old)

    def wrong(out: Path) -> str:
        found = contents(out / library)
        return "" if found in (warm.old, warm.new) else f"the library holds {sorted(found)}"

    def resumed(place: Path) -> str:
        code = ended(fork(lambda: warm.run(place / OUT)))
        if code == 0 and contents(place / OUT / library) == warm.new:
            return ""
        return f"the next compilation ends with exit code {code}"

    return _cuts("B2 compile", count, _record(root, warm.run, library), wrong, resumed)


def _record(root: Path, work: Callable[[Path], object], made: Path = Path()) -> Iterator[tuple[int, Disk]]:
    """Do something that writes to ``root/place/out`` and yield what power cuts would leave of ``root/place``.

    Args:
        made: folder below ``out`` with files that other programs write.
    """
    place, log = root / "place", root / "log"
    place.mkdir(exist_ok=True)
    before = {path.relative_to(place).as_posix(): _contents(path) for path in place.rglob("*")}

    def noted() -> None:
        shim.record(log, str(place))
        work(place / OUT)

    if ended(fork(noted)) != 0:
        raise RuntimeError("what is recorded fails")
    found = recorded(before, shim.changes(log), place, place / OUT / made)
    return states(found, random.Random("power"), MOST_MOMENTS if made == Path() else FEW_MOMENTS)


def _contents(path: Path) -> bytes | None:
    return None if path.is_dir() else path.read_bytes()


def _cuts(name: str, count: int, found: Iterator[tuple[int, Disk]], wrong: Wrong, resumed: Wrong) -> Outcome:
    """Look at so many different states, spread over all there are."""
    different = {disk.digest(): (end, disk) for end, disk in found}
    chosen = random.Random(name).sample(list(different.values()), min(count, len(different)))
    failures = []
    for number, (end, disk) in enumerate(chosen):
        with _written(disk) as place:
            said = wrong(place / OUT)
            if not said and number % RESUMED_EVERY == 0:
                said = resumed(place)
        if said:
            failures.append(f"state {number}, after change {end}: {said}")
    figure = f"{len(different)} different states of {max(end for end, _ in different.values())} changes"
    return Outcome(tried=len(chosen), survived=len(chosen) - len(failures), figure=figure, failures=tuple(failures[:5]))


@contextlib.contextmanager
def _written(disk: Disk) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp())
    disk.write(place)
    yield place
    shutil.rmtree(place)


def _resumed(warm: WarmExport, place: Path) -> str:
    """Export to where the power was cut; the files there pass for those the journal notes by their inodes."""
    for journal in place.glob(".*/journal.jsonl"):
        lines = [_with_inode(line, journal.parent / "bundle") for line in journal.read_bytes().split(b"\n")]
        journal.write_bytes(b"\n".join(lines))
    if (code := ended(fork(lambda: warm.run(place / OUT, replace=True)))) != 0:
        return f"the next export ends with exit code {code}"
    if beside := sorted(path.name for path in place.iterdir() if path.name != OUT):
        return f"left beside the bundle by the next export: {beside}"
    return whole(place / OUT, warm.new)


def _with_inode(line: bytes, folder: Path) -> bytes:
    try:
        noted = json.loads(line)
        noted["inode"] = (folder / noted["path"]).stat().st_ino
    except (ValueError, KeyError, TypeError, OSError):
        return line
    return json.dumps(noted).encode()


EXPECTED = "nothing false opens; the next export succeeds"
ROWS = (
    Row(
        name="B2",
        fault="power cut in an export: any part of what wasn't synced lost",
        expected=f"nothing there or all of it; {EXPECTED}",
        quick=500,
        full=20000,
        run=preloaded(power_cuts_of_exports),
    ),
    Row(
        name="B2 replace",
        fault="power cut in an export in place of a bundle",
        expected=f"the old bundle or the new one, whole; {EXPECTED}",
        quick=200,
        full=20000,
        run=preloaded(power_cuts_of_replacements),
    ),
    Row(
        name="B2 compile",
        fault="power cut in a compilation in place of a library",
        expected="the old library or the new one, whole; the next compilation succeeds",
        quick=30,
        full=20000,
        run=preloaded(power_cuts_of_compilations),
    ),
)
