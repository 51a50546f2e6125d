"""What runs a graph: the protocol, and the executors by name."""

import importlib
import math
import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.cpu import physical_memory
from engram_runtime.errors import RequestError
from engram_runtime.manifest import DECODER, StateSpec
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.decoding import RowDecoder

MOST_THREADS = 256  # that a compiled library's pool can start
ALIGNMENT_BYTES = 64  # TVM's vector loads need it
FLOAT32, FLOAT16 = "float32", "float16"  # dtypes of states

State = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class PendingRows:
    """Rows of a site that are on their way.

    Attributes:
        shape: ``[T, C, d]``.
        fill: waits for them and puts them into a contiguous float32 array of that shape; to be called once at most,
            during the pass.
    """

    shape: tuple[int, ...]
    fill: Callable[[NDArray[np.float32]], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """One forward pass over T tokens.

    Attributes:
        token_ids: ``[T]`` int64.
        position: how many tokens the states already hold.
        logit_rows: ``[R]`` int64, the tokens of this pass whose logits are wanted.
        rows: by site in the manifest's order, asked for when the pass begins and waited for when it comes to the site.
        hidden: ``[T, D]`` float32, what a draft head goes on from; a decoder takes none.
        embeddings: ``[T, D]`` float32, read where a token id is negative; for a decoder that takes them, else None.
    """

    token_ids: NDArray[np.int64]
    position: int
    logit_rows: NDArray[np.int64]
    rows: Mapping[str, PendingRows]
    hidden: NDArray[np.float32] | None = None
    embeddings: NDArray[np.float32] | None = None


class Step(Protocol):
    """A graph bound to one sequence's states, which it updates in place."""

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """What the last pass said of its T tokens beside the logits, by the names of the graph's `told_outputs`.

        Empty before the first pass; see `engram_runtime.manifest.GraphSpec` for what they are.
        """
        ...

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Return ``[R, V]`` logits, a fresh array."""
        ...


class Executor(Protocol):
    """A bundle's graph, loaded and ready; ``threads`` is how many it uses."""

    name: str
    threads: int

    @property
    def float16_states(self) -> Collection[str]:
        """Names of the states it keeps as float16; the others are float32."""
        ...

    @property
    def expert_bytes_read(self) -> int | None:
        """Bytes of experts' weights read by all steps so far, or None where that isn't counted."""
        ...

    @property
    def experts_read(self) -> int | None:
        """How many experts these were, each layer's distinct ones step by step; None without any and as above."""
        ...

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        """Return how many tokens each pass has room for that ``count`` tokens take, in order.

        Args:
            spare: up to how many more than ``count`` they may have room for in all. A pass that isn't full leaves
                values that mean nothing in the states of as many positions after its tokens.
        """
        ...

    def row_decoder(self, site: str) -> RowDecoder | None:
        """Return a compiled decoder for one store of a site's table, or None where its records have none."""
        ...

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        """Bind a graph to caller-owned states, by name in their manifest shapes, 64-byte aligned.

        Args:
            states: see `allocate_states`.
            graph: the decoder or the draft head, which the bundle must have.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchInputs:
    """One forward pass over R rows, a token each, of several sequences.

    A sequence may have several rows where all of its states roll back (`StateSpec.rolls_back`): tokens that follow one
    another, in their order. No row reads a cache before all of them have added to theirs, or those before it have.

    Attributes:
        sequences: ``[R]``, which of the bound sequences each row is of, counted from 0.
        token_ids: ``[R]`` int64.
        positions: ``[R]`` int64, how many tokens of its sequence come before each.
        rows: by site in the manifest's order, ``[R, C, d]``.
        embeddings: ``[R, D]`` float32 for a decoder that takes them, else None; see `StepInputs`.
    """

    sequences: Sequence[int]
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    rows: Mapping[str, PendingRows]
    embeddings: NDArray[np.float32] | None = None


class BatchStep(Protocol):
    """The decoder bound to the states of several sequences, which it updates in place."""

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """See `Step.told`, of R rows."""
        ...

    def __call__(self, inputs: BatchInputs) -> NDArray[np.float32]:
        """Return ``[R, V]`` logits, each with the bits of a pass of its own."""
        ...


@runtime_checkable
class Batching(Protocol):
    """An executor that runs rows of several sequences in one forward pass."""

    def batches(self, count: int) -> Sequence[int]:
        """Split ``count`` rows into the numbers it runs at once, in order."""
        ...

    def spare_rows(self, count: int) -> int:
        """Return how many rows more than ``count`` the same passes run in the same time; 0 where none is free."""
        ...

    def bind_batch(self, states: Sequence[Mapping[str, State]]) -> BatchStep:
        """Bind the decoder to the states of any number of sequences, for passes of 2 to the largest of `batches` rows.

        See `Executor.bind`.
        """
        ...


@runtime_checkable
class OnDevice(Protocol):
    """An executor that keeps the caches of a sequence in a device's memory, where several can't share them."""

    caches_on: str  # the device's name

    def copy_caches(self, source: Mapping[str, State], target: Mapping[str, State]) -> None:
        """Copy the caches of a sequence, which is found by the states that the decoder was bound to, to another's."""
        ...


EXECUTORS = {
    "tvm": "engram_runtime.executors.compiled",
    "onnxruntime": "engram_runtime.executors.onnxruntime_session",
}


def load_executor(name: str, bundle: Bundle, *, threads: int | None, target: str | None = None) -> Executor:
    """Load a bundle into the executor of that name.

    Args:
        threads: worker threads, or None for the executor's own choice.
        target: whose compiled library is to run, or None for the CPU's that fits this machine best.

    Raises:
        RequestError: no executor of that name, not a positive number of threads, or a target for one that runs no
            library.
        TargetError: the executor can't run this bundle on this machine.
    """
    if name not in EXECUTORS:
        raise RequestError(f"executor {name!r} is unknown; there are {sorted(EXECUTORS)}")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise RequestError(f"threads is {threads}, expected 1 to {MOST_THREADS}")
    executor: Executor = importlib.import_module(EXECUTORS[name]).load(bundle, threads=threads, target=target)
    return executor


def allocate_states(specs: Sequence[StateSpec], float16_states: Collection[str] = ()) -> dict[str, State]:
    """Return zeroed, aligned states by name; pages are touched only as positions are used.

    Args:
        float16_states: names of those that are float16, which the executor knows.

    Raises:
        RequestError: they are larger than the machine's memory.
    """
    # All are summed first, as the system may grant each by itself and end the process once they fill.
    needed = state_bytes(specs, float16_states)
    memory = physical_memory()
    if needed > memory:
        raise RequestError(
            f"the states need {needed / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f} GiB of memory; "
            f"export with a smaller --context"
        )
    return {spec.name: aligned_zeros(spec.shape, _dtype(spec, float16_states)) for spec in specs}


def state_bytes(specs: Sequence[StateSpec], float16_states: Collection[str] = ()) -> int:
    """Return what states take once all their positions are used."""
    return sum(np.dtype(_dtype(spec, float16_states)).itemsize * math.prod(spec.shape) for spec in specs)


def _dtype(spec: StateSpec, float16_states: Collection[str]) -> str:
    return FLOAT16 if spec.name in float16_states else FLOAT32


def empty_rows(table: TableSpec, count: int) -> PendingRows:
    """Return ``[T, C, d]`` zeros, which switch an Engram site off; see `Session`."""
    return PendingRows((count, table.keyer.columns, table.record.columns), lambda out: out.fill(0))


def aligned_zeros(shape: Sequence[int], dtype: str = FLOAT32) -> NDArray[Any]:
    """Return zeros whose data begins at a multiple of `ALIGNMENT_BYTES`, each page taking memory once it is written."""
    count = math.prod(shape)
    # Not numpy's zeros: it asks for huge pages, so the first position of each head would take 2 MiB.
    pages = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=dtype, count=count).reshape(shape)


def added(before: int | None, now: int | None) -> int | None:
    """Return what was read of experts since ``before``, or None where it isn't counted."""
    return None if before is None or now is None else now - before
