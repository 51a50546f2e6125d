"""A process that decodes with nothing but a table: the next token follows from all rows that were read before.

    python -m tests.faults.tables_reader BUNDLE IO TOKENS FILL_BYTES  ->  one line of JSON, see `Reading`

Tokens are as often as words are, so that few rows are read often. One wrong bit, and all tokens after it are others.
"""

import json
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tests.faults.tables_bundle import VOCAB, table_file

from engram_runtime.bench.memory import resident_mb
from engram_runtime.bench.tables_cache import fill
from engram_runtime.bundle import Bundle
from engram_runtime.tables.opening import open_table

PLACES = 1 << 16  # that the 32 bits of a checksum fall into
PAGE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What came of it.

    Attributes:
        tokens: in their order.
        p50_us, p99_us: of hashing a token and reading its rows.
        disk_bytes: that the kernel read for this process.
        page_bytes: of the pages that rows lay in, each once.
        anonymous_mb: memory of the process's own.
    """

    tokens: Sequence[int]
    p50_us: float
    p99_us: float
    disk_bytes: int
    page_bytes: int
    anonymous_mb: float


def zipf_tokens() -> Sequence[int]:
    """Return a token for each of `PLACES` places: token r has a share of them that falls as 1 / (r + 1)."""
    shares = 1 / np.arange(1, VOCAB + 1)
    ends = (shares.cumsum() / shares.sum() * PLACES).round().astype(np.int64)
    tokens: list[int] = ends.searchsorted(np.arange(PLACES), side="right").clip(max=VOCAB - 1).tolist()
    return tokens


def read(folder: Path, io: str, count: int, fill_bytes: int) -> Reading:
    """Decode so many tokens, once so many bytes of the file have been read for nothing."""
    bundle = Bundle.open(folder)
    (spec,) = bundle.manifest.tables
    keyer, table, token_of = bundle.keyer(spec.keyer), open_table(bundle, spec, io), zipf_tokens()
    fill(table_file(bundle), fill_bytes)
    before, tokens, checksum = disk_bytes(), [0], 0
    seconds: list[float] = []
    pages: set[int] = set()
    rows = np.empty((spec.keyer.columns, spec.record.columns), dtype=np.float32)
    for _ in range(count):
        began = time.perf_counter()
        row_ids = keyer.row_ids(tokens[:-1], np.array(tokens[-1:]))[0]
        table.gather(row_ids, rows)
        seconds.append(time.perf_counter() - began)
        checksum = zlib.crc32(rows.data, checksum)
        tokens.append(token_of[checksum % PLACES])
        begins = spec.ranges[0].offset + row_ids * spec.record.record_bytes
        pages.update((begins // PAGE).tolist(), ((begins + spec.record.record_bytes - 1) // PAGE).tolist())
    return Reading(
        tokens=tokens,
        p50_us=float(np.median(seconds)) * 1e6,
        p99_us=float(np.percentile(seconds, 99)) * 1e6,
        disk_bytes=disk_bytes() - before,
        page_bytes=PAGE * len(pages),
        anonymous_mb=resident_mb()["rss_anon_mb"],
    )


def disk_bytes() -> int:
    """Return what the kernel has read from disks for this process."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines())
    return int(lines["read_bytes"])


def command(bundle: Bundle, io: str, count: int, fill_bytes: int = 0) -> list[str]:
    """Return the command of such a process."""
    return [sys.executable, "-m", __name__, str(bundle.path), io, str(count), str(fill_bytes)]


if __name__ == "__main__":
    folder, io, *numbers = sys.argv[1:]
    json.dump(asdict(read(Path(folder), io, *map(int, numbers))), sys.stdout)
