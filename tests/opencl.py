"""Runs kernels on an OpenCL device, such as the processor by pocl."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tvm import tirx

from engram_compilers.gpu.sources import Sources, Temporary, generate
from engram_runtime.errors import TargetError
from engram_targets import GpuProfile, load_profile

Array = NDArray[Any]
MOST_THREADS = 256


def opencl_profile(**changes: Any) -> GpuProfile:
    """Return the profile for OpenCL with few passes, or what ``changes`` make of it."""
    profile = load_profile("opencl")
    assert isinstance(profile, GpuProfile)
    return dataclasses.replace(profile, **{"decode_tokens": (1,), "prefill_tokens": (8,)} | changes)


def lacking() -> str | None:
    """Say what is missing to run OpenCL here, None where nothing is."""
    if importlib.util.find_spec("pyopencl") is None:
        return "needs pyopencl: pip install 'engram-edge[opencl]'"
    from engram_runtime.gpu.opencl import open_device

    try:
        open_device("", MOST_THREADS)
    except TargetError:
        return "needs an OpenCL driver: apt install pocl-opencl-icd"
    return None


needs_opencl = pytest.mark.skipif(lacking() is not None, reason=lacking() or "")


class Kernels:
    """PrimFuncs built for the first OpenCL device."""

    def __init__(self, kernels: Mapping[str, tirx.PrimFunc]) -> None:
        from engram_runtime.gpu.opencl import open_device

        self._sources: Sources = generate(kernels, opencl_profile())
        self._device = open_device(self._sources.text, MOST_THREADS)

    def run(self, name: str, *arrays: Array) -> Sequence[Array]:
        """Return what a PrimFunc makes of its arguments, all of them; outputs are given as what they hold before."""
        device = self._device
        given = [np.ascontiguousarray(array) for array in arrays]
        buffers = [device.allocate(array.nbytes) for array in given]
        for array, buffer in zip(given, buffers, strict=True):
            device.upload(array, buffer)
        temporary = device.allocate(max(self._sources.temporary_bytes, 1))
        for launch in self._sources.launches[name]:
            arguments = [
                device.part(temporary, each.offset, each.bytes) if isinstance(each, Temporary) else buffers[each]
                for each in launch.arguments
            ]
            device.launch(device.kernel(launch.function, launch.blocks, launch.threads, arguments))
        made = [np.empty_like(array) for array in given]
        for array, buffer in zip(made, buffers, strict=True):
            device.download(buffer, array)
        device.finish()
        return made
