"""The states of a text in memory that several sequences map, each page copied by whom it is changed first."""

import contextlib
import ctypes
import io
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import RequestError
from engram_runtime.executor import State, aligned_zeros
from engram_runtime.manifest import StateSpec

_MAP_FIXED = 0x10  # of Linux on every architecture here; the mmap module has no name for it
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p


class SharedStates:
    """What a sequence's states hold, once in memory however many sequences go on from it.

    The states it is made from are put on that memory too, at the addresses they have. From then on whoever changes a
    page has a copy of that page, and nobody sees what others change.
    """

    def __init__(self, specs: Sequence[StateSpec], states: Mapping[str, State], length: int) -> None:
        """Take over ``states``, of `engram_runtime.executor.allocate_states`, which hold ``length`` tokens.

        Raises:
            RequestError: there is no memory for a copy of what they hold.
        """
        self._specs = specs
        self._states = states
        self._length = length
        self._offsets, self._bytes = _layout(states)
        try:
            self._file = self._filled()
        except OSError as error:
            raise RequestError(f"no memory to share the states of {length} tokens: {error.strerror}") from error

    def _filled(self) -> io.FileIO:
        """Return a file in memory with what the states hold, which they are mapped onto."""
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(io.FileIO(os.memfd_create("engram-states"), "r+"))
            file.truncate(self._bytes)
            with mmap.mmap(file.fileno(), self._bytes) as whole:
                shared = {name: _view(whole, state, self._offsets[name]) for name, state in self._states.items()}
                self._copy(self._states, shared, range(self._length))
                del shared  # or the mapping couldn't be closed
            for name, state in self._states.items():
                _map_over(state, file.fileno(), self._offsets[name])
            opened.pop_all()
        return file

    def fork(self) -> dict[str, State]:
        """Return states of one more sequence, to begin with those it was made from.

        They are one mapping without a file descriptor: the system limits the numbers of both.

        Raises:
            RequestError: the system maps no more memory for this process.
        """
        try:
            pages: NDArray[np.uint8] = aligned_zeros([self._bytes], "uint8")
            _map_over(pages, self._file.fileno(), 0)
        except OSError as error:
            raise RequestError(f"no memory for one more sequence: {error.strerror}; ask for fewer") from error
        return {name: _view(pages, state, self._offsets[name]) for name, state in self._states.items()}

    def copy(self, source: Mapping[str, State], target: Mapping[str, State], length: int) -> None:
        """Make a fork hold what another one does, which holds ``length`` tokens."""
        self._copy(source, target, range(self._length, length))

    def _copy(self, source: Mapping[str, State], target: Mapping[str, State], positions: range) -> None:
        rows = slice(positions.start, positions.stop)
        for spec in self._specs:
            held = np.s_[..., rows, :] if spec.rolls_back else ...
            target[spec.name][held] = source[spec.name][held]

    def close(self) -> None:
        """Let go of the memory, once however often it is called; the sequences keep what they have mapped."""
        self._file.close()


def _layout(states: Mapping[str, State]) -> tuple[dict[str, int], int]:
    """Return where each state begins in the file, a page of its own, and the size of it all."""
    offsets, end = {}, 0
    for name, state in states.items():
        offsets[name] = end
        end += -(-state.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    return offsets, max(end, mmap.PAGESIZE)


def _view(pages: mmap.mmap | NDArray[np.uint8], like: State, offset: int) -> State:
    return np.ndarray(like.shape, like.dtype, buffer=pages, offset=offset)


def _map_over(array: NDArray[Any], file: int, offset: int) -> None:
    """Put a part of a file, copy-on-write, where an array is, which begins at a page."""
    address, both = array.ctypes.data, mmap.PROT_READ | mmap.PROT_WRITE
    placed = _libc.mmap(address, array.nbytes, both, mmap.MAP_PRIVATE | _MAP_FIXED, file, offset)
    if placed != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
