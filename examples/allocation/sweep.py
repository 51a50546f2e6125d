"""All runs of a sweep, several processes at a time."""

import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from examples.allocation.text import read_corpus
from examples.allocation.training import Outcome, Run, finish_run

POLL_S = 0.5

_steps_done: "Synchronized[int]"


def sweep(runs: Sequence[Run], folder: Path, processes: int, on_steps: Callable[[int], None]) -> list[Outcome]:
    """Return the outcome of each run, those found in ``folder`` not trained again.

    Args:
        processes: how many models are trained at a time, each by one thread.
        on_steps: told how many steps have been done since it was last told, over all runs.
    """
    context: Any = multiprocessing.get_context("spawn")  # torch's threads don't outlive a fork
    steps_done = context.Value("q", 0)
    told = 0
    with context.Pool(processes, _begin, (steps_done,)) as pool:
        pending = pool.map_async(partial(_finish, folder=folder), runs, chunksize=1)
        while not pending.ready():
            pending.wait(POLL_S)
            on_steps(steps_done.value - told)
            told = steps_done.value
        outcomes: list[Outcome] = pending.get()
    return outcomes


def _begin(steps_done: "Synchronized[int]") -> None:
    global _steps_done
    _steps_done = steps_done
    torch.set_num_threads(1)


def _finish(run: Run, folder: Path) -> Outcome:
    return finish_run(run, read_corpus(folder, run.sizes.vocab_size), folder, _count)


def _count(steps: int) -> None:
    with _steps_done.get_lock():
        _steps_done.value += steps
