"""C3: reads of tables that fail, are cut short or interrupted by signals, by a library loaded before the system's."""

import errno
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tests.faults.row import Outcome, Row
from tests.faults.shim import SHORT, Fault, arm, disarm, preloaded, seen
from tests.faults.tables_bundle import Gather, open_records, open_rows, true_rows, write_bundle

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TableError
from engram_runtime.tables.options import PREAD, RESIDENT

TABLE_BYTES = 320_000
BATCH = 48
KINDS = {"EIO": errno.EIO, "EINTR": errno.EINTR, "short": SHORT}
PIECE_ROWS = 200  # 32 kB
LATEST = {"pread": BATCH // 2, "records": 10, "resident": 1}  # read that fails: there are more, but for short ones


def failing_reads(count: int) -> Outcome:
    """Run `inject` in a process with the library; what it prints is the outcome."""
    command = [sys.executable, "-m", __name__, str(count)]
    done = subprocess.run(command, env=preloaded(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return Outcome(tried=count, survived=0, failures=(f"exit code {done.returncode}: {done.stderr[-800:]}",))
    found = json.loads(done.stdout)
    return Outcome(**found | {"failures": tuple(found["failures"])})


def inject(count: int) -> Outcome:
    """Let reads fail until so many have: one or all from one on, each kind, by three ways of reading in turn."""
    rng, failures = random.Random("C3"), []
    injected: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "bundle", TABLE_BYTES)
        rows = true_rows(bundle)
        ways = {"pread": opened(bundle, PREAD), "records": records(bundle), "resident": opened(bundle, RESIDENT)}
        while (done := injected.total()) < count:
            way, kind = rng.choice([*ways, PREAD, PREAD]), rng.choice(list(KINDS))
            fault = Fault(
                calls=("pread",),
                nth=rng.randint(1, LATEST[way]),
                error=KINDS[kind],
                sticky=kind == "EIO" and rng.random() < 0.5,
                path="tables/",
            )
            row_ids = np.array([rng.randrange(len(rows)) for _ in range(BATCH)])
            wrong, times = injected_once(ways[way], rows, row_ids, fault)
            injected[kind] += times
            if wrong:
                failures.append(f"after {done} of seed C3, {way}: {fault}: {wrong}")
    figure = ", ".join(f"{times} {kind}" for kind, times in sorted(injected.items()))
    return Outcome(
        tried=injected.total(), survived=injected.total() - len(failures), figure=figure, failures=tuple(failures[:8])
    )


def injected_once(
    gather: Gather, rows: NDArray[np.float32], row_ids: NDArray[np.int64], fault: Fault
) -> tuple[str, int]:
    """Return what was wrong, and how many reads failed: EIO must be an error, the others must not be felt."""
    arm(fault)
    try:
        found, error = gather(row_ids), None
    except TableError as caught:
        found, error = None, caught
    hit = max(seen() - fault.nth + 1, 0)
    disarm()
    times = hit if fault.sticky else min(hit, 1)
    if found is not None and not np.array_equal(found, rows[row_ids]):
        return "wrong rows", times
    if (error is not None) != (times > 0 and fault.error == errno.EIO):
        return f"{times} reads failed and what came was {error or 'the rows'}", times
    if not np.array_equal(gather(row_ids), rows[row_ids]):
        return "wrong rows once reads worked again", times
    return "", times


def opened(bundle: Bundle, io: str) -> Gather:
    """Open the table anew for each batch, so that every row is read with the blocks it lies in."""

    def gather(row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        read, close = open_rows(bundle, io)
        try:
            return read(row_ids)
        finally:
            close()

    return gather


def records(bundle: Bundle) -> Gather:
    """Read all records, as `engram tables stat` does."""

    def gather(row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with open_records(bundle) as table:
            starts = range(0, table.spec.num_rows, PIECE_ROWS)
            pieces = [table.read_rows(start, min(PIECE_ROWS, table.spec.num_rows - start)) for start in starts]
            return table.spec.record.decode(np.concatenate(pieces)[row_ids])

    return gather


ROWS = (
    Row(
        name="C3",
        fault="EIO, EINTR or a short count from pread of a table, once or from then on",
        expected="EIO is a TableError, the others are not felt; no wrong row",
        quick=10_000,
        full=200_000,
        run=failing_reads,
    ),
)


if __name__ == "__main__":
    outcome = inject(int(sys.argv[1]))
    json.dump(asdict(outcome), sys.stdout)
