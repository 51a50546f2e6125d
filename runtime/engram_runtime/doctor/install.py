"""Checks of what is installed, against what this distribution says it needs."""

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from engram_runtime.doctor.finding import Finding

DISTRIBUTION = "engram-edge"
SYSTEM_COMPILERS = ("cc", "gcc", "clang")  # that link compiled libraries, the first one found
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[\w,-]+\])?(==|>=)([\w.+]+)(?:; extra == ['\"](\w+)['\"])?")

Installed = Callable[[str], str | None]  # the version of a distribution, None where it isn't installed


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A distribution and its version, of an extra or, where that is None, of the base."""

    name: str
    relation: str
    version: str
    extra: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse what this project's metadata says, which knows no other relations than ``==`` and ``>=``."""
        found = REQUIREMENT.fullmatch(text)
        assert found is not None, text
        return cls(name=found[1], relation=found[2], version=found[3], extra=found[4])

    def met_by(self, version: str) -> bool:
        """Whether a version will do."""
        if self.relation == "==":
            return version == self.version
        return _release(version) >= _release(self.version)

    def __str__(self) -> str:
        return f"{self.name}{self.relation}{self.version}"


def install_findings() -> Iterator[Finding]:
    """Look at the packages the runtime needs, those of the extras, and what links compiled libraries."""
    requirements = [Requirement.parse(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    yield packages([each for each in requirements if each.extra is None], installed_version)
    yield extras([each for each in requirements if each.extra is not None], installed_version)
    yield c_compiler(system_compiler(), installed_version)


def installed_version(name: str) -> str | None:
    """See `Installed`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def system_compiler() -> str | None:
    """Return the path of the system's C compiler."""
    return next((path for name in SYSTEM_COMPILERS if (path := shutil.which(name))), None)


def packages(requirements: Sequence[Requirement], installed: Installed) -> Finding:
    """Check what a box needs to run text."""
    found = {each: installed(each.name) for each in requirements}
    unmet = {str(each): version for each, version in found.items() if version is None or not each.met_by(version)}
    if unmet:
        return Finding("packages", "fail", _differences(unmet), _install(unmet))
    versions = ", ".join(f"{each.name} {version}" for each, version in found.items())
    own = f"{DISTRIBUTION} {installed(DISTRIBUTION)}"
    return Finding("packages", "ok", f"Python {platform.python_version()}, {own}, {versions}")


def extras(requirements: Sequence[Requirement], installed: Installed) -> Finding:
    """Check the packages of extras: those that aren't there may not be wanted, but a wrong version serves nobody."""
    found = {each: installed(each.name) for each in requirements}
    unmet = {str(each): version for each, version in found.items() if version is not None and not each.met_by(version)}
    if unmet:
        return Finding("extras", "warn", _differences(unmet), _install(unmet))
    absent = sorted({str(each.extra) for each, version in found.items() if version is None})
    present = sorted({str(each.extra) for each in requirements} - {*absent})
    lacking = f"; not {', '.join(absent)} (pip install '{DISTRIBUTION}[{absent[0]}]')" if absent else ""
    return Finding("extras", "ok", f"{', '.join(present) or 'none'}{lacking}")


def c_compiler(system: str | None, installed: Installed) -> Finding:
    """Check that there is one where bundles are compiled: the system's, else that of ziglang."""
    if system is not None:
        return Finding("C compiler", "ok", system)
    if (version := installed("ziglang")) is not None:
        return Finding("C compiler", "ok", f"ziglang {version}")
    if installed("apache-tvm") is None:
        return Finding("C compiler", "ok", "none, as this box compiles no bundles")
    return Finding(
        "C compiler", "warn", "none, so engram compile can't link", "install gcc or clang, or pip install ziglang"
    )


def _differences(found: Mapping[str, str | None]) -> str:
    return ", ".join(
        f"{each} is needed, {'it is not installed' if version is None else f'{version} is installed'}"
        for each, version in found.items()
    )


def _install(found: Collection[str]) -> str:
    return f"pip install {' '.join(map(repr, found))}"


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers a version begins with."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else ()
