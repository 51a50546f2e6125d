"""Whose a compiled library's threads are: a step's while one is at work, else of whoever has many rows to decode."""

import contextlib
from collections.abc import Callable, Iterator


class LibraryPool:
    """An executor's use of the thread pool in a library. One launch of a kernel has it at a time, others run alone."""

    def __init__(self, use_threads: Callable[[int], None], threads: int) -> None:
        self._use_threads = use_threads
        self._threads = threads
        self._steps: set[object] = set()  # at work; several where threads share an executor

    @contextlib.contextmanager
    def for_step(self) -> Iterator[None]:
        """Have a step's kernels run on as many threads as the executor's, and no rows take them meanwhile."""
        step = object()
        self._claim()
        self._steps.add(step)
        try:
            yield
        finally:
            self._steps.discard(step)

    def for_rows(self) -> bool:
        """Let rows be decoded by all threads; False while a step is at work: its next kernel would be left with one."""
        if self._steps:
            return False
        self._claim()
        return True

    def _claim(self) -> None:
        self._use_threads(self._threads)  # others may have loaded the same library for another number
