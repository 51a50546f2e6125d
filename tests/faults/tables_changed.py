"""C1 and C2: files of tables that are truncated, removed or replaced while rows are read from them."""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tests.faults.row import Outcome, Row
from tests.faults.tables_bundle import IOS, Gather, mapping, open_rows, table_file, true_rows, write_bundle

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TableError
from engram_runtime.tables.options import RESIDENT

TABLE_BYTES = 320_000
LATEST_US = 1500  # of a truncation after the readers were told to go on
BATCH = 64
# Another program, as leases are kept from others alone: it truncates files when it is told to.
TRUNCATOR = """
import os, sys, time
for line in sys.stdin:
    path, size, wait_us = line.rstrip().split("\\t")
    time.sleep(int(wait_us) / 1e6)
    os.truncate(path, int(size))
    print(flush=True)
"""


class Truncator:
    """A process that truncates files."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Self]:
        """Have one as long as it is needed."""
        command = [sys.executable, "-c", TRUNCATOR]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            yield cls(process)
            assert process.stdin is not None
            process.stdin.close()

    def begin(self, path: Path, size: int, wait_us: int) -> None:
        """Have it truncate a file soon."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{path}\t{size}\t{wait_us}\n")
        self._process.stdin.flush()

    @property
    def is_done(self) -> bool:
        """Whether it has truncated what it was told last; asked until it has."""
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        return bool(self._process.stdout.readline())


@dataclass(frozen=True, slots=True)
class Sound:
    """A bundle that is copied for each round, and the rows it has."""

    bundle: Bundle
    rows: NDArray[np.float32]

    def copy(self, folder: Path) -> Bundle:
        """Return a copy."""
        shutil.copytree(self.bundle.path, folder)
        return Bundle(folder, self.bundle.manifest)


def truncated(count: int) -> Outcome:
    """Truncate a table at a random moment and place while its rows are read in a loop, each way of reading in turn."""
    warnings.simplefilter("ignore", RuntimeWarning)  # "no longer mapped but read" is said each time
    rng, failures = random.Random("C1"), []
    with tempfile.TemporaryDirectory() as folder, Truncator.started() as truncator:
        bundle = write_bundle(Path(folder) / "sound", TABLE_BYTES)
        sound = Sound(bundle, true_rows(bundle))
        for number in range(count):
            io, copy = IOS[number % len(IOS)], Path(folder) / str(number)
            wrong = truncated_once(sound, io, copy, truncator, rng)
            shutil.rmtree(copy)
            if wrong:
                failures.append(f"round {number}, {io}: {wrong}")
        figure = mapping(bundle)
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:8]))


def truncated_once(sound: Sound, io: str, copy: Path, truncator: Truncator, rng: random.Random) -> str:
    """Return what was wrong; nothing else than right rows or an error may come, and an error for what is cut off."""
    bundle = sound.copy(copy)
    path = table_file(bundle)
    gather, close = open_rows(bundle, io)
    ids = np.random.default_rng(rng.getrandbits(64))
    size = rng.randrange(path.stat().st_size)
    truncator.begin(path, size, rng.randrange(LATEST_US))
    done = False
    while not done:
        done = truncator.is_done
        outcome = read_once(sound.rows, gather, ids.integers(len(sound.rows), size=BATCH))
        if outcome not in ("error", ""):
            return outcome
    last = read_once(sound.rows, gather, np.array([len(sound.rows) - 1]))
    close()
    expected = "" if io == RESIDENT else "error"
    return "" if last == expected else f"after truncation to {size} bytes the last row gave {last or 'a row'}"


def read_once(rows: NDArray[np.float32], gather: Gather, row_ids: NDArray[np.int64]) -> str:
    """Return nothing for right rows, ``error`` for a TableError, or what was wrong."""
    try:
        found = gather(row_ids)
    except TableError:
        return "error"
    return "" if np.array_equal(found, rows[row_ids]) else f"wrong rows among {row_ids.tolist()}"


def removed(path: Path, folder: Path) -> None:
    """Remove the file."""
    path.unlink()


def renamed_over(path: Path, folder: Path) -> None:
    """Put a file of other rows in its place."""
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def folder_replaced(path: Path, folder: Path) -> None:
    """Put another bundle in place of the folder, as a new export does."""
    folder.rename(folder.with_name("aside"))
    write_bundle(folder, TABLE_BYTES, seed=1)


def folder_removed(path: Path, folder: Path) -> None:
    """Remove the whole bundle."""
    shutil.rmtree(folder)


CHANGES: tuple[Callable[[Path, Path], None], ...] = (removed, renamed_over, folder_replaced, folder_removed)


def replaced(count: int) -> Outcome:
    """Remove or replace a bundle under an open table, some of whose rows were read: all rows must stay as they were."""
    rng, failures = np.random.default_rng(2), []
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "sound", TABLE_BYTES)
        sound = Sound(bundle, true_rows(bundle))
        for number in range(count):
            io, change = IOS[number % len(IOS)], CHANGES[number % len(CHANGES)]
            work = Path(folder) / "work"
            copy = sound.copy(work / "bundle")
            gather, close = open_rows(copy, io)
            gather(rng.integers(len(sound.rows), size=BATCH))
            change(table_file(copy), copy.path)
            if wrong := read_once(sound.rows, gather, rng.permutation(len(sound.rows))):
                failures.append(f"round {number}, {io}, {change.__name__}: {wrong[:200]}")
            close()
            shutil.rmtree(work)
        figure = mapping(bundle)
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:8]))


ROWS = (
    Row(
        name="C1",
        fault="a table's file is truncated at a random moment while rows are read (pread, mmap, resident)",
        expected="right rows or TableError, no signal",
        quick=1000,
        full=20_000,
        run=truncated,
    ),
    Row(
        name="C2",
        fault="a bundle is removed, renamed over or replaced under an open table",
        expected="all rows stay bit-identical",
        quick=200,
        full=5000,
        run=replaced,
    ),
)
