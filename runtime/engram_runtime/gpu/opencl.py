"""OpenCL devices, by pyopencl."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import BundleError, TargetError
from engram_runtime.gpu.plan import ALIGNMENT_BYTES, Sizes

try:
    import pyopencl as cl
except ModuleNotFoundError as error:
    raise TargetError("libraries for OpenCL need pyopencl: pip install 'engram-edge[opencl]'") from error

# Products and sums stay apart where kernels don't join them, so that a row's bits don't depend on its pass.
EXACT = "#pragma OPENCL FP_CONTRACT OFF\n"
ROUNDING = "-cl-fp32-correctly-rounded-divide-sqrt"
_BITS = 8


@dataclass(frozen=True, slots=True)
class OpenClKernel:
    """A launch with its arguments set."""

    kernel: cl.Kernel
    threads: Sizes  # of all blocks
    block: Sizes


class OpenClDevice:
    """See `engram_runtime.gpu.device.Device`."""

    def __init__(self, device: "cl.Device", source: str) -> None:
        """Build the kernels; raises TargetError where the driver refuses them."""
        self.name = f"{device.name.strip()}, {device.platform.name.strip()}"
        with _failing(self.name):
            self._context = cl.Context([device])
            self._queue = cl.CommandQueue(self._context)
            self._program = _build(cl.Program(self._context, EXACT + source), device)
            self._functions = set(self._program.kernel_names.split(";"))

    def allocate(self, size: int) -> "cl.Buffer":
        with _failing(self.name):
            return cl.Buffer(self._context, cl.mem_flags.READ_WRITE, size)

    def part(self, buffer: "cl.Buffer", offset: int, size: int) -> "cl.Buffer":
        with _failing(self.name):
            return buffer.get_sub_region(offset, size)

    def host_array(self, shape: Sequence[int], dtype: str) -> NDArray[Any]:
        size = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
        flags, access = cl.mem_flags, cl.map_flags.READ | cl.map_flags.WRITE
        with _failing(self.name):
            pinned = cl.Buffer(self._context, flags.READ_WRITE | flags.ALLOC_HOST_PTR, size)
            array, _ = cl.enqueue_map_buffer(self._queue, pinned, access, 0, tuple(shape), np.dtype(dtype))
        mapped: NDArray[Any] = array
        return mapped

    def kernel(self, function: str, blocks: Sizes, threads: Sizes, arguments: Sequence["cl.Buffer"]) -> OpenClKernel:
        if function not in self._functions:
            raise BundleError(f"the library's source has no kernel {function}; compile the bundle again")
        with _failing(self.name):
            kernel = cl.Kernel(self._program, function)
            kernel.set_args(*arguments)
        x, y, z = (count * size for count, size in zip(blocks, threads, strict=True))
        return OpenClKernel(kernel, (x, y, z), threads)

    def upload(self, array: NDArray[Any], buffer: "cl.Buffer") -> None:
        with _failing(self.name):
            cl.enqueue_copy(self._queue, buffer, array, is_blocking=False)

    def download(self, buffer: "cl.Buffer", array: NDArray[Any]) -> None:
        with _failing(self.name):
            cl.enqueue_copy(self._queue, array, buffer, is_blocking=False)

    def copy(self, source: "cl.Buffer", target: "cl.Buffer") -> None:
        with _failing(self.name):
            cl.enqueue_copy(self._queue, target, source)

    def launch(self, kernel: OpenClKernel) -> None:
        with _failing(self.name):
            cl.enqueue_nd_range_kernel(self._queue, kernel.kernel, kernel.threads, kernel.block)

    def start(self) -> None:
        self._queue.flush()

    def finish(self) -> None:
        with _failing(self.name):
            self._queue.finish()


def open_device(source: str, most_threads: int) -> OpenClDevice:
    """Open the first GPU there is, or another OpenCL device, and build kernels for it.

    Args:
        most_threads: of a block.

    Raises:
        TargetError: there is no driver or device, it can't run blocks of so many threads, or it refuses the kernels.
    """
    device = _first_device()
    if device.max_work_group_size < most_threads:
        raise TargetError(
            f"OpenCL device {device.name} runs blocks of {device.max_work_group_size} threads, "
            f"the library's have {most_threads}; run it on another device"
        )
    if device.mem_base_addr_align > ALIGNMENT_BYTES * _BITS:
        raise TargetError(
            f"OpenCL device {device.name} aligns buffers to {device.mem_base_addr_align // _BITS} bytes, "
            f"the library's are to {ALIGNMENT_BYTES}; run it on another device"
        )
    return OpenClDevice(device, source)


def _first_device() -> "cl.Device":
    try:
        devices = [device for platform in cl.get_platforms() for device in platform.get_devices()]
    except cl.Error:  # what the loader says where no driver is installed
        devices = []
    if not devices:
        raise TargetError(
            "no OpenCL device was found; install the driver of your GPU, or pocl-opencl-icd to run on the processor"
        )
    return max(devices, key=lambda device: bool(device.type & cl.device_type.GPU))


def _build(program: "cl.Program", device: "cl.Device") -> "cl.Program":
    exact = bool(device.single_fp_config & cl.device_fp_config.CORRECTLY_ROUNDED_DIVIDE_SQRT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the driver's compiler says of code that builds
        return program.build([ROUNDING] if exact else [])


@contextmanager
def _failing(name: str) -> Iterator[None]:
    """Say what a driver refused as a TargetError."""
    try:
        yield
    except cl.Error as error:
        said = " ".join(str(error).split())[:500]
        raise TargetError(f"OpenCL device {name} failed, free its memory or update its driver: {said}") from error
