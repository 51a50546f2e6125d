"""Forked processes: they have the memory of their parent's threads, and none of the threads."""

import os

from engram_runtime.errors import ForkError


def check_process(process: int) -> None:
    """Refuse to go on in a forked process with what its parent loaded.

    Locks that a thread of the parent held when it forked are never let go of in the child: waiting for one is for ever.

    Args:
        process: the one that loaded it.

    Raises:
        ForkError: this is another one.
    """
    if (own := os.getpid()) != process:
        raise ForkError(
            f"process {own} was forked from {process} after that had loaded the model; start processes by spawn, as "
            f"multiprocessing.get_context('spawn') does, and load it in each"
        )
