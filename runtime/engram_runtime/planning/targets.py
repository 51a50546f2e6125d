"""Profiles of targets, which another package of the project has."""

import importlib
from dataclasses import dataclass
from typing import Any

from engram_runtime.errors import TargetError

TARGETS, CPU = "engram_targets", "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a plan goes by of a profile.

    Attributes:
        machine, cpu_flags: what it is for.
        kernels: kernel family.
        chunk: tokens of the largest forward pass.
        threads: how many run it, 0 for one on each core.
        half_caches: whether keys and values are float16.
    """

    name: str
    machine: str
    cpu_flags: frozenset[str]
    kernels: str
    chunk: int
    threads: int
    half_caches: bool


def read_target(name: str) -> Target:
    """Return a profile by name, ``native`` for the one that fits this machine.

    Raises:
        TargetError: no such profile, none fits, or it isn't one of a processor, whose speed alone is predicted.
    """
    profile: Any = importlib.import_module(TARGETS).load_profile(name)
    if profile.device != CPU:
        raise TargetError(f"target {name} is of device {profile.device!r}, plans are made for processors only")
    return Target(
        name=profile.name,
        machine=profile.machine,
        cpu_flags=frozenset(profile.cpu_flags),
        kernels=profile.kernels,
        chunk=max((*profile.decode_tokens, *profile.prefill_tokens)),
        threads=profile.threads,
        half_caches=profile.cache_dtype == "float16",
    )
