"""Executor on a library that gives its linear layers to an accelerator, here a simulator of one.

The host's part is a compiled library as `engram_runtime.executors.tvm_library` runs it. It calls two functions of this
module for integer products; sums come back before the call returns, while the ledger counts the cycles they would have
taken. Results don't depend on the accelerator: its sums are exact.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.cpu import available_cores
from engram_runtime.executor import MOST_THREADS, PendingRows
from engram_runtime.executors.tvm_library import (
    TvmExecutor,
    TvmStep,
    let_call,
    load_tvm_runtime,
    running_step,
)
from engram_runtime.library import LibraryInfo, verify_part
from engram_runtime.manifest import DECODER
from engram_runtime.npu.commands_file import MULTIPLY, MULTIPLY_EXPERTS, CommandsFile, read_commands
from engram_runtime.npu.device import Program
from engram_runtime.npu.devices import open_device
from engram_runtime.npu.ledger import Ledger
from engram_runtime.table_spec import TableSpec
from engram_runtime.trust.library import trusted_library

PLANES = 2  # of a row that goes to experts

Sums = NDArray[np.int32]


class NpuExecutor(TvmExecutor):
    """A compiled library and the accelerator it calls.

    Attributes:
        geometry: of the accelerator.
        ledger: what it took.
    """

    def __init__(
        self,
        folder: Path,
        info: LibraryInfo,
        commands: CommandsFile,
        tables: Sequence[TableSpec],
        *,
        threads: int,
        told: Mapping[str, Sequence[str]],
    ) -> None:
        """Load a library; raises TargetError where its command streams or its code can't be loaded."""
        device = open_device(commands.geometry)
        self.geometry = commands.geometry
        self.programs: Sequence[Program] = [device.load(stream) for stream in commands.streams]
        verify_part(folder, info, "commands")  # or sound streams may be of another library
        self.ledger = Ledger(commands.layers, commands.geometry.clock_hz)
        load_tvm_runtime(folder, info)
        super().__init__(folder, info, tables, threads=threads, told=told)

    def make_step(self, forward: Mapping[tuple[int, int], Any], fixed: Sequence[Any], graph: str) -> "NpuStep":
        """See `TvmExecutor.make_step`."""
        return NpuStep(self, forward, fixed, self._told[graph], counts_experts=graph == DECODER)

    def multiply(self, program: int, layer: int, weights: NDArray[np.uint8], planes: NDArray[np.int8]) -> Sums:
        """Run a product with a layer's weight and count what it took."""
        sums, cost = self.programs[program].run(weights, planes)
        self.ledger.add(layer, self.programs[program].product, len(planes), cost)
        return sums


class NpuStep(TvmStep):
    """A step that waits for rows first, to tell how long they take, and counts cycles until each site's layer."""

    executor: NpuExecutor

    def __init__(self, executor: NpuExecutor, *arguments: Any, counts_experts: bool) -> None:
        super().__init__(executor, *arguments, counts_experts=counts_experts)
        self.executor = executor
        self.device_s = 0.0

    def run(
        self,
        before: Mapping[str, NDArray[Any]],
        rows: Mapping[str, PendingRows],
        after: Mapping[str, NDArray[Any]],
        own: Sequence[Any] = (),
    ) -> NDArray[np.float32]:
        """See `TvmStep.run`."""
        ledger, began = self.executor.ledger, time.perf_counter()
        cycles, filled = ledger.cycles, []
        for site, pending in enumerate(rows.values()):
            pending.fill(buffer := np.empty(pending.shape, np.float32))
            fetch_s = time.perf_counter() - began
            filled.append(PendingRows(pending.shape, partial(self._reach, site, fetch_s, cycles, buffer)))
        self.device_s, started = 0.0, time.perf_counter()
        logits = super().run(before, dict(zip(rows, filled, strict=True)), after, own)
        ledger.host_s += time.perf_counter() - started - self.device_s
        ledger.passes += 1
        return logits

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Time what generated code has the accelerator do; what goes wrong in it, the pass raises."""
        started = time.perf_counter()
        with self.failing("the accelerator failed"):
            yield
        self.device_s += time.perf_counter() - started

    def _reach(
        self, site: int, fetch_s: float, cycles: int, rows: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Put rows in place and note how far the accelerator has come."""
        out[...] = rows
        ledger = self.executor.ledger
        ledger.add_wait(site, fetch_s, ledger.cycles - cycles)


def _multiply(planes: Any, weight: Any, program: int, layer: int, sums: Any) -> None:
    step = _npu_step()
    with step.on_device():
        _array(sums)[...] = step.executor.multiply(program, layer, _array(weight), _array(planes))


def _multiply_experts(
    planes: Any, weight: Any, order: Any, expert: Any, start: Any, count: Any, program: int, layer: int, sums: Any
) -> None:
    """Run the product of each segment of `engram_compilers.kernels.experts.Segments` with its expert's weight."""
    step = _npu_step()
    executor = step.executor
    weights, pairs = _array(weight), _array(order)
    rows = _array(planes).reshape(PLANES, -1, _array(planes).shape[1])
    made = _array(sums).reshape(PLANES, len(pairs), -1)
    per_row, size = len(pairs) // rows.shape[1], executor.programs[program].weight_bytes
    bounds = _array(start)
    with step.on_device():
        for segment in range(int(_array(count)[0])):
            own = pairs[bounds[segment] : bounds[segment + 1]]
            base = int(_array(expert)[segment]) * size
            stacked = rows[:, own // per_row].reshape(PLANES * len(own), -1)
            found = executor.multiply(program, layer, weights[base : base + size], stacked)
            made[:, own] = found.reshape(PLANES, len(own), -1)


def _npu_step() -> NpuStep:
    step = running_step()
    assert isinstance(step, NpuStep)
    return step


def _array(tensor: Any) -> NDArray[Any]:
    return np.asarray(np.from_dlpack(tensor))


let_call(MULTIPLY, _multiply)
let_call(MULTIPLY_EXPERTS, _multiply_experts)


def load(bundle: Bundle, *, threads: int | None, target: str | None) -> NpuExecutor:
    """Load the library for a target, with its host's number of threads unless told otherwise.

    Raises:
        TargetError: there is none, its commands are missing or of another accelerator, or it can't be loaded.
    """
    return open_library(bundle, *trusted_library(bundle, target), threads=threads)


def open_library(bundle: Bundle, folder: Path, info: LibraryInfo, *, threads: int | None) -> NpuExecutor:
    """Load a library that may be."""
    assert info.commands is not None
    commands = read_commands(folder / info.commands)
    threads = threads or info.threads or min(available_cores(), MOST_THREADS)
    told = {name: graph.told_outputs for name, graph in bundle.manifest.graphs.items()}
    return NpuExecutor(folder, info, commands, bundle.manifest.tables, threads=threads, told=told)
