"""C6 and C8: less memory than the table has, and many processes over one bundle."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.faults.row import CannotRun, Outcome, Row
from tests.faults.tables_bundle import IOS, table_file, write_bundle
from tests.faults.tables_reader import Reading, command

from engram_runtime.bench.cgroup import memory_group
from engram_runtime.bench.tables_cache import cached_share, evict
from engram_runtime.bundle import Bundle
from engram_runtime.errors import TargetError
from engram_runtime.tables.options import MMAP, PREAD

TABLE_BYTES, SHARED_BYTES = 512 << 20, 64 << 20
SPARE_BYTES = 8 << 20  # of the kernel's own that count as a process's
PROCESSES = 8
MOST_MORE = 1.1  # memory of its own that one of several processes may have, over that of a lonely one


def a_tenth(count: int) -> Outcome:
    """Cap the memory for pages at a tenth of the table."""
    return capped(count, 0.1)


def a_fiftieth(count: int) -> Outcome:
    """Cap the memory for pages at a fiftieth of the table."""
    return capped(count, 0.02)


def capped(count: int, share: float) -> Outcome:
    """Decode tokens without a cap and within one, from a cold cache, and compare them one by one."""
    figures, same = [], 0
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "bundle", TABLE_BYTES)
        check_is_on_disk(bundle)
        for io in (PREAD, MMAP):
            free = alone(bundle, io, count)
            cap = int(free.anonymous_mb * 1e6) + SPARE_BYTES + int(share * TABLE_BYTES)
            within = within_cap(bundle, io, count, cap)
            same += same_tokens(free, within)
            figures.append(
                f"{io}: p50 {free.p50_us:.0f} -> {within.p50_us:.0f} us, p99 {free.p99_us:.0f} -> "
                f"{within.p99_us:.0f} us, disk {free.disk_bytes / 1e6:.0f} -> {within.disk_bytes / 1e6:.0f} MB of "
                f"{within.page_bytes / 1e6:.0f} MB of pages"
            )
    return Outcome(tried=2 * count, survived=same, figure="; ".join(figures))


def check_is_on_disk(bundle: Bundle) -> None:
    """Raise CannotRun where the table's pages can't be dropped from memory."""
    path = table_file(bundle)
    evict(path)
    if cached_share(path) > 0.5:
        raise CannotRun(f"{path.parent} is in memory itself: set TMPDIR to a folder on a disk")


def alone(bundle: Bundle, io: str, count: int) -> Reading:
    """Return what a process without a cap reads from a cold cache."""
    evict(table_file(bundle))
    return reading_of(subprocess.run(command(bundle, io, count), capture_output=True, text=True, check=False))


def within_cap(bundle: Bundle, io: str, count: int, cap: int) -> Reading:
    """Return what a process with a cap reads, once that is full of other pages of the table."""
    evict(table_file(bundle))
    try:
        with memory_group(f"faults-{os.getpid()}", cap) as group:
            line = group.command(command(bundle, io, count, fill_bytes=cap))
            return reading_of(subprocess.run(line, capture_output=True, text=True, check=False))
    except TargetError as error:
        raise CannotRun(str(error)) from error


def reading_of(done: "subprocess.CompletedProcess[str]") -> Reading:
    """Return what a process printed; one that ended badly ends this one."""
    if done.returncode != 0:
        raise RuntimeError(f"a reader ended with exit code {done.returncode}: {done.stderr[-800:]}")
    return Reading(**json.loads(done.stdout))


def same_tokens(one: Reading, other: Reading) -> int:
    """Return how many tokens are the same before the first that isn't; the first one was given."""
    pairs = list(zip(one.tokens[1:], other.tokens[1:], strict=True))
    return next((place for place, (first, second) in enumerate(pairs) if first != second), len(pairs))


def shared(count: int) -> Outcome:
    """Decode in a lonely process and in eight at once, by each way of reading, and compare tokens and memory."""
    per_process = -(-count // PROCESSES // len(IOS))
    tried = same = 0
    figures, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "bundle", SHARED_BYTES)
        for io in IOS:
            lonely = alone(bundle, io, per_process)
            together = at_once(bundle, io, per_process)
            tried += per_process * PROCESSES
            same += sum(same_tokens(lonely, each) for each in together)
            most = max(each.anonymous_mb for each in together)
            disk = sum(each.disk_bytes for each in together) / 1e6
            figures.append(
                f"{io}: own memory {lonely.anonymous_mb:.0f} -> {most:.0f} MB, disk {lonely.disk_bytes / 1e6:.0f} -> "
                f"{disk:.0f} MB"
            )
            if most > MOST_MORE * lonely.anonymous_mb:
                failures.append(f"{io}: a process has {most} MB of its own, a lonely one {lonely.anonymous_mb} MB")
    survived = 0 if failures else same
    return Outcome(tried=tried, survived=survived, figure="; ".join(figures), failures=tuple(failures))


def at_once(bundle: Bundle, io: str, count: int) -> Sequence[Reading]:
    """Return what processes read that run at the same time, from a cold cache."""
    evict(table_file(bundle))
    with ExitStack() as started:
        line = command(bundle, io, count)
        processes = [
            started.enter_context(subprocess.Popen(line, stdout=subprocess.PIPE, text=True)) for _ in range(PROCESSES)
        ]
        said = [process.communicate()[0] for process in processes]
    if codes := [process.returncode for process in processes if process.returncode]:
        raise RuntimeError(f"readers ended with exit codes {codes}")
    return [Reading(**json.loads(text)) for text in said]


ROWS = (
    Row(
        name="C6",
        fault="memory for pages capped at 10 % of a table of 512 MiB, which other pages have filled (pread, mmap)",
        expected="tokens bit-identical",
        quick=1500,
        full=20_000,
        run=a_tenth,
    ),
    Row(
        name="C6 fiftieth",
        fault="memory for pages capped at 2 % of a table of 512 MiB, which other pages have filled (pread, mmap)",
        expected="tokens bit-identical",
        quick=1500,
        full=20_000,
        run=a_fiftieth,
    ),
    Row(
        name="C8",
        fault="8 processes over one bundle at once (pread, mmap, resident)",
        expected="tokens bit-identical, memory of its own at most 1.1 times a lonely one's",
        quick=12_000,
        full=240_000,
        run=shared,
    ),
)
