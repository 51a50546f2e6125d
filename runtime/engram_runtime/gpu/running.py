"""One forward pass on a device: inputs go there, launches are queued, results come back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from engram_runtime.errors import BundleError
from engram_runtime.executor import PendingRows, State
from engram_runtime.gpu.device import Buffer, Device, Kernel
from engram_runtime.gpu.plan import (
    OUTPUT,
    AwaitRows,
    ForwardPass,
    Launch,
    Place,
)
from engram_runtime.manifest import ROWS, GraphSpec


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What passes share on a device.

    Attributes:
        weights: by their place in the library; ``states`` by name.
        scratch: for the largest pass; ``temporary`` for the largest kernel. One pass runs after the other.
    """

    device: Device
    weights: Sequence[Buffer]
    states: Mapping[str, Buffer]
    scratch: Buffer
    temporary: Buffer


class _Input:
    """An input on both sides."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: str) -> None:
        self._device = device
        self.array = device.host_array(shape, dtype)
        self.buffer = device.allocate(self.array.nbytes)

    def upload(self) -> None:
        """Queue the copy of what the array holds."""
        self._device.upload(self.array, self.buffer)


class BoundPass:
    """A forward pass with its memory: all launches are ready, and the host's arrays are pinned."""

    def __init__(self, memory: Memory, forward: ForwardPass, spec: GraphSpec, axes: Mapping[str, int]) -> None:
        """Prepare a pass.

        Args:
            axes: sizes of the axes T and R.

        Raises:
            BundleError: the plan is not one of this graph.
            TargetError: the device has no room.
        """
        self._memory = memory
        self._device = device = memory.device
        self._spec = spec
        self._inputs = {
            tensor.name: _Input(device, [n if isinstance(n, int) else axes[n] for n in tensor.shape], tensor.dtype)
            for tensor in spec.inputs
        }
        self._results = [
            (result.place, device.host_array(result.shape, result.dtype))
            for result in forward.results
            if result.place.kind == OUTPUT
        ]
        self._outputs = {place.key: device.allocate(place.bytes) for place, _ in self._results}
        self._buffers: dict[Place, Buffer] = {}
        self._steps = [self._prepared(step) for step in forward.steps]

    def run(
        self,
        given: Mapping[str, NDArray[Any]],
        rows: Sequence[tuple[str, PendingRows]],
        own: Mapping[str, State],
    ) -> Sequence[NDArray[Any]]:
        """Return the results that are no states, valid until the next run; ``own`` are states of the host's.

        The rows of a site are waited for while the device works on what comes before it.

        Raises:
            TargetError: the device failed; and what waiting for rows raises.
        """
        for name, values in given.items():
            self._inputs[name].array[...] = values
            self._inputs[name].upload()
        for name, state in own.items():
            self._device.upload(state, self._memory.states[name])
        try:
            for step in self._steps:
                if isinstance(step, AwaitRows):
                    self._fill(*rows[step.site])
                else:
                    self._device.launch(step)
            for place, array in self._results:
                self._device.download(self._outputs[place.key], array)
            for name, state in own.items():
                self._device.download(self._memory.states[name], state)
        finally:
            self._device.finish()  # nothing may still be copied from arrays that are filled again
        return [array for _, array in self._results]

    def _fill(self, site: str, rows: PendingRows) -> None:
        self._device.start()
        waiting = self._inputs[f"{ROWS}{site}"]
        rows.fill(waiting.array)
        waiting.upload()

    def _prepared(self, step: Launch | AwaitRows) -> Kernel | AwaitRows:
        if isinstance(step, Launch):
            arguments = [self._buffer(place) for place in step.arguments]
            return self._device.kernel(step.function, step.blocks, step.threads, arguments)
        sites = sum(tensor.name.startswith(ROWS) for tensor in self._spec.inputs)
        if step.site >= sites:
            raise BundleError(
                f"the library's plan awaits rows of table {step.site}, this bundle has {sites}; compile it again"
            )
        return step

    def _buffer(self, place: Place) -> Buffer:
        if place not in self._buffers:
            self._buffers[place] = self._find(place)
        return self._buffers[place]

    def _find(self, place: Place) -> Buffer:
        memory, key = self._memory, place.key
        match place.kind, key:
            case "input", str() if key in self._inputs:
                return self._inputs[key].buffer
            case "state", str() if key in memory.states:
                return memory.states[key]
            case "weight", int() if key < len(memory.weights):
                return memory.weights[key]
            case "output", int() if key in self._outputs:
                return self._outputs[key]
            case "scratch", int():
                return self._device.part(memory.scratch, key, place.bytes)
            case "temporary", int():
                return self._device.part(memory.temporary, key, place.bytes)
        raise BundleError(f"the library's plan names {place.kind} {key!r}, which this bundle lacks; compile it again")
