"""The supply chain: what is installed is locked with its hashes, and programs are the installed ones."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from engram_compilers.linking import linker
from engram_compilers.pack.packages import pins

ROOT = Path(__file__).parents[1]
LOCKS = {path.stem: path for path in sorted((ROOT / "locks").glob("*.txt"))}
PIN = re.compile(r"([a-z0-9-]+)==(\S+)(?: ; (.+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")
NOT_LOCKED = {
    "peers",
    "supply",
}  # llama.cpp is built from source; the tools of the supply chain have a lock of their own


def locked(path: Path) -> dict[str, Requirement]:
    """Return what a file locks, by name; every line of it must be of a pin with hashes."""
    entries = PIN.findall(path.read_text(encoding="utf-8"))
    return {name: Requirement(f"{name}=={pin}" + (f"; {marker}" if marker else "")) for name, pin, marker, _ in entries}


def installed_pins() -> dict[str, Requirement]:
    """Return what `make setup` installs; of torch PyPI's version, which the CPU build is one of."""
    return locked(LOCKS["development"]) | {"torch": locked(LOCKS["torch"])["torch"]}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_nothing_but_pins_with_hashes(name: str) -> None:
    text = re.sub(r"^#.*\n", "", LOCKS[name].read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert PIN.search(text)
    assert PIN.sub("", text) == ""


def test_the_lock_is_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = {"": project["project"]["dependencies"], **project["project"]["optional-dependencies"]}
    asked |= project["dependency-groups"]
    wanted = [Requirement(text) for name, texts in asked.items() if name not in NOT_LOCKED for text in texts]
    found = installed_pins()
    for requirement in wanted:
        (pin,) = found[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(pin.version), f"{requirement}, locked is {pin.version}: run make lock"


def test_what_is_installed_is_what_is_locked() -> None:
    here = [each for each in installed_pins().values() if each.marker is None or each.marker.evaluate()]
    assert [str(each) for each in here if not each.specifier.contains(version(each.name), prereleases=True)] == []


def test_both_builds_of_torch_are_of_one_version() -> None:
    build, *_ = locked(LOCKS["torch-cpu"])["torch"].specifier
    assert str(locked(LOCKS["torch"])["torch"].specifier) == f"=={Version(build.version).public}"


def test_packed_folders_pin_what_was_tested() -> None:
    found = installed_pins()
    assert all(Requirement(pin).specifier == found[Requirement(pin).name].specifier for pin in pins("0.1.14.post1"))


def test_modules_are_run_from_where_they_are_installed(tmp_path: Path) -> None:
    (tmp_path / "ziglang.py").write_text("print('not the installed one')")
    command = [*linker("aarch64-linux-gnu"), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("clang version")


def test_no_program_of_the_project_runs_a_module_of_the_folder_it_is_called_in() -> None:
    places = [ROOT / name for name in ("runtime", "targets", "compilers", "export")]
    sources = {path: path.read_text(encoding="utf-8") for place in places for path in place.rglob("*.py")}
    started = re.compile(r'sys\.executable,\s*(?!"-P"|"-I")\S+')
    assert [(path.name, call) for path, text in sources.items() for call in started.findall(text)] == []
