"""What the disk under a table gives: measured in half a second, and remembered for the next time."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import BundleError
from engram_runtime.strict_json import read_json_object
from engram_runtime.tables.aio import DirectReader
from engram_runtime.tables.place import Place

AT_ONCE = 16  # reads: the rows of a token of common models, and what `reads_per_s` keeps in flight
ONE_S, BATCH_S, FLOW_S, SEQUENTIAL_S = 0.12, 0.16, 0.12, 0.10  # half a second in all
FLOW_CALL_S = 0.02  # of the third, so that a slow disk doesn't take longer than its share
LARGE_READ_BYTES, LARGE_READS = 1 << 20, 4  # of the sequential rate: in flight together, as reading ahead does
VALID_S = 30 * 24 * 3600  # disks age and get full
CACHE_NAME = "engram-edge/disks.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """What random reads of 4 KiB and sequential ones take, past all caches of this machine.

    Attributes:
        one_p50_s, one_p99_s: of a read by itself.
        batch_p50_s, batch_p99_s: of `AT_ONCE` reads together, until the last one is there.
        reads_per_s: with `AT_ONCE` in flight.
        bytes_per_s: of large sequential reads.
        measured_at: in seconds since 1970.
    """

    one_p50_s: float
    one_p99_s: float
    batch_p50_s: float
    batch_p99_s: float
    reads_per_s: float
    bytes_per_s: float
    measured_at: float

    def reads_s(self, count: int) -> float:
        """Return how long ``count`` reads together take, on the line through those of one and of `AT_ONCE`."""
        more = max(self.batch_p50_s - self.one_p50_s, 0)  # noise may have it the other way round
        return self.one_p50_s + more * (count - 1) / (AT_ONCE - 1)


def disk_facts(path: Path, place: Place) -> DiskFacts:
    """Return what is remembered of the disk under a file, or measure it by reading the file.

    Raises:
        OSError: it can't be measured; see `measure_disk`.
    """
    now = time.time()
    known = _remembered()
    if (facts := known.get(place.identity)) is not None and 0 <= now - facts.measured_at < VALID_S:
        return facts
    facts = measure_disk(path)
    try:
        _remember(known | {place.identity: facts})
    except OSError as error:
        log.warning("figures of disk %s can't be kept, they are measured at every start: %s", place.device, error)
    return facts


def measure_disk(path: Path) -> DiskFacts:
    """Measure the disk under a file by reading it here and there.

    Raises:
        OSError: the file can't be read, is too small or has holes, or direct reads are refused.
    """
    size = _sound_size(path)
    rng = np.random.default_rng()
    with DirectReader(path, AT_ONCE) as reader:

        def read_anywhere(count: int, seconds: float) -> NDArray[np.float64]:
            return _repeat(reader, lambda: rng.integers(size, size=count), seconds)

        one = read_anywhere(1, ONE_S)
        batch = read_anywhere(AT_ONCE, BATCH_S)
        many = AT_ONCE * max(1, int(FLOW_CALL_S / np.median(batch)))
        flow = read_anywhere(many, FLOW_S)
    with DirectReader(path, LARGE_READS, LARGE_READ_BYTES) as reader:
        run = LARGE_READ_BYTES * np.arange(LARGE_READS)
        sequential = _repeat(reader, lambda: run + rng.integers(size - run[-1]), SEQUENTIAL_S)
    return DiskFacts(
        one_p50_s=float(np.median(one)),
        one_p99_s=float(np.percentile(one, 99)),
        batch_p50_s=float(np.median(batch)),
        batch_p99_s=float(np.percentile(batch, 99)),
        reads_per_s=many / float(np.median(flow)),
        bytes_per_s=LARGE_READS * LARGE_READ_BYTES / float(np.median(sequential)),
        measured_at=time.time(),
    )


def _sound_size(path: Path) -> int:
    """Return the size of a file; raises OSError where its reads would say nothing of the disk."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < LARGE_READS * LARGE_READ_BYTES:
            raise OSError(errno.EINVAL, f"{path} is too small")
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) < size:
            raise OSError(errno.EINVAL, f"{path} has holes, which no disk reads")
    return size


def _repeat(reader: DirectReader, places: Callable[[], NDArray[np.int64]], seconds: float) -> NDArray[np.float64]:
    """Read places, once at least, until the time is up; returns how long each time took."""
    elapsed: list[float] = []
    until = time.perf_counter() + seconds
    while not elapsed or time.perf_counter() < until:
        elapsed.append(reader.read(places()).elapsed_s)
    return np.array(elapsed)


def cache_file() -> Path:
    """Return the file that remembers disks; raises OSError where this user has no folder for it."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # others are to be ignored, says the specification
        return given / CACHE_NAME
    try:
        return Path.home() / ".cache" / CACHE_NAME
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "no home folder; set XDG_CACHE_HOME") from error


def _remembered() -> dict[str, DiskFacts]:
    """Return the disks by identity; a file that is damaged or isn't there remembers none."""
    try:
        values = read_json_object(cache_file())
    except (BundleError, OSError):
        return {}
    return {identity: facts for identity, value in values.items() if (facts := _parse(value)) is not None}


def _parse(value: Any) -> DiskFacts | None:
    names = {field.name for field in fields(DiskFacts)}
    if not isinstance(value, dict) or value.keys() != names:
        return None
    sound = all(isinstance(number, float) and 0 < number < math.inf for number in value.values())
    return DiskFacts(**value) if sound else None


def _remember(disks: Mapping[str, DiskFacts]) -> None:
    """Replace the file in one step, so that no other process finds half of it."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(json.dumps({identity: asdict(facts) for identity, facts in disks.items()}, indent=1) + "\n")
    beside.replace(path)
