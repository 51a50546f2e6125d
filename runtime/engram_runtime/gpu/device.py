"""What an executor needs of a GPU: memory, copies and launches, all in one queue that runs them in order."""

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from engram_runtime.gpu.plan import Sizes

Buffer = Any  # memory of a device; which, only the device knows
Kernel = Any  # a device function with its arguments


class Device(Protocol):
    """A GPU with the kernels of one library.

    What is asked of it is queued and runs in that order; only `finish` waits. Arrays that are copied from or to must
    stay as they are until then.
    """

    name: str

    def allocate(self, size: int) -> Buffer:
        """Return memory of ``size`` bytes, whose content is undefined.

        Raises:
            TargetError: the device has not so much.
        """
        ...

    def part(self, buffer: Buffer, offset: int, size: int) -> Buffer:
        """Return a part of a buffer; offsets are multiples of `engram_runtime.gpu.plan.ALIGNMENT_BYTES`."""
        ...

    def host_array(self, shape: Sequence[int], dtype: str) -> NDArray[Any]:
        """Return an array in memory that the device copies from and to by itself: pinned, where it can be."""
        ...

    def kernel(self, function: str, blocks: Sizes, threads: Sizes, arguments: Sequence[Buffer]) -> Kernel:
        """Return a launch of a function of the library's source, to be repeated.

        Raises:
            BundleError: the source has no such function.
        """
        ...

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """Queue a copy to the device."""
        ...

    def download(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Queue a copy from the device."""
        ...

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Queue a copy of all of a buffer to another one of its size."""
        ...

    def launch(self, kernel: Kernel) -> None:
        """Queue a launch.

        Raises:
            TargetError: the device refuses it, such as for want of memory.
        """
        ...

    def start(self) -> None:
        """Have the device begin with what is queued."""
        ...

    def finish(self) -> None:
        """Wait for all that is queued.

        Raises:
            TargetError: the device failed.
        """
        ...
