"""The memory bandwidth this machine gives, measured with numpy alone."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

METHOD = "numpy.max over 400 MB of float32, best of 7 passes"
READ_BYTES, PASSES = 400 * 10**6, 7  # several times any cache that is one's own


def read_bandwidth_gb_s(threads: int) -> float:
    """Return the best rate in GB/s (10^9 bytes) at which ``threads`` threads read memory, each a part of it."""
    values = np.ones(READ_BYTES // 4, dtype=np.float32)  # ones: pages of zeros may be one and the same
    parts = np.array_split(values, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - started)
    return values.nbytes / min(seconds) / 1e9
