"""Hashes of many integers or records at once, to sample by and to find equal ones; nothing is kept on disk by them."""

import numpy as np
from numpy.typing import NDArray

from engram_runtime.hashing import SPLITMIX_GAMMA, SPLITMIX_MULTIPLIERS


def mixed_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64 of ``[N]`` values: another value for each, all bits of which look random."""
    mixed = values + np.uint64(SPLITMIX_GAMMA)
    for shift, multiplier in zip((30, 27), SPLITMIX_MULTIPLIERS, strict=True):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(multiplier)
    return mixed ^ mixed >> np.uint64(31)


def in_sample(hashes: NDArray[np.uint64], rate: float) -> NDArray[np.bool_]:
    """Return which of ``[N]`` hashes lie in a share of their range, so that equal things are in or out together."""
    chosen: NDArray[np.bool_] = hashes >> np.uint64(32) < np.uint64(round(rate * 2**32))
    return chosen


def record_hashes(records: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each of ``[N, record_bytes]`` records, which should all be of one length."""
    num_rows, record_bytes = records.shape
    padded = np.zeros((num_rows, -(-record_bytes // 8) * 8), dtype=np.uint8)
    padded[:, :record_bytes] = records
    hashes = np.zeros(num_rows, dtype=np.uint64)
    for words in padded.view(np.uint64).T:
        hashes = mixed_bits(hashes ^ words)
    return hashes
