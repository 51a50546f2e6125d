"""TVM's runtime library for a target: the installed one where the target is this machine, else that of a wheel.

Wheels are had from the package index by pip, which checks the pinned digest; of one, 95 MB, only the library is kept,
3 MB in the user's cache.
"""

import hashlib
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tvm

from engram_runtime.bundle import file_sha256
from engram_runtime.errors import CompileError
from engram_runtime.user_cache import cache_folder

PINS = Path(__file__).with_name("runtime_wheels.toml")
PACKAGE = "apache-tvm"
INSTALLED = Path(tvm.__file__).parent / "lib"
MEMBERS = "tvm/lib"  # of a wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeWheel:
    """A wheel of TVM and the library in it, as `PINS` states them.

    Attributes:
        machine, system: whose it is, as target profiles call them.
        platform: the wheel's tag.
    """

    version: str
    machine: str
    system: str
    platform: str
    sha256: str
    library: str
    library_bytes: int
    library_sha256: str

    @property
    def requirement(self) -> str:
        return f"{PACKAGE}=={self.version}"


def pinned_wheels() -> list[RuntimeWheel]:
    """Return the wheels that `PINS` states."""
    pins = tomllib.loads(PINS.read_text(encoding="utf-8"))
    return [RuntimeWheel(version=pins["version"], **wheel) for wheel in pins["wheels"]]


def installed_library() -> Path:
    """Return the runtime library of the TVM that is installed here."""
    return next(path for path in (INSTALLED / "libtvm_runtime.so", INSTALLED / "libtvm_runtime.dylib") if path.exists())


def library_of(machine: str, system: str, report: Callable[[str], None]) -> Path | None:
    """Return the runtime library for another kind of machine, or None where no wheel has one.

    Args:
        report: told before a wheel is downloaded.

    Raises:
        CompileError: the wheel can't be downloaded, or isn't the pinned one.
        OSError: the cache can't be written.
    """
    wheel = next((each for each in pinned_wheels() if (each.machine, each.system) == (machine, system)), None)
    if wheel is None:
        return None
    kept = cache_folder() / f"{PACKAGE}-{wheel.version}-{wheel.platform}" / wheel.library
    if not kept.is_file() or file_sha256(kept) != wheel.library_sha256:
        report(f"downloading {wheel.requirement} for {wheel.platform}; its runtime library is kept in {kept.parent}")
        _keep(wheel, kept)
    return kept


def _keep(wheel: RuntimeWheel, kept: Path) -> None:
    """Download a wheel beside what is to be kept of it."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        library = Path(folder) / wheel.library
        library.write_bytes(_library_in(_download(wheel, Path(folder)), wheel))
        library.replace(kept)


def _download(wheel: RuntimeWheel, folder: Path) -> Path:
    """Let pip download a wheel, from where this user's pip is set to, and check its digest."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", f"--platform={wheel.platform}"]
    command += [f"--dest={folder}", f"--requirement={requirements}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CompileError(
            f"the wheel of {wheel.requirement} for {wheel.platform}, whose runtime library the target needs, can't be "
            f"downloaded: {reason}; connect this machine once, or set PIP_FIND_LINKS to a folder with that wheel"
        )
    return next(folder.glob("*.whl"))


def _library_in(path: Path, wheel: RuntimeWheel) -> bytes:
    """Return a wheel's runtime library, of which no more is unpacked than it should have."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{MEMBERS}/{wheel.library}") as member:
        content = member.read(wheel.library_bytes + 1)
    if (found := hashlib.sha256(content).hexdigest()) != wheel.library_sha256:
        raise CompileError(
            f"{wheel.library} of {path.name} has SHA-256 {found}, expected {wheel.library_sha256}; "
            f"this engram-edge states another wheel than it was made with: install it anew"
        )
    return content
