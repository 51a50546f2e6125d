"""What checking a table's blocks costs: hashes, sizes of blocks, and the stores with and without checks.

    python benchmarks/block_checksums.py FOLDER [--gib 1] [--tokens 400] [--hashes DIR]

FOLDER is to lie on a disk; DIR holds xxhash, google-crc32c and blake3 (`pip install --target DIR ...`), which are left
out where they are missing. What is compared is measured in turn, round by round; medians are printed.
"""

import argparse
import importlib
import itertools
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from big_table import INT8, big_table, write_bundle
from numpy.typing import NDArray

from engram_runtime.bench.tables_cache import evict, fill
from engram_runtime.bundle import Bundle
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.opening import open_table
from engram_runtime.tables.options import MMAP, PREAD, RESIDENT

Hash = Callable[[memoryview], object]
BLOCKS = (4096, 16_384, 65_536)
ROUNDS, CALLS, ROWS = 9, 400, 16
PEERS = {  # module, its function, bytes of a checksum
    "xxh3_64": ("xxhash", "xxh3_64_intdigest", 8),
    "crc32c": ("google_crc32c", "value", 4),
    "blake3": ("blake3", "blake3", 32),
}


def hashes() -> Mapping[str, tuple[Hash, int]]:
    """Return each hash that is there and the bytes it takes for a block."""
    found: dict[str, tuple[Hash, int]] = {
        "crc32 (zlib)": (zlib.crc32, 4),
        "sha256": (lambda data: sha256(data).digest(), 32),
    }
    for name, (module, function, size) in PEERS.items():
        try:
            call = getattr(importlib.import_module(module), function)
        except ModuleNotFoundError:
            continue
        found[name] = (bytes_first(call) if name == "crc32c" else call), size
    return found


def bytes_first(call: Callable[[bytes], object]) -> Hash:
    """Return a hash that copies what it is given, as this one takes nothing but bytes."""
    return lambda data: call(bytes(data))


def time_hashes(path: Path) -> None:
    """Print microseconds of a block, and checksums of a GiB, for each hash and size of block."""
    data = memoryview(bytearray(path.read_bytes()[: 16 << 20]))
    samples: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for name, (hashed, _) in hashes().items():
            for block in BLOCKS:
                pieces = [data[at : at + block] for at in range(0, len(data), block)][:CALLS]
                began = time.perf_counter()
                for piece in pieces:
                    hashed(piece)
                samples.setdefault((name, block), []).append((time.perf_counter() - began) / len(pieces))
    for (name, block), seconds in samples.items():
        _, size = hashes()[name]
        say(
            f"{name:13} {block >> 10:3} KiB: {1e6 * statistics.median(seconds):7.2f} us a block, "
            f"{statistics.median(seconds) * 2**30 / block:6.2f} s a GiB, {size * 2**30 / block / 2**20:7.3f} MiB a GiB"
        )


def time_reads(path: Path) -> None:
    """Print what a token's rows take from a cold disk, read with blocks of each size around them."""
    size = path.stat().st_size
    samples: dict[int, list[float]] = {}
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        for block in BLOCKS:
            evict(path)
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for _ in range(40):
                    places = rng.integers(0, size // block - 1, size=ROWS) * block
                    began = time.perf_counter()
                    for place in places.tolist():
                        os.posix_fadvise(file.fileno(), place, block, os.POSIX_FADV_WILLNEED)
                    for place in places.tolist():
                        os.pread(file.fileno(), block, place)
                    samples.setdefault(block, []).append(time.perf_counter() - began)
    for block, seconds in samples.items():
        say(f"cold reads of {ROWS} blocks of {block >> 10:2} KiB: {1e6 * statistics.median(seconds):7.0f} us")


def time_stores(bundle: Bundle, tokens: int) -> None:
    """Print what a token's rows take from each store with and without checks: cold, first touched, and known."""
    specs = {"checked": bundle.manifest.tables[0], "unchecked": unchecked(bundle.manifest.tables[0])}
    samples: dict[tuple[str, str, str], list[float]] = {}
    seeds = itertools.count()  # none twice: what a virtual disk has read, its host may have in memory
    for number in range(ROUNDS):
        order = list(specs.items())[:: 1 if number % 2 else -1]
        for io in (PREAD, MMAP):
            for name, spec in order:
                for state, took in states(bundle, spec, io, tokens, next(seeds)).items():
                    samples.setdefault((io, state, name), []).append(took)
        fill(file_of(bundle), file_of(bundle).stat().st_size)
        for name, spec in order:
            began = time.process_time()
            open_table(bundle, spec, RESIDENT).close()
            samples.setdefault((RESIDENT, "loaded from memory", name), []).append(time.process_time() - began)
    for (io, state, name), seconds in sorted(samples.items()):
        say(f"{io:8} {state:18} {name:9}: {1e6 * statistics.median(seconds):10.1f} us")


def file_of(bundle: Bundle) -> Path:
    """Return the file of the table's rows."""
    return bundle.file(bundle.manifest.tables[0].ranges[0].file)


def unchecked(spec: TableSpec) -> TableSpec:
    """Return a table without its checksums."""
    parts = [replace(part, ranges=tuple(replace(rows, checksums=None) for rows in part.ranges)) for part in spec.parts]
    return replace(spec, parts=tuple(parts))


def states(bundle: Bundle, spec: TableSpec, io: str, tokens: int, seed: int) -> Mapping[str, float]:
    """Return the median seconds of a token's rows in each state."""
    rng = np.random.default_rng(seed)
    batches = rng.integers(0, spec.num_rows, size=(tokens, ROWS))
    out = np.empty((ROWS, INT8.columns), dtype=np.float32)
    evict(file_of(bundle))
    found = {}
    for state in ("cold", "first, in memory"):
        table = open_table(bundle, spec, io)  # the second one finds the first one's pages in the page cache
        found[state] = median_of(table.gather, batches, out)
        found["known"] = median_of(table.gather, batches, out)
        table.close()
    return found


def median_of(gather: Callable[..., None], batches: NDArray[np.int64], out: object) -> float:
    """Return the median seconds of a batch."""
    seconds = []
    for row_ids in batches:
        began = time.perf_counter()
        gather(row_ids, out)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a table and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--hashes", type=Path)
    options = parser.parse_args(arguments)
    if options.hashes is not None:
        sys.path.append(str(options.hashes))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = big_table(int(options.gib * 2**30), INT8, ROWS)
        bundle = write_bundle(Path(folder) / "bundle", table, lambda count: None)
        time_hashes(file_of(bundle))
        time_reads(file_of(bundle))
        time_stores(bundle, options.tokens)


if __name__ == "__main__":
    main()
