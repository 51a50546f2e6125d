"""Executor on a library for a GPU: weights and caches lie on the device, tables and windows with the host."""

import mmap
import os
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError
from engram_runtime.executor import State, StepInputs
from engram_runtime.executors.padding import chunk_sizes, padded_inputs
from engram_runtime.forking import check_process
from engram_runtime.gpu.device import Buffer, Device
from engram_runtime.gpu.plan import Plan, read_plan
from engram_runtime.gpu.running import BoundPass, Memory
from engram_runtime.library import LibraryInfo, pass_function, verify_part
from engram_runtime.manifest import DECODER, EMBEDDINGS, HIDDEN, GraphSpec
from engram_runtime.trust.code import checked_text
from engram_runtime.trust.library import trusted_library


class GpuExecutor:
    """A library's kernels and weights on a device, shared by all sequences.

    The states that roll back, caches, stay on the device: its copy of those of a sequence is found again by the arrays
    that `bind` was given. The others go to the device and back with each pass, as their owner may change them.
    """

    threads = 1
    expert_bytes_read = 0

    def __init__(
        self, device: Device, folder: Path, info: LibraryInfo, plan: Plan, graphs: Mapping[str, GraphSpec]
    ) -> None:
        """Put the weights on the device.

        Raises:
            BundleError: the weights are not those of ``info``.
            TargetError: the device has no room for them.
        """
        self.name = info.device
        self.folder = folder
        self.info = info
        self.device = device
        self.process = os.getpid()
        self.caches_on = device.name
        self.float16_states = info.float16_states
        self.experts_read: int | None = 0 if info.expert_bytes else None
        self._plan = plan
        self._graphs = graphs
        self._weights = _upload_weights(device, folder / info.weights, info)
        scratch_bytes = max((each.scratch_bytes for each in plan.passes.values()), default=0)
        self._scratch, self._temporary = (device.allocate(max(n, 1)) for n in (scratch_bytes, plan.temporary_bytes))
        self._sizes = sorted({tokens for tokens, _ in info.passes})
        self._caches: dict[int, tuple[weakref.ref[State], Mapping[str, Buffer]]] = {}

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        """See `Executor.chunks`."""
        return chunk_sizes(self._sizes, count, spare)

    def row_decoder(self, site: str) -> None:
        """See `Executor.row_decoder`: rows are decoded by numpy."""

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> "GpuStep":
        """See `Executor.bind`; caches are taken to be empty the first time their arrays are given."""
        spec = self._graphs[graph]
        caches = self._caches_of(states, graph)
        own = {name: array for name, array in states.items() if name not in caches}
        buffers = {**caches, **{name: self.device.allocate(array.nbytes) for name, array in own.items()}}
        memory = Memory(self.device, self._weights, buffers, self._scratch, self._temporary)
        return GpuStep(self, spec, partial(self._bound_pass, memory, graph, spec), own, counts=graph == DECODER)

    def copy_caches(self, source: Mapping[str, State], target: Mapping[str, State]) -> None:
        """See `OnDevice.copy_caches`."""
        copies = self._caches_of(target, DECODER)
        for name, buffer in self._caches_of(source, DECODER).items():
            self.device.copy(buffer, copies[name])
        self.device.finish()

    def count_experts(self, counts: Sequence[NDArray[Any]]) -> None:
        """Add what a pass has read of experts."""
        if self.experts_read is None:
            return
        read = [int(count[0]) for count in counts]
        self.experts_read += sum(read)
        self.expert_bytes_read += sum(n * size for n, size in zip(read, self.info.expert_bytes, strict=True))

    def _bound_pass(self, memory: Memory, graph: str, spec: GraphSpec, tokens: int, rows: int) -> BoundPass:
        name = pass_function(graph, tokens, rows)
        if name not in self._plan.passes:
            raise BundleError(f"library {self.folder} has no pass {name}; compile the bundle again")
        return BoundPass(memory, self._plan.passes[name], spec, {"T": tokens, "R": rows})

    def _caches_of(self, states: Mapping[str, State], graph: str) -> Mapping[str, Buffer]:
        """Return the device's copies of a sequence's caches, for as long as their arrays live."""
        rolling = {state.name: states[state.name] for state in self._graphs[graph].states if state.rolls_back}
        if not rolling:
            return {}
        first = next(iter(rolling.values()))
        key = id(first)
        if key not in self._caches or self._caches[key][0]() is not first:
            held = {name: self.device.allocate(array.nbytes) for name, array in rolling.items()}
            self._caches[key] = (weakref.ref(first, lambda _: self._caches.pop(key, None)), held)
        return self._caches[key][1]


class GpuStep:
    """The library's passes with one sequence's states."""

    def __init__(
        self, executor: GpuExecutor, spec: GraphSpec, bound_pass: Any, own: Mapping[str, State], *, counts: bool
    ) -> None:
        """Run ``bound_pass(tokens, rows)``; ``own`` are the states that the host keeps."""
        self._executor = executor
        self._spec = spec
        self._bound_pass = bound_pass
        self._own = own
        self._counts = counts
        self._passes: dict[tuple[int, int], BoundPass] = {}
        self._sizes = sorted({tokens for tokens, _ in executor.info.passes})
        self._told: Sequence[NDArray[Any]] = ()
        self._count = 0

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """See `Step.told`."""
        values = (values[: self._count] for values in self._told)
        return dict(zip(self._spec.told_outputs, values, strict=False))

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        """See `Step`; a pass that is smaller than all that were compiled is padded."""
        check_process(self._executor.process)
        self._count, rows = len(inputs.token_ids), len(inputs.logit_rows)
        size = min(size for size in self._sizes if size >= self._count)
        if size > self._count:
            inputs = padded_inputs(inputs, size)
        logits, *others = self._run(inputs)
        told = len(self._spec.told_outputs)
        self._told = [values.copy() for values in others[:told]]
        if self._counts:
            self._executor.count_experts(others[told:])
        return logits[:rows].copy()

    def _run(self, inputs: StepInputs) -> Sequence[NDArray[Any]]:
        sizes = len(inputs.token_ids), len(inputs.logit_rows)
        if sizes not in self._passes:
            self._passes[sizes] = self._bound_pass(*sizes)
        return self._passes[sizes].run(_given(inputs), list(inputs.rows.items()), self._own)


def _given(inputs: StepInputs) -> Mapping[str, NDArray[Any]]:
    """Return the inputs of a graph, save the rows of sites, by name."""
    given = {
        "token_ids": inputs.token_ids,
        "position": np.array([inputs.position], dtype=np.int64),
        "logit_rows": inputs.logit_rows,
    }
    after = {HIDDEN: inputs.hidden, EMBEDDINGS: inputs.embeddings}
    return {**given, **{name: values for name, values in after.items() if values is not None}}


def _upload_weights(device: Device, path: Path, info: LibraryInfo) -> list[Buffer]:
    size = path.stat().st_size if path.is_file() else 0
    if size != info.weights_bytes:
        raise BundleError(f"{path} holds {size} bytes, expected {info.weights_bytes}; compile the bundle again")
    with path.open("rb") as file:
        data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    buffers = []
    for tensor in info.tensors:
        buffers.append(device.allocate(tensor.end - tensor.offset))
        device.upload(data[tensor.offset : tensor.end], buffers[-1])
    device.finish()
    return buffers


def load(bundle: Bundle, *, threads: int | None, target: str | None) -> GpuExecutor:
    """Load the library for ``target`` onto the first device there is; ``threads`` are the device's own affair.

    Raises:
        BundleError: the library is damaged.
        TargetError: there is no library or no device, or the device can't run it.
    """
    return open_library(bundle, *trusted_library(bundle, target), threads=threads)


def open_library(bundle: Bundle, folder: Path, info: LibraryInfo, *, threads: int | None) -> GpuExecutor:
    """Load a library that may be; its kernels are what is built for the device."""
    from engram_runtime.gpu.opencl import open_device

    assert info.commands is not None
    plan = read_plan(folder / info.commands)
    verify_part(folder, info, "commands")  # or a sound plan may be of other kernels
    source = checked_text(folder / info.library, info.sha256["library"])
    return GpuExecutor(open_device(source, plan.most_threads), folder, info, plan, bundle.manifest.graphs)
