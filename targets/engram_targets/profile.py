"""Read target profiles and find the one that fits this machine."""

import reprlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from engram_runtime.cpu import machine, usable_cpu_flags
from engram_runtime.errors import BundleError, TargetError
from engram_runtime.strict_json import Fields
from engram_targets.common import WORD, Profile
from engram_targets.cpu import CpuProfile
from engram_targets.gpu import GpuProfile
from engram_targets.npu import NpuProfile
from engram_targets.portable_c import CProfile

NATIVE = "native"
SUFFIX = ".toml"
MOST_BYTES = 64 << 10  # a profile has about 1 kB


def profile_names() -> list[str]:
    """Return the profiles that come with the package."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(SUFFIX))


def load_profile(name: str) -> Profile:
    """Load a profile by name, or a user's own by the path of a ``.toml`` file; ``native`` is this machine's.

    Raises:
        TargetError: no such profile or file, none fits, or the file says what can't be.
    """
    if name == NATIVE:
        return detect_native(machine(), usable_cpu_flags())
    if name in profile_names():
        return parse_profile(name, _shipped(name))
    if name.endswith(SUFFIX):
        return _read_file(Path(name))
    raise TargetError(
        f"target {name!r} is unknown; there are {[NATIVE, *profile_names()]}, and files by path, *{SUFFIX}"
    )


def load_cpu_profile(name: str) -> CpuProfile:
    """Load the profile of a processor by name, or this machine's; raises TargetError for any other."""
    if name != NATIVE and name not in cpu_profile_names():
        raise TargetError(f"cpu target {name!r} is unknown; there are {[NATIVE, *cpu_profile_names()]}")
    profile = load_profile(name)
    assert isinstance(profile, CpuProfile)
    return profile


def cpu_profile_names() -> list[str]:
    """Return the profiles of processors that come with the package."""
    return [name for name in profile_names() if _shipped(name)["device"] == CpuProfile.device]


def detect_native(architecture: str, flags: Iterable[str]) -> CpuProfile:
    """Return the profile that asks for most of what a machine has; raises TargetError if none fits."""
    available = set(flags)
    profiles = [load_cpu_profile(name) for name in cpu_profile_names()]
    fitting = [profile for profile in profiles if profile.fits(architecture, available)]
    if not fitting:
        raise TargetError(f"no target profile fits a {architecture} machine; there are {cpu_profile_names()}")
    return max(fitting, key=lambda profile: len(profile.cpu_flags))


def parse_profile(name: str, raw: Mapping[str, Any]) -> Profile:
    """Check and build what a file holds; raises TargetError naming the key."""
    device = raw.get("device")
    if type(device) is not str or device not in DEVICES:
        raise TargetError(f"profile {name} has device {reprlib.repr(device)}, there are {list(DEVICES)}")
    fields = Fields({key: value for key, value in raw.items() if key != "device"}, f"profile {name}")
    try:
        return DEVICES[device](name, fields)
    except BundleError as error:
        raise TargetError(str(error)) from error


def _npu_profile(name: str, fields: Fields) -> NpuProfile:
    return NpuProfile.from_fields(name, fields, load_cpu_profile(fields.take("host", str)))


DEVICES: Mapping[str, Callable[[str, Fields], Profile]] = {
    "cpu": CpuProfile.from_fields,
    "c": CProfile.from_fields,
    "gpu": GpuProfile.from_fields,
    "npu": _npu_profile,
}


def _folder() -> resources.abc.Traversable:
    return resources.files("engram_targets") / "profiles"


@cache
def _shipped(name: str) -> Mapping[str, Any]:
    return tomllib.loads((_folder() / f"{name}{SUFFIX}").read_text(encoding="utf-8"))


def _read_file(path: Path) -> Profile:
    name = path.stem
    if not WORD.fullmatch(name) or name.startswith((".", "-")):
        raise TargetError(f"profile file {path} has a name that names no target: letters, digits and any of . _ + - do")
    if name in (NATIVE, *profile_names()):
        raise TargetError(f"profile file {path} has the name of a target that comes with engram-edge; rename it")
    return parse_profile(name, _read_toml(path))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise TargetError(f"profile file {path} can't be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise TargetError(f"profile file {path} has more than the {MOST_BYTES} bytes a profile may have")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise TargetError(f"profile file {path} is not valid TOML: {error}") from error
