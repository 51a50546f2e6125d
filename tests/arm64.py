"""Run kernels compiled for 64-bit Arm on any machine: their machine code, in the Unicorn emulator.

The object file is linked with stubs for what TVM's runtime gives a serial kernel, loaded at its addresses, and the
kernel called as TVM would call it. Unicorn 2.1 knows SDOT but not USDOT; that one instruction is carried out here.
"""

import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import unicorn
from numpy.typing import NDArray
from unicorn import arm64_const

Array = NDArray[Any]

STUBS = """
static char heap[1 << 20] __attribute__((aligned(64)));
static unsigned long used;
void *TVMBackendAllocWorkspace(int device, int id, unsigned long bytes, int code, int bits) {
    unsigned long start = used;
    if (bytes > sizeof heap - used) return 0;
    used += (bytes + 63) & -64ul;
    return heap + start;
}
int TVMBackendFreeWorkspace(int device, int id, void *place) {
    used = (char *)place - heap;
    return 0;
}
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int count) { __builtin_trap(); }
"""
RUNTIME_FUNCTIONS = {"__TVMBackendAllocWorkspace", "__TVMBackendFreeWorkspace"}
LOADABLE, SYMBOL_TABLE = 1, 2  # kinds of ELF segments and sections
PAGE = 1 << 16
ARGUMENTS, STACK, RETURN = 0x4000_0000, 0x6000_0000, 0x7000_0000
ARENA = 1 << 24
DL_TENSOR_POINTER = 7  # type index of an argument of TVM's calling convention
DTYPES = {"i": 0, "u": 1, "f": 2}
USDOT, USDOT_MASK = 0x4E809C00, 0xFFE0FC00
FLOATING_POINT_ON = 3 << 20
VECTORS = [getattr(arm64_const, f"UC_ARM64_REG_Q{index}") for index in range(32)]


@dataclass(frozen=True)
class Image:
    """A linked file in memory."""

    content: bytes

    def segments(self) -> Iterator[tuple[int, bytes, int]]:
        """Yield (address, bytes, size in memory) of what is to be loaded."""
        (offset,), (size, count) = struct.unpack_from("<Q", self.content, 32), self._sizes(54)
        for place in range(offset, offset + size * count, size):
            kind, _, start, address, _, file_bytes, memory_bytes = struct.unpack_from("<IIQQQQQ", self.content, place)
            if kind == LOADABLE:
                yield address, self.content[start : start + file_bytes], memory_bytes

    def symbols(self) -> dict[str, int]:
        """Return the address of every symbol."""
        (offset,), (size, count) = struct.unpack_from("<Q", self.content, 40), self._sizes(58)
        sections = [struct.unpack_from("<IIQQQQIIQQ", self.content, offset + index * size) for index in range(count)]
        table = next(section for section in sections if section[1] == SYMBOL_TABLE)
        names = sections[table[6]][4]
        found = {}
        for place in range(table[4], table[4] + table[5], 24):
            name, _, _, _, address, _ = struct.unpack_from("<IBBHQQ", self.content, place)
            end = self.content.index(0, names + name)
            found[self.content[names + name : end].decode()] = address
        return found

    def _sizes(self, place: int) -> tuple[int, int]:
        size, count = struct.unpack_from("<HH", self.content, place)
        return size, count


class Arm64Kernels:
    """Serial kernels compiled for an Arm processor."""

    def __init__(self, kernels: dict[str, Any], mcpu: str, folder: Path) -> None:
        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in kernels.items()})
        target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": mcpu})
        compiled = tvm.compile(module, target).mod
        self.assembly: str = compiled.inspect_source("asm")
        compiled.write_to_file(str(folder / "kernels.o"), "o")
        (folder / "stubs.c").write_text(STUBS)
        command = [
            sys.executable,
            "-m",
            "ziglang",
            "cc",
            "-target",
            "aarch64-linux-musl",
            "-nostdlib",
            "-static",
            "-O1",
        ]
        command += [
            "-Wl,--entry=TVMBackendFreeWorkspace",
            "-Wl,--no-gc-sections",
            "-o",
            "kernels",
            "kernels.o",
            "stubs.c",
        ]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        self.image = Image((folder / "kernels").read_bytes())
        self.symbols = self.image.symbols()

    def __call__(self, name: str, *arrays: Array) -> list[Array]:
        """Call a kernel with copies of ``arrays`` and return them as it left them."""
        machine = self._machine()
        arguments, places = _arguments(arrays)
        machine.mem_write(ARGUMENTS, arguments)
        machine.reg_write(arm64_const.UC_ARM64_REG_X1, ARGUMENTS)
        machine.reg_write(arm64_const.UC_ARM64_REG_X2, len(arrays))
        machine.reg_write(arm64_const.UC_ARM64_REG_X3, ARGUMENTS + ARENA - 64)
        _run(machine, self.symbols[f"__tvm_ffi_{name}"])
        if status := machine.reg_read(arm64_const.UC_ARM64_REG_W0):
            raise RuntimeError(f"kernel {name} returned {status}")
        results = (bytes(machine.mem_read(place, array.nbytes)) for place, array in zip(places, arrays, strict=True))
        return [np.frombuffer(r, a.dtype).reshape(a.shape) for r, a in zip(results, arrays, strict=True)]

    def _machine(self) -> Any:
        machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        machine.ctl_set_cpu_model(arm64_const.UC_CPU_ARM64_MAX)
        pages = {
            page
            for address, _, size in self.image.segments()
            for page in range(address // PAGE, (address + size) // PAGE + 1)
        }
        for page in pages:
            machine.mem_map(page * PAGE, PAGE)
        for address, content, _ in self.image.segments():
            machine.mem_write(address, content)
        for name in RUNTIME_FUNCTIONS & self.symbols.keys():  # TVM's loader fills these in
            machine.mem_write(self.symbols[name], struct.pack("<Q", self.symbols[name.removeprefix("__")]))
        for start in (ARGUMENTS, STACK, RETURN):
            machine.mem_map(start, ARENA)
        machine.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, FLOATING_POINT_ON)
        machine.reg_write(arm64_const.UC_ARM64_REG_SP, STACK + ARENA)
        machine.reg_write(arm64_const.UC_ARM64_REG_LR, RETURN)
        return machine


def _run(machine: Any, address: int) -> None:
    """Run to the return, carrying out the instructions the emulator does not know."""
    while address != RETURN:
        try:
            machine.emu_start(address, RETURN)
            return
        except unicorn.UcError as error:
            address = machine.reg_read(arm64_const.UC_ARM64_REG_PC)
            (word,) = struct.unpack("<I", machine.mem_read(address, 4))
            if word & USDOT_MASK != USDOT:
                raise RuntimeError(f"instruction {word:08x} at {address:x} is unknown to the emulator") from error
            _usdot(machine, word)
            address += 4


def _usdot(machine: Any, word: int) -> None:
    """usdot Vd.4s, Vn.16b, Vm.16b: Vd[i] += sum_b unsigned Vn[4i + b] * signed Vm[4i + b]."""
    total, n, m = VECTORS[word & 31], VECTORS[word >> 5 & 31], VECTORS[word >> 16 & 31]

    def read(register: int, dtype: str) -> Array:
        return np.frombuffer(machine.reg_read(register).to_bytes(16, "little"), dtype)

    products = read(n, "u1").astype(np.int32) * read(m, "i1")
    result = read(total, "<i4") + products.reshape(4, 4).sum(axis=1, dtype=np.int32)
    machine.reg_write(total, int.from_bytes(result.tobytes(), "little"))


def _arguments(arrays: tuple[Array, ...]) -> tuple[bytes, list[int]]:
    """Lay out arguments as TVM's calling convention wants them, and say where each array's data lies."""
    place = _rounded(16 * len(arrays))
    arguments, bodies, places = b"", b"", []
    for array in arrays:
        shape = struct.pack(f"<{array.ndim}q", *array.shape)
        tensor, shape_at, data_at = place, place + 64, place + 128
        dtype = struct.pack("<BBH", DTYPES[array.dtype.kind], 8 * array.dtype.itemsize, 1)
        header = struct.pack("<Qiii", ARGUMENTS + data_at, 1, 0, array.ndim) + dtype
        header += struct.pack("<QQQ", ARGUMENTS + shape_at, 0, 0)
        data = np.ascontiguousarray(array).tobytes()
        body = header.ljust(64, b"\0") + shape.ljust(64, b"\0") + data.ljust(_rounded(len(data)), b"\0")
        arguments += struct.pack("<iiQ", DL_TENSOR_POINTER, 0, ARGUMENTS + tensor)
        places.append(ARGUMENTS + data_at)
        place, bodies = place + len(body), bodies + body
    return arguments.ljust(_rounded(len(arguments)), b"\0") + bodies, places


def _rounded(size: int) -> int:
    return -(-size // 64) * 64
