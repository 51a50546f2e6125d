"""Run kernels compiled for other processors: their machine code, in QEMU's user-mode emulator.

The object file is linked with `kernel_driver.c`, which calls a kernel as TVM would, and with the scratch memory of
real libraries; QEMU is told to be a processor with no more than the target's profile asks for, where it knows one.
"""

import shutil
import struct
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm_ffi import libinfo

from engram_compilers import linking
from engram_targets import load_cpu_profile

Array = NDArray[Any]

DTYPES = {"i": 0, "u": 1, "f": 2}  # DLPack's codes
PROCESSORS = {
    "aarch64-dotprod": "cortex-a76",
    "aarch64-i8mm": "max,sve=off",
    "aarch64-i8mm-sve": "max",
    "riscv64-rvv": "rv64,v=true,vext_spec=v1.0",
}


def emulator(machine: str) -> str:
    """Return the command that runs programs of another machine, or skip the test where there is none."""
    names = (f"qemu-{machine}-static", f"qemu-{machine}")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no {names[0]} to run {machine} code: apt install qemu-user-static")
    return found


class EmulatedKernels:
    """Kernels compiled for a target that isn't this machine, run by one thread."""

    def __init__(self, kernels: dict[str, Any], target: str) -> None:
        profile = load_cpu_profile(target)
        qemu = emulator(profile.machine)
        self._folder = folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder)
        self._command = [qemu, "-cpu", PROCESSORS[target], str(folder / "driver")]
        module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in kernels.items()})
        compiled = tvm.compile(module, tvm.target.Target(profile.llvm.target)).mod
        self.assembly: str = compiled.inspect_source("asm")
        compiled.write_to_file(str(folder / "kernels.o"), "o")
        self._link(f"{profile.machine}-linux-musl", list(kernels))

    def _link(self, zig_target: str, names: list[str]) -> None:
        places = [Path(__file__).with_name("kernel_driver.c"), Path(linking.__file__).with_name("scratch_memory.c")]
        command = [sys.executable, "-m", "ziglang", "cc", "-target", zig_target, "-static", "-O1", "-std=gnu11"]
        command += [f"-DKERNELS={' '.join(f'KERNEL({name})' for name in names)}", f"-I{libinfo.find_include_path()}"]
        command += ["-o", str(self._folder / "driver"), str(self._folder / "kernels.o"), *map(str, places)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def __call__(self, name: str, *arrays: Array) -> list[Array]:
        """Call a kernel with copies of ``arrays`` and return them as it left them."""
        given, left = self._folder / "given", self._folder / "left"
        given.write_bytes(b"".join(map(_content, arrays)))
        done = subprocess.run(
            [*self._command, name, str(given), str(left)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"kernel {name} ended with {done.returncode}: {done.stderr.strip()}")
        ends = np.cumsum([array.nbytes for array in arrays]).tolist()
        parts = np.split(np.frombuffer(left.read_bytes(), np.uint8), ends[:-1])
        return [part.view(a.dtype).reshape(a.shape) for part, a in zip(parts, arrays, strict=True)]


def _content(array: Array) -> bytes:
    header = struct.pack("<iiiq", array.ndim, DTYPES[array.dtype.kind], 8 * array.dtype.itemsize, array.nbytes)
    return header + struct.pack(f"<{array.ndim}q", *array.shape) + np.ascontiguousarray(array).tobytes()
