"""What a packed folder says to who unpacks it."""

from collections.abc import Sequence
from pathlib import Path

from engram_compilers.pack.bundle_copy import machine_code
from engram_runtime.library import LibraryInfo
from engram_runtime.manifest import Manifest

TEXT = """\
{model} for {target}: {machine}{features}.
Needs Python {pythons}{glibc}. Copy this folder to the box; then, in it, once:
    {install}
and, as its code runs for nobody who hasn't said so, with the digest that its maker told you:
    ./engram trust bundle --sha256 DIGEST
Then run it:
    ./engram run bundle "Once upon a time"
    ./engram chat bundle
./engram --help names the other commands; ./engram verify bundle checks every file and, by golden values, that this box
computes what it must. Machine code takes {library:.1f} MB, weights {weights:.1f} MB, tables {tables:.1f} MB.
Only trust folders whose maker you trust: what is in bundle/lib and in python is code.
"""


def readme(
    manifest: Manifest,
    info: LibraryInfo,
    *,
    pythons: Sequence[str],
    glibc: str | None,
    install: str,
    folder: Path,
) -> str:
    """Return the text of ``README.txt``: which box a folder is for, how to install and to run it, sizes."""
    library = folder / "bundle" / "lib" / info.target
    tables = {path for table in manifest.tables for path in table.files}
    return TEXT.format(
        model=manifest.model.name,
        target=info.target,
        machine=info.machine,
        features=f" with {' '.join(info.cpu_flags)}" if info.cpu_flags else "",
        pythons=" or ".join(pythons),
        glibc=f" and glibc {glibc} or newer" if glibc else "",
        install=install,
        library=sum((library / name).stat().st_size for name in machine_code(info)) / 1e6,
        weights=info.weights_bytes / 1e6,
        tables=sum(entry.bytes for entry in manifest.files if entry.path in tables) / 1e6,
    )
