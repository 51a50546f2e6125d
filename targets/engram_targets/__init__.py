"""Target profiles: what a kind of machine is, as data."""

from engram_targets.profile import TargetProfile, detect_native, load_profile, profile_names

__all__ = ["TargetProfile", "detect_native", "load_profile", "profile_names"]
