"""Damaged inputs given to a parser, one after another, in children that may die; what came of them."""

import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.faults.row import Outcome

from engram_runtime.errors import EngramError

MOST_CPU_S = 1.0  # that an input may take, of the processor: this machine may be busy
MOST_GROWTH_BYTES = 64 << 20
HANG_S = 60  # of the clock
CHILD_BYTES = 1 << 30  # of memory a child may map beside what it has at its start
MEMORY = "/dev/shm"  # writes of small files take a hundredth of the time there
BATCH = 2500  # inputs of a child
SHOWN = 20
MOST_TEXT = 20_000  # characters of an error, which people are to read
PROGRESS = struct.Struct("<qqqq")  # next input, taken inputs, the most microseconds, the most bytes of growth

Bytes = Callable[[random.Random], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parser:
    """What reads a kind of file.

    Attributes:
        name: begins what tells the failures apart, and seeds the inputs.
        damaged: makes the content of a file, mostly a damaged one.
        use: reads a file as the product does, and does with what was taken what the product would do next.
        refusals: the errors that refuse a file.
        sound: the content of a file that is taken.
        file: what the file is called.
    """

    name: str
    damaged: Bytes
    use: Callable[[Path], object]
    refusals: tuple[type[EngramError], ...]
    sound: bytes
    file: str = "file"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What came of a parser's files: how many were taken, the most seconds and bytes one took, what went wrong."""

    taken: int
    seconds: float
    grown: int
    wrong: Sequence[str]


def survey(*shares: tuple[Parser, int]) -> Outcome:
    """Give each parser so many damaged files.

    One survives where it is taken or refused by the right error, in `MOST_CPU_S` and with `MOST_GROWTH_BYTES` more
    memory at most; the sound file must be taken.
    """
    found = [_survey(parser, count) for parser, count in shares]
    tried, wrong = sum(count for _, count in shares), [each for one in found for each in one.wrong]
    seconds, grown = max(each.seconds for each in found), max(each.grown for each in found)
    figure = f"{sum(each.taken for each in found)} taken, at most {seconds:.2f} s and {grown / 2**20:.0f} MiB"
    return Outcome(tried=tried, survived=tried - len(wrong), figure=figure, failures=tuple(wrong[:SHOWN]))


def evenly(count: int, parsers: Sequence[Parser]) -> list[tuple[Parser, int]]:
    """Return the parsers with as many files each as make ``count`` in all, or a few more."""
    return [(parser, -(-count // len(parsers))) for parser in parsers]


def _survey(parser: Parser, count: int) -> _Found:
    shared = mmap.mmap(-1, PROGRESS.size)
    with scratch() as folder, tempfile.TemporaryFile("w+") as failures:
        path = folder / parser.file
        path.write_bytes(parser.sound)
        parser.use(path)
        while (first := PROGRESS.unpack(shared)[0]) < count:
            status = _in_child(lambda: _feed(parser, path, min(count, first + BATCH), shared, failures))
            reached, *figures = PROGRESS.unpack(shared)
            if os.WIFEXITED(status) and status:
                raise RuntimeError(f"input {reached} of {parser.name} can't be made: see above")
            if status != 0:
                failures.seek(0, os.SEEK_END)
                failures.write(f"{parser.name} {reached}: the process ended by {_end(status)}\n")
                failures.flush()  # or the next child would have it as well
                shared[:] = PROGRESS.pack(reached + 1, *figures)
        failures.seek(0)
        lines = failures.read().splitlines()
    _, taken, micros, grown = PROGRESS.unpack(shared)
    return _Found(taken=taken, seconds=micros / 1e6, grown=grown, wrong=lines)


def input_of(parser: Parser, index: int) -> bytes:
    """Return an input by its number, which failures name."""
    return parser.damaged(random.Random(f"{parser.name} {index}"))


def _in_child(work: Callable[[], None]) -> int:
    """Run in a forked process with bounded memory; returns its wait status."""
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            bound_memory()
            os.environ["RUST_BACKTRACE"] = "0"  # reads symbols of tens of megabytes
            errors = os.fdopen(os.dup(2), "w")
            for number in (1, 2):  # where native code says what its exceptions say as well
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            work()
            code = 0
        finally:
            if code:
                traceback.print_exc(file=errors)  # of the suite itself: parsers' own are caught
                errors.flush()
            os._exit(code)
    return os.waitpid(child, 0)[1]


def bound_memory() -> None:
    """Let this process map no more than `CHILD_BYTES` beside what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + CHILD_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end(status: int) -> str:
    number = signal.Signals(os.WTERMSIG(status))
    return f"{number.name}, no answer in {HANG_S} s" if number == signal.SIGALRM else number.name


def _feed(parser: Parser, path: Path, stop: int, shared: mmap.mmap, failures: IO[str]) -> None:
    parser.use(_sound_again(parser, path))  # what a child makes once for all inputs is not theirs
    usual = peak_bytes()
    for index in range(PROGRESS.unpack(shared)[0], stop):
        _, taken, micros, growth = PROGRESS.unpack(shared)
        shared[:] = PROGRESS.pack(index, taken, micros, growth)
        path.write_bytes(input_of(parser, index))
        was_taken, seconds, grown, wrong = _try(parser, path, usual)
        growth, micros = max(growth, grown), max(micros, round(seconds * 1e6))
        shared[:] = PROGRESS.pack(index + 1, taken + was_taken, micros, growth)
        if wrong:
            failures.seek(0, os.SEEK_END)
            failures.write(f"{parser.name} {index}: {wrong}".replace("\n", " ")[:400] + "\n")
            failures.flush()
        if grown > MOST_GROWTH_BYTES // 2:
            return  # the next inputs are held against a fresh process


def _sound_again(parser: Parser, path: Path) -> Path:
    path.write_bytes(parser.sound)
    return path


def _try(parser: Parser, path: Path, usual: int) -> tuple[bool, float, int, str]:
    """Return whether a file was taken, its seconds and bytes, and what is wrong with that, nothing if nothing is."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    signal.alarm(HANG_S)
    begun = time.process_time()
    with _Caught() as caught:
        parser.use(path)
    seconds = time.process_time() - begun
    signal.alarm(0)
    grown = max(0, peak_bytes() - usual)
    wrong = _wrong(parser, caught.error)
    if not wrong and seconds > MOST_CPU_S:
        wrong = f"it took {seconds:.1f} s"
    if not wrong and grown > MOST_GROWTH_BYTES:
        wrong = f"memory grew by {grown / 2**20:.0f} MiB"
    return caught.error is None, seconds, grown, wrong


class _Caught:
    """Keeps whatever the block raises, be it a panic of native code, which is no Exception."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> "_Caught":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error
        return True


def _wrong(parser: Parser, error: BaseException | None) -> str:
    if error is None:
        return ""
    text = str(error)
    if not isinstance(error, parser.refusals):
        return f"{type(error).__module__}.{type(error).__name__}: {text[:300]}"
    return f"an error of {len(text)} characters: {text[:100]}" if len(text) > MOST_TEXT else ""


def peak_bytes() -> int:
    """Return the most memory this process held since it was last asked to forget that."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder, in memory where there is such a place, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="engram-faults-", dir=MEMORY if Path(MEMORY).is_dir() else None) as name:
        yield Path(name)
