"""C9: files of other format versions, and with keys that this version doesn't know.

``formats/`` keeps a file of each version that was ever promised to be read, as it was written then.
"""

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.row import Outcome, Row
from tests.test_profiles import raw_library

from engram_runtime import manifest
from engram_runtime.errors import BundleError
from engram_runtime.lens import trace_file
from engram_runtime.lens.trace_file import read_trace
from engram_runtime.library import LIBRARY_INFO_VERSION, LibraryInfo
from engram_runtime.manifest import Manifest
from engram_runtime.tables import overlay_file
from engram_runtime.tables.overlay_file import read_overlay
from engram_runtime.trust import records
from engram_runtime.trust.records import LibraryRecord

KEPT = Path(__file__).parent / "formats"
HEADER_LENGTH_BYTES = 8  # of a safetensors file
NEWER = "it needs a newer engram-edge"
UNKNOWN = "it may need a newer engram-edge"
AHEAD = (1, 2, 10, 2**31, 2**52)  # versions after the newest
NO_VERSIONS: tuple[object, ...] = (-1, 2**53, 10**400, 1.0, True, None, "1", [1], {})
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format of files.

    Attributes:
        key: that holds the version.
        newest, oldest: versions that are read.
        sound: facts of a file of the newest version.
        read: reads a file of such facts.
        extensions: whether unknown keys may stand under that name.
    """

    name: str
    key: str
    newest: int
    oldest: int
    sound: Facts
    read: Callable[[Facts], object]
    extensions: bool = False


def formats(folder: Path) -> list[Format]:
    """Return all formats; files are written to a folder."""
    oldest_manifest = min(int(path.name.split(".")[1]) for path in KEPT.glob("engram.*.json"))
    return [
        Format(
            name="engram.json",
            key="format_version",
            newest=manifest.FORMAT_VERSION,
            oldest=oldest_manifest,
            sound=json.loads((KEPT / f"engram.{oldest_manifest}.json").read_text()),
            read=Manifest.from_dict,
            extensions=True,
        ),
        Format(
            name="compile.json",
            key="version",
            newest=LIBRARY_INFO_VERSION,
            oldest=LIBRARY_INFO_VERSION,
            sound=raw_library(),
            read=LibraryInfo.from_dict,
        ),
        in_safetensors("overlay", overlay_file, read_overlay, oldest=1, folder=folder),
        in_safetensors("trace", trace_file, read_trace, oldest=1, folder=folder),
        Format(
            name="record",
            key="version",
            newest=records.VERSION,
            oldest=1,
            sound={"version": records.VERSION, "how": "trusted", "target": "x", "place": "/"},
            read=lambda facts: LibraryRecord.read(written(folder / "record", facts)),
        ),
    ]


def in_safetensors(name: str, module: Any, read: Callable[[Path], object], *, oldest: int, folder: Path) -> Format:
    """Return a format whose facts are a safetensors file's metadata."""
    content = (KEPT / f"{name}.{module.FORMAT_VERSION}.safetensors").read_bytes()
    length = int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
    header = json.loads(content[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length])
    data = content[HEADER_LENGTH_BYTES + length :]

    def read_facts(facts: Facts) -> object:
        changed = json.dumps(header | {"__metadata__": {module.FACTS: json.dumps(facts)}}).encode()
        path = folder / name
        path.write_bytes(len(changed).to_bytes(HEADER_LENGTH_BYTES, "little") + changed + data)
        return read(path)

    return Format(
        name=name,
        key="format_version",
        newest=module.FORMAT_VERSION,
        oldest=oldest,
        sound=json.loads(header["__metadata__"][module.FACTS]),
        read=read_facts,
    )


def written(path: Path, facts: Facts) -> Path:
    path.write_text(json.dumps(facts))
    return path


def versions(count: int) -> Outcome:
    """Read files of all versions there are and of many that there aren't, and files with unknown keys."""
    failures: list[str] = []
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        cases = [*kept_files(), *(case for each in formats(Path(folder)) for case in changed_files(each, count))]
        for name, wanted, read in cases:
            tried += 1
            found = what_is_said(read)
            if (found is None) != (wanted is None) or not (found or "").endswith(wanted or ""):
                failures.append(f"{name}: said {found!r}, wanted {wanted!r}")
    return Outcome(tried=tried, survived=tried - len(failures), failures=tuple(failures[:10]))


Case = tuple[str, str | None, Callable[[], object]]  # its name, how what is said ends or None, and what reads it


def kept_files() -> Iterator[Case]:
    """Yield the files of older versions, which are read."""
    for path in sorted(KEPT.iterdir()):
        if path.name.startswith("engram."):
            yield path.name, None, partial(read_manifest, path)
        else:
            yield path.name, None, partial(read_overlay if path.name.startswith("overlay") else read_trace, path)


def read_manifest(path: Path) -> Manifest:
    return Manifest.from_dict(json.loads(path.read_text()))


def changed_files(of: Format, count: int) -> Iterator[Case]:
    """Yield files with other versions, and ``count`` with unknown keys."""

    def reading(**changes: Any) -> Callable[[], object]:
        return lambda: of.read(of.sound | changes)

    rng = random.Random(f"C9 {of.name}")
    for ahead in AHEAD:
        yield f"{of.name} {of.newest + ahead}", NEWER, reading(**{of.key: of.newest + ahead})
    for older in range(of.oldest):
        yield f"{of.name} {older}", " again", reading(**{of.key: older})
    for version in NO_VERSIONS:
        yield f"{of.name} {version!r:.20}", "", reading(**{of.key: version})
    for number in range(count):
        key = f"{rng.choice(['future', 'x-', 'é', ' '])}{rng.randrange(10**9)}"
        value = rng.choice([None, 1, "text", [1, [2]], {"a": {"b": 1.5}}])
        yield f"{of.name} key {number}", UNKNOWN, reading(**{key: value})
        if of.extensions:
            yield f"{of.name} extension {number}", None, reading(extensions={key: value})


def what_is_said(read: Callable[[], object]) -> str | None:
    """Return the error of reading a file, None where it is read; anything but a `BundleError` ends the row."""
    try:
        read()
    except BundleError as error:
        return str(error)
    return None


ROWS = (
    Row(
        name="C9",
        fault="files of newer, older and impossible format versions, unknown keys and extensions",
        expected="promised versions open, newer ones are said to need a newer engram-edge, extensions are ignored",
        quick=100,
        full=2000,
        run=versions,
    ),
)
