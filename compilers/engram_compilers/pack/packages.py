"""What a box has to install: packages pinned with the digests of their wheels for it, as pip resolves them."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engram_runtime.errors import CompileError, TargetError

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
FFI = "apache-tvm-ffi"
# By distribution, the module that running text imports. Two more are what those import in turn.
MODULES = {
    "numpy": "numpy",
    FFI: "tvm_ffi",
    "tokenizers": "tokenizers",
    "click": "click",
    "jinja2": "jinja2",
    "markupsafe": "markupsafe",
    "typing-extensions": "typing_extensions",
}
# Wheels say the oldest C library they run with; TVM's ask for 2.28.
PLATFORMS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("linux", "x86_64"): ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"),
    ("linux", "aarch64"): ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"),
    ("macos", "arm64"): ("macosx_14_0_arm64", "macosx_11_0_arm64"),
}
MOST_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A package's file on the index: the package as ``name==version``, and the SHA-256 in hex."""

    pin: str
    sha256: str


def pins(ffi: str) -> list[str]:
    """Return the packages at the versions that are installed here, and apache-tvm-ffi at that of the library."""
    return [f"{name}=={ffi if name == FFI else version(name)}" for name in MODULES]


def find_wheels(platforms: Sequence[str], python: str, wanted: Sequence[str]) -> list[Wheel] | None:
    """Return the wheels of pinned packages for a platform and Python, or None where one has none.

    Raises:
        CompileError: pip is not there, or can't ask its index.
    """
    done = _pip("install", "--dry-run", "--ignore-installed", "--report", "-", *options(platforms, python), *wanted)
    if done.returncode == 0:
        return [_wheel(item) for item in json.loads(done.stdout)["install"]]
    if "No matching distribution found" in done.stderr and "from versions: none" not in done.stderr:
        return None
    raise CompileError(f"pip can't find wheels for {platforms[0]}: {_last_line(done.stderr)}; mend that and pack again")


def find_pythons(
    platforms: Sequence[str], pythons: Sequence[str], wanted: Sequence[str]
) -> Mapping[str, Sequence[Wheel]]:
    """Return the wheels by those versions of Python that all packages have one for.

    Raises:
        TargetError: there is none.
        CompileError: as `find_wheels`.
    """
    found = {python: find_wheels(platforms, python, wanted) for python in pythons}
    complete = {python: wheels for python, wheels in found.items() if wheels is not None}
    if not complete:
        raise TargetError(
            f"{', '.join(wanted)} have no wheels for {platforms[0]} and Python {' or '.join(pythons)}; "
            f"give another one by --python"
        )
    return complete


def requirements(wheels: Mapping[str, Sequence[Wheel]]) -> str:
    """Return the text of ``requirements.txt``: every pin with the digests of its wheels for all those Pythons."""
    digests: dict[str, dict[str, None]] = defaultdict(dict)
    for of_python in wheels.values():
        for wheel in of_python:
            digests[wheel.pin][wheel.sha256] = None
    lines = [" \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in each)]) for pin, each in digests.items()]
    return "\n".join(lines) + "\n"


def download(folder: Path, platforms: Sequence[str], pythons: Sequence[str], requirements_file: Path) -> None:
    """Download the wheels into a folder, held against their digests; raises CompileError where that fails."""
    for python in pythons:
        done = _pip(
            "download",
            "--dest",
            str(folder),
            "--require-hashes",
            "-r",
            str(requirements_file),
            *options(platforms, python),
        )
        if done.returncode != 0:
            raise CompileError(
                f"pip can't download wheels for Python {python}: {_last_line(done.stderr)}; mend that and pack again"
            )


def options(platforms: Sequence[str], python: str) -> list[str]:
    """Return pip's options for wheels of another machine."""
    tags = [f"--platform={platform}" for platform in platforms]
    abis = [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
    fixed = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    return [*fixed, *tags, *abis]


def _pip(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A dry run installs nothing, but pip wants a target where the platform is another one.
    target = ["--target=."] if command == "install" else []
    # -P: no pip.py of the folder where the command is given.
    line = [sys.executable, "-P", "-m", "pip", "--quiet", "--disable-pip-version-check", command, *target, *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def _wheel(item: Mapping[str, Any]) -> Wheel:
    facts, info = item["metadata"], item["download_info"]
    name = facts["name"].lower().replace("_", "-")
    digest = info["archive_info"].get("hashes", {}).get("sha256")
    if digest is None:
        raise CompileError(f"pip's index states no SHA-256 of {info['url']}; pack with an index that does")
    return Wheel(pin=f"{name}=={facts['version']}", sha256=digest)


def _last_line(text: str) -> str:
    lines = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.strip()]
    return lines[-1][:MOST_MESSAGE_CHARACTERS] if lines else "it says nothing"
