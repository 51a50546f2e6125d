"""A folder for a box: a bundle with its library, this version's runtime, a command and the packages it needs."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import engram_runtime
from engram_compilers.pack.bundle_copy import copy_bundle, external_bytes, machine_code
from engram_compilers.pack.library import ready_library
from engram_compilers.pack.packages import (
    MODULES,
    PLATFORMS,
    download,
    find_pythons,
    pins,
    requirements,
)
from engram_compilers.pack.readme import readme
from engram_runtime.bundle import MANIFEST_NAME, Bundle, file_sha256
from engram_runtime.errors import TargetError
from engram_runtime.library import LIBRARY_FOLDER, LIBRARY_INFO_NAME, LibraryInfo
from engram_targets import CpuProfile

PACK_NAME = "pack.json"
LAUNCHER, REQUIREMENTS, README, WHEELS = "engram", "requirements.txt", "README.txt", "wheels"
BUNDLE_FOLDER, PYTHON_FOLDER = "bundle", "python"
DISTRIBUTION = "engram-edge"
SYSTEMS = {"linux": "linux", "macos": "darwin"}  # as `platform.system` calls them, in lower case
INSTALL = "python3 -m pip install --no-deps --require-hashes --target site -r requirements.txt"
INSTALL_OFFLINE = f"{INSTALL} --no-index --find-links wheels"
GLIBC = re.compile(rb"GLIBC_(\d+)\.(\d+)\0")

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """What goes into a folder: graphs, wheels, and the versions of Python that its packages are pinned for."""

    with_graph: bool
    with_wheels: bool
    pythons: tuple[str, ...]


def pack_cpu(
    bundle: Bundle, profile: CpuProfile, options: PackOptions, folder: Path, report: Report = lambda text: None
) -> None:
    """Fill an empty folder with what a box of a CPU profile needs, compiling the bundle first where it must be.

    Raises:
        TargetError: there are no packages for the profile's machines.
        CompileError: the bundle can't be compiled, or the packages can't be looked up.
        TableError: rows outside the bundle are gone or are others by now.
    """
    if (platforms := PLATFORMS.get((profile.system, profile.machine))) is None:
        raise TargetError(
            f"target {profile.name} is for {profile.system} on {profile.machine}, which apache-tvm-ffi has no package "
            f"for; pack for c-portable or for one of {[' on '.join(pair) for pair in PLATFORMS]}"
        )
    library, info = ready_library(bundle, profile, report)
    report(f"looking up packages for Python {', '.join(options.pythons)}")
    packages = pins(info.ffi)
    found = find_pythons(platforms, options.pythons, packages)
    (folder / REQUIREMENTS).write_text(requirements(found), encoding="utf-8")
    if options.with_wheels:
        report("downloading wheels")
        download(folder / WHEELS, platforms, list(found), folder / REQUIREMENTS)
    report(f"copying the bundle{_rows_outside(bundle)}")
    copy_bundle(bundle, library, info, folder / BUNDLE_FOLDER, with_graph=options.with_graph)
    _copy_runtime(folder / PYTHON_FOLDER, packages)
    _copy_launcher(folder / LAUNCHER)
    install = INSTALL_OFFLINE if options.with_wheels else INSTALL
    glibc = newest_glibc(*(library / name for name in machine_code(info)))
    text = readme(bundle.manifest, info, pythons=list(found), glibc=glibc, install=install, folder=folder)
    (folder / README).write_text(text, encoding="utf-8")
    _write_pack(folder, info, SYSTEMS[profile.system], list(found), install)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in files_in(folder))


def files_in(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in those within it, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def newest_glibc(*paths: Path) -> str | None:
    """Return the oldest version of the C library that has all the functions that files call; None without any."""
    named = {match.groups() for path in paths for match in GLIBC.finditer(path.read_bytes())}
    versions = sorted((int(major), int(minor)) for major, minor in named)
    return ".".join(map(str, versions[-1])) if versions else None


def _rows_outside(bundle: Bundle) -> str:
    size = external_bytes(bundle.manifest)
    return f", with {size / 1e6:.1f} MB of rows that lie outside it" if size else ""


def _copy_runtime(folder: Path, packages: Sequence[str]) -> None:
    """Copy this version's runtime, and what states its version and the packages it runs with."""
    source = Path(engram_runtime.__file__).parent
    shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    stated = distribution(DISTRIBUTION)
    metadata = folder / f"{DISTRIBUTION.replace('-', '_')}-{stated.version}.dist-info"
    metadata.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {DISTRIBUTION}", f"Version: {stated.version}"]
    lines += [f"Requires-Dist: {package}" for package in packages]
    (metadata / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _copy_launcher(path: Path) -> None:
    shutil.copyfile(Path(__file__).with_name("launcher.py"), path)
    path.chmod(0o755)


def _write_pack(folder: Path, info: LibraryInfo, system: str, pythons: Sequence[str], install: str) -> None:
    """Write what the launcher holds the folder and the box against."""
    library = folder / BUNDLE_FOLDER / LIBRARY_FOLDER / info.target
    stated = {
        *(library / name for name in (LIBRARY_INFO_NAME, *machine_code(info))),
        folder / BUNDLE_FOLDER / MANIFEST_NAME,
    }
    sources = folder / PYTHON_FOLDER
    files = {
        str(path.relative_to(folder)): (
            path.stat().st_size,
            file_sha256(path) if path in stated or path.is_relative_to(sources) else None,
        )
        for path in files_in(folder)
        if path.is_relative_to(sources) or path.is_relative_to(folder / BUNDLE_FOLDER)
    }
    facts = {
        "target": info.target,
        "machine": info.machine,
        "system": system,
        "pythons": pythons,
        "modules": MODULES,
        "install": install,
        "files": files,
    }
    (folder / PACK_NAME).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
