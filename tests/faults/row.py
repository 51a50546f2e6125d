"""A row of the table of faults: what is done to the program, how often, and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a row.

    Attributes:
        tried: faults that were made.
        survived: those after which everything was as it must be.
        figure: what else was measured, with units; empty for nothing.
        failures: what the first faults were that weren't survived, enough to repeat them.
    """

    tried: int
    survived: int
    figure: str = ""
    failures: tuple[str, ...] = ()


class CannotRun(Exception):
    """This machine lacks what a row needs; the text says what, and how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A kind of fault.

    Attributes:
        name: letter and number, as ``A1``; rows of one number are told apart by a word after it, ``A3 onnx``.
        fault: what is done.
        expected: what must come of it.
        quick, full: how many faults the two tiers make; a tier with 0 leaves the row out.
        run: makes so many faults; raises `CannotRun`. It runs in a process of its own, which mustn't end by a signal.
    """

    name: str
    fault: str
    expected: str
    quick: int
    full: int
    run: Callable[[int], Outcome]
