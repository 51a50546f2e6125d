"""The machine a plan is for: measured here, or given."""

from dataclasses import dataclass
from pathlib import Path

from engram_runtime.memory import FreeMemory
from engram_runtime.planning.disks import DISKS, SOURCES
from engram_runtime.tables.disk import DiskFacts, disk_facts
from engram_runtime.tables.place import DISK, Place, place_of
from engram_runtime.tables.policy import Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk's figures, or why there are none; ``words`` say where they come from."""

    facts: DiskFacts | None
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What predictions go by.

    Attributes:
        memory: that may be taken.
        bandwidth_gb_s: of memory, in 10^9 bytes.
        kernels: kernel family of the target.
        chunk: tokens of its largest forward pass.
        free_disk_bytes: where an export would be written, or None where the machine isn't this one.
        measured_bandwidth: whether it was measured here.
    """

    memory: FreeMemory
    bandwidth_gb_s: float
    measured_bandwidth: bool
    threads: int
    target: str
    kernels: str
    chunk: int
    disk: Disk
    free_disk_bytes: int | None


def measured_disk(path: Path | None, measure: Measure = disk_facts) -> Disk:
    """Return the disk under a file, measured or as it is remembered."""
    if path is None:
        return Disk(facts=None, words="not measured, there is no file on it to read; give --disk")
    place = place_of(path)
    try:
        return Disk(facts=measure(path, place), words=f"{place.device}, measured here")
    except OSError as error:
        return Disk(facts=None, words=f"not measured ({error.strerror}); give --disk")


def kind_of_disk(kind: str) -> Disk:
    """Return a disk of a kind of `engram_runtime.planning.disks.DISKS`."""
    return Disk(facts=DISKS[kind], words=f"{kind}: {SOURCES[kind]}")


def place_on(kind: str) -> Place:
    """Return a place on a disk of that kind."""
    return Place(kind=DISK, file_system="any", device=kind, identity=kind)


def telling(disk: Disk) -> Measure:
    """Return what tells of a disk in place of a measurement."""

    def measure(path: Path, place: Place) -> DiskFacts:
        if disk.facts is None:
            raise OSError(0, disk.words)
        return disk.facts

    return measure
