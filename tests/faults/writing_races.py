"""B5: several processes that write to one place."""

import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.row import Outcome, Row
from tests.faults.warm import contents, ended, fork, warm_compile, warm_export, whole, write_folder

AT_ONCE = 8
WON, LOST, OTHER = 0, 10, 20  # exit codes


def races_of_exports(count: int) -> Outcome:
    """Have processes export to one new place, all at once, again and again."""
    root = Path(tempfile.mkdtemp())
    warm = warm_export(root)
    out = root / "place" / "out"
    out.parent.mkdir()

    def wrong() -> str:
        return whole(out, warm.new)

    def prepare(number: int) -> None:
        if out.exists():
            out.rename(root / f"done-{number}")

    def work() -> None:
        warm.run(out, replace=False)

    return _races(root, count, prepare, work, wrong, out, "exported to", most_winners=1)


def races_of_compilations(count: int) -> Outcome:
    """Have processes compile one bundle."""
    root = Path(tempfile.mkdtemp())
    warm = warm_compile(root)
    bundle = root / "place" / "bundle"
    write_folder(bundle, contents(warm.bundle))
    library = bundle / "lib" / warm.target

    def wrong() -> str:
        return "" if contents(library) == warm.new else f"the library holds {sorted(contents(library))}"

    def prepare(number: int) -> None:
        if library.exists():
            library.rename(root / f"done-{number}")

    def work() -> None:
        warm.run(bundle)

    return _races(root, count, prepare, work, wrong, library, "compiled to", most_winners=AT_ONCE)


def _races(
    root: Path,
    count: int,
    prepare: Callable[[int], None],
    work: Callable[[], object],
    wrong: Callable[[], str],
    out: Path,
    doing: str,
    *,
    most_winners: int,
) -> Outcome:
    """Start `AT_ONCE` processes at one moment, ``count`` of them in all.

    One at least must win, and no more than may do the same one after the other; who loses must be told which process
    is at it, if it still is, or that the place is taken.
    """
    failures: list[str] = []
    won = 0
    rounds = -(-count // AT_ONCE)
    busy = rf"is being {doing} by (process \d+|another process); wait for it or"
    refused = re.compile(rf"{re.escape(str(out))} ({busy}|is a bundle already;).*")
    for number in range(rounds):
        prepare(number)
        said = [root / f"said-{each}" for each in range(AT_ONCE)]
        racers = _start(work, refused, said)
        codes = [ended(racer) for racer in racers]
        won += codes.count(WON)
        found = wrong() if 0 < codes.count(WON) <= most_winners else f"{codes.count(WON)} win: {codes}"
        if beside := sorted(path.name for path in out.parent.iterdir() if path != out):
            found = found or f"left beside it: {beside}"
        for code, text in zip(codes, said, strict=True):
            if code not in (WON, LOST):
                found = found or f"exit code {code}: {text.read_text()[-300:]}"
        if found:
            failures.append(f"round {number}: {found}")
    tried = rounds * AT_ONCE
    figure = f"{rounds} rounds of {AT_ONCE} processes, {won} won"
    return Outcome(tried=tried, survived=tried - AT_ONCE * len(failures), figure=figure, failures=tuple(failures[:5]))


def _start(work: Callable[[], object], refused: re.Pattern[str], said: list[Path]) -> list[int]:
    start = time.monotonic() + 0.1
    return [fork(partial(_race, work, start, refused, text)) for text in said]


def _race(work: Callable[[], object], start: float, refused: re.Pattern[str], said: Path) -> None:
    from engram_runtime.errors import RequestError

    time.sleep(max(0.0, start - time.monotonic()))
    try:
        work()
    except RequestError as error:
        said.write_text(str(error))
        os._exit(LOST if refused.fullmatch(str(error)) else OTHER)


EXPECTED = "{}, the place holds one whole result; the others are told which process is at it"
ROWS = (
    Row(
        name="B5",
        fault="8 processes export to one place at once",
        expected=EXPECTED.format("one wins"),
        quick=80,
        full=800,
        run=races_of_exports,
    ),
    Row(
        name="B5 compile",
        fault="8 processes compile one bundle at once",
        expected=EXPECTED.format("one wins, others at most after it"),
        quick=8,
        full=800,
        run=races_of_compilations,
    ),
)
