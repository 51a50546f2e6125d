"""Disks and places that tests make up."""

import time
from pathlib import Path

from engram_runtime.tables.disk import DiskFacts
from engram_runtime.tables.place import DISK, Place

VDA = Place(kind=DISK, file_system="ext4", device="vda", identity="vda 1000")


def flash_disk() -> DiskFacts:
    """Return what an ordinary flash disk gives, measured now."""
    return DiskFacts(
        one_p50_s=100e-6,
        one_p99_s=400e-6,
        batch_p50_s=250e-6,
        batch_p99_s=900e-6,
        reads_per_s=80e3,
        bytes_per_s=2.0**30,
        measured_at=time.time(),
    )


def slow_disk(path: Path, place: Place) -> DiskFacts:
    """Return what a turning disk gives, measured now."""
    return DiskFacts(
        one_p50_s=8e-3,
        one_p99_s=20e-3,
        batch_p50_s=68e-3,
        batch_p99_s=120e-3,
        reads_per_s=240.0,
        bytes_per_s=2.0**27,
        measured_at=time.time(),
    )
