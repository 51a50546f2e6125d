"""The memory bandwidth this machine gives to as many bytes as a token reads, measured with numpy alone."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from threading import Barrier

import numpy as np

PASSES = 40  # the best of a few is now and then half as high again as all others
LEAST_BYTES, MOST_BYTES = 64 * 10**6, 400 * 10**6  # beyond caches of one's own; to be read in a blink
METHOD = "numpy.max over {:.0f} MB of float32, each thread's part touched by it first; median of 40 passes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """The rate in GB/s (10^9 bytes) at which ``read_bytes`` were read."""

    gb_s: float
    read_bytes: int


def working_set(bytes_per_token: int | None) -> int:
    """Return how many bytes to read: what a token reads, within limits; the most where that isn't known."""
    return MOST_BYTES if bytes_per_token is None else min(max(bytes_per_token, LEAST_BYTES), MOST_BYTES)


def read_bandwidth(threads: int, read_bytes: int) -> Bandwidth:
    """Return the usual rate at which ``threads`` threads read memory, each a part of it that is its own."""
    part = read_bytes // 4 // threads
    together = Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:
        passes = zip(*pool.map(lambda _: _read(part, together), range(threads)), strict=True)
        seconds = [max(ended for _, ended in times) - min(started for started, _ in times) for times in passes]
    return Bandwidth(gb_s=part * 4 * threads / median(seconds) / 1e9, read_bytes=part * 4 * threads)


def _read(count: int, together: Barrier) -> list[tuple[float, float]]:
    """Read as many numbers in every pass; returns when each began and ended."""
    values = np.ones(count, dtype=np.float32)  # written here, so the pages are near this thread's core
    times = []
    for _ in range(PASSES):
        together.wait()
        started = time.perf_counter()
        values.max()
        times.append((started, time.perf_counter()))
    return times
