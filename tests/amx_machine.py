"""Run AMX machine code here, whatever the processor.

Where the processor has AMX and the kernel permits its use, code runs as it is. Elsewhere `amx_emulator.c` is loaded:
it catches SIGILL and carries out the AMX instructions one by one, so that what LLVM made for AMX is tested unchanged.
All other instructions run on the processor; the kernels' need AVX512-VNNI.
"""

import ctypes
import tempfile
from enum import IntEnum
from functools import cache
from pathlib import Path
from subprocess import run

import numpy as np
from numpy.typing import NDArray

from engram_compilers.linking import linker
from engram_runtime.cpu import usable_cpu_flags

NATIVE = {"amx_tile", "amx_int8"} <= usable_cpu_flags()  # asking also gets this process the permission
CAN_RUN = "avx512_vnni" in usable_cpu_flags()

_SOURCES = [str(Path(__file__).with_name(name)) for name in ("amx_emulator.c", "amx_instructions.c")]
_FLAGS = ["-O2", "-shared", "-fPIC", "-mamx-tile", "-mamx-int8"]


class Kind(IntEnum):
    """Kinds of instructions, as `amx_emulator.c` numbers them."""

    LDTILECFG = 0
    STTILECFG = 1
    TILERELEASE = 2
    TILEZERO = 3
    TILELOADD = 4
    TILESTORED = 5
    TDPB = 6


@cache
def amx() -> ctypes.CDLL:
    """Return the functions of `amx_instructions.c` and `amx_emulator.c`; from now on AMX code runs in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "amx.so")
        run([*linker("x86_64-linux-gnu"), *_FLAGS, "-o", path, *_SOURCES], check=True)
        library = ctypes.CDLL(path)
    pointer, stride = ctypes.c_void_p, ctypes.c_int64
    for product in (library.amx_tdpbssd, library.amx_tdpbsud, library.amx_tdpbusd, library.amx_tdpbuud):
        product.argtypes = [pointer] * 4 + [stride] * 3
    library.amx_copy.argtypes = [pointer, pointer, stride]
    library.amx_zeros.argtypes = [pointer, stride]
    library.amx_watch.argtypes = [pointer, ctypes.c_uint64]
    library.amx_count.restype = ctypes.c_uint64
    if not NATIVE and library.amx_install() != 0:
        raise OSError("the handler of SIGILL could not be installed")
    return library


class Watch:
    """Counts what the emulator does from now on."""

    def __init__(self, most_loads: int) -> None:
        self._addresses = np.zeros(most_loads, np.uint64)
        amx().amx_watch(address_of(self._addresses), most_loads)

    def count(self, kind: Kind) -> int:
        """Return how many instructions of a kind there were."""
        return int(amx().amx_count(int(kind)))

    def loads_from(self, array: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the offsets in bytes, in order, of the tiles that were loaded from an array."""
        if self.count(Kind.TILELOADD) > len(self._addresses):
            raise ValueError(
                f"{self.count(Kind.TILELOADD)} tiles were loaded, there is room for {len(self._addresses)}"
            )
        offsets = self._addresses.astype(np.int64) - array.ctypes.data
        return offsets[(offsets >= 0) & (offsets < array.nbytes)]

    def close(self) -> None:
        """Forget the array of addresses."""
        amx().amx_watch(None, 0)


def address_of(array: NDArray[np.generic]) -> ctypes.c_void_p:
    """Return a pointer to an array's first byte."""
    return ctypes.c_void_p(array.ctypes.data)


def configuration(shapes: dict[int, tuple[int, int]], palette: int = 1) -> NDArray[np.uint8]:
    """Return the 64 bytes ldtilecfg takes: rows and bytes of a row by tile."""
    config = np.zeros(64, np.uint8)
    config[0] = palette
    for tile, (rows, row_bytes) in shapes.items():
        config[16 + 2 * tile], config[48 + tile] = row_bytes, rows
    return config


def stored_configuration() -> NDArray[np.uint8]:
    """Return the configuration of this thread's tiles, zeros if they have none."""
    found = np.full(64, 99, np.uint8)
    amx().amx_configuration(address_of(found))
    return found
