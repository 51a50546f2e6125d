"""What a profile says, as JSON values."""

import dataclasses
from pathlib import Path
from typing import Any

from engram_runtime.library import LIBRARY_FOLDER, LIBRARY_INFO_NAME
from engram_targets.common import Profile
from engram_targets.fitting import misfit, needs


def summary(profile: Profile, bundle: Path | None) -> dict[str, Any]:
    """Return a line of the listing: ``misfit`` is null where this machine may run it, ``compiled`` is of ``bundle``."""
    facts = {
        "name": profile.name,
        "device": profile.device,
        "kernels": profile.kernels,
        "evidence": profile.evidence,
        "misfit": misfit(profile),
        "description": profile.description,
    }
    return facts if bundle is None else facts | {"compiled": is_compiled(profile, bundle)}


def is_compiled(profile: Profile, bundle: Path) -> bool:
    """Whether a bundle holds something that was compiled for a target."""
    return (bundle / LIBRARY_FOLDER / profile.name / LIBRARY_INFO_NAME).is_file()


def full_description(profile: Profile) -> dict[str, Any]:
    """Return all fields, and what it takes to compile for it and to run what came of it."""
    return {
        "device": profile.device,
        **dataclasses.asdict(profile),
        "misfit": misfit(profile),
        "needs": dataclasses.asdict(needs(profile)),
    }
