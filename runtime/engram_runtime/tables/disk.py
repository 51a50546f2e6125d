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
from engram_runtime.user_cache import cache_folder

AT_ONCE = 16  # reads: the rows of a token of common models, and what `reads_per_s` keeps in flight
ONE_S, BATCH_S, FLOW_S, LOADING_S = 0.12, 0.16, 0.12, 0.10  # half a second in all
FLOW_CALL_S = 0.02  # of the third, so that a slow disk doesn't take longer than its share
PIECE_BYTES, STREAM_BYTES = 4 << 20, 32 << 20  # read one piece after another, at most so many in all
VALID_S = 30 * 24 * 3600  # disks age and get full
CACHE_NAME = "disks.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """What reads of a disk take where this machine has nothing of it in memory.

    Attributes:
        one_p50_s, one_p99_s: of 4 KiB somewhere.
        batch_p50_s, batch_p99_s: of `AT_ONCE` reads together, until the last one is there.
        reads_per_s: with `AT_ONCE` in flight.
        bytes_per_s: of one piece after another, through the page cache, as tables are loaded.
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
    if (known := remembered_facts(place)) is not None:
        return known
    facts = measure_disk(path)
    try:
        _remember(_remembered() | {place.identity: facts})
    except OSError as error:
        log.warning("figures of disk %s can't be kept, they are measured at every start: %s", place.device, error)
    return facts


def remembered_facts(place: Place) -> DiskFacts | None:
    """Return what is remembered of a disk and not too old to hold."""
    facts = _remembered().get(place.identity)
    return facts if facts is not None and 0 <= time.time() - facts.measured_at < VALID_S else None


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
    return DiskFacts(
        one_p50_s=float(np.median(one)),
        one_p99_s=float(np.percentile(one, 99)),
        batch_p50_s=float(np.median(batch)),
        batch_p99_s=float(np.percentile(batch, 99)),
        reads_per_s=many / float(np.median(flow)),
        bytes_per_s=_loading_rate(path, int(rng.integers(max(size - STREAM_BYTES, 1)))),
        measured_at=time.time(),
    )


def _sound_size(path: Path) -> int:
    """Return the size of a file; raises OSError where its reads would say nothing of the disk."""
    size = path.stat().st_size
    if size < PIECE_BYTES:  # a pipe as well, which would wait for a writer if it were opened
        raise OSError(errno.EINVAL, f"{path} is too small")
    with path.open("rb") as file:
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


def _loading_rate(path: Path, start: int) -> float:
    """Return the bytes a second of reading on from ``start``, one piece at least; direct reads may be twice as fast."""
    done, began = 0, time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), start, STREAM_BYTES, os.POSIX_FADV_DONTNEED)
        while done < STREAM_BYTES and (piece := os.pread(file.fileno(), PIECE_BYTES, start + done)):
            done += len(piece)
            if time.perf_counter() > began + LOADING_S:
                break
    return done / (time.perf_counter() - began)


def cache_file() -> Path:
    """Return the file that remembers disks; raises OSError where this user has no folder for it."""
    return cache_folder() / CACHE_NAME


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
