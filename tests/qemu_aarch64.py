"""An arm64 Linux on any Linux: Debian's own Python with wheels of PyPI, run instruction by instruction by qemu."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from engram_compilers.pack.packages import PLATFORMS, options

QEMU = "qemu-aarch64-static"
PYTHON = "3.11"
# Debian's, with the C library and those that Python's own modules and the wheels are linked to.
DEBIAN_PACKAGES = (
    f"python{PYTHON}-minimal",
    f"libpython{PYTHON}-minimal",
    f"libpython{PYTHON}-stdlib",
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "libffi8",
    "libssl3",
    "zlib1g",
    "libexpat1",
    "libbz2-1.0",
    "liblzma5",
)
# What Linux says of these processors; qemu 7.2 hands out the host's /proc/cpuinfo instead.
CORTEX_A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
CORTEX_A72 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
# Of what it is taken for, uscat alone is not emulated by qemu 7.2; nothing here takes 16 bytes at once.
MAX = f"{CORTEX_A76} asimdfhm fcma flagm ilrcpc uscat bf16 i8mm sve sve2"
FEATURES = {"cortex-a72": CORTEX_A72, "cortex-a76": CORTEX_A76, "max": MAX}


@dataclass(frozen=True)
class Arm64Box:
    """A folder that holds an arm64 Linux's Python, and a processor, as qemu calls it, that is emulated."""

    root: Path
    processor: str

    @property
    def features(self) -> frozenset[str]:
        """What Linux says that the processor has."""
        return frozenset(FEATURES[self.processor].split())

    def run(self, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a folder's ``engram``, or, after ``-c``, a program of this Python there."""
        cpuinfo = self.root / "proc" / "cpuinfo"
        cpuinfo.parent.mkdir(exist_ok=True)
        cpuinfo.write_text(f"processor\t: 0\nFeatures\t: {FEATURES[self.processor]}\n")
        start = [] if arguments[0] == "-c" else ["engram"]
        python = self.root / "usr" / "bin" / f"python{PYTHON}"
        line = [QEMU, "-cpu", self.processor, "-L", str(self.root), str(python), *start, *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
        return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def missing() -> str | None:
    """Say what has to be installed before an arm64 Linux can be made here, or None if nothing has."""
    if shutil.which(QEMU) is None:
        return f"no {QEMU}: apt-get install qemu-user-static"
    if shutil.which("dpkg") is None or shutil.which("apt-get") is None:
        return "no apt-get: packages of Debian's are what is emulated"
    architectures = subprocess.run(
        ["dpkg", "--print-foreign-architectures"], capture_output=True, text=True, check=True
    )
    if "arm64" not in architectures.stdout.split():
        return "no packages for arm64: dpkg --add-architecture arm64 && apt-get update"
    return None


def download_root(home: Path) -> str | None:
    """Download and unpack an arm64 Python to ``home/root``; says why that can't be, or None where it is there."""
    packages, root = home / "packages", home / "root"
    packages.mkdir()
    names = [f"{name}:arm64" for name in DEBIAN_PACKAGES]
    done = subprocess.run(["apt-get", "download", *names], cwd=packages, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"apt-get can't download python{PYTHON}:arm64: {done.stderr.strip().splitlines()[-1]}"
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    return None


def install(folder: Path) -> None:
    """Install a packed folder's packages as its README says, but by this machine's pip for the other."""
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", "site"]
    line += ["--require-hashes", "-r", "requirements.txt", *options(PLATFORMS["linux", "aarch64"], PYTHON)]
    subprocess.run(line, cwd=folder, check=True, capture_output=True)
