"""A short search for block sizes: candidates of one kernel in interleaved rounds, on one thread, weights from memory.

Moments in which something else runs lengthen times and never shorten them, so the best times count; and a candidate
must be faster than the family's own block sizes in the rounds of even and of odd number alike, as luck seldom is twice.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray

from engram_compilers.kernels.packing import GROUP
from engram_compilers.kernels.quantise import MOST_PLANES, quantise_rows_numpy
from engram_compilers.linking import link
from engram_compilers.tuning.blocks import own_sums, tunable, with_sums
from engram_compilers.tuning.sizes import LEAST_SUMS, MOST_SUMS, BlockSize, Measured
from engram_runtime.errors import CompileError
from engram_targets import CpuProfile

OUTPUTS, INPUTS = 1536, 576  # of the layer that stands for all: a middle one of SmolLM2-135M
SHARES = (0.25, 0.5, 0.75, 1.25, 1.5)  # of a family's own sums, which are tried as well
COLD_BYTES = 128 << 20  # weights rotate over this much, beyond the caches of the small boxes this is for
SAMPLE_S = 0.002  # shorter than a time slice: on a busy machine some samples stay whole
LEAST_ROUNDS = 8
LEAST_GAIN = 0.03  # what best times of equal code differ by here on a busy machine


@dataclass(slots=True, eq=False)
class Candidate:
    """A block size and the times its kernel took, in seconds."""

    size: BlockSize
    call: Callable[[], None]
    calls: int = 1
    seconds: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Call the kernel a few times, and set how many calls a sample has."""
        for _ in range(3):
            self.time_once()
        self.calls = max(1, int(SAMPLE_S / min(self.seconds)))
        self.seconds.clear()

    def time_once(self) -> None:
        """Take a sample."""
        started = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        self.seconds.append((time.perf_counter() - started) / self.calls)


def tuned_kernels(profile: CpuProfile) -> list[tuple[str, int]]:
    """Return the kernels of a profile with block sizes to choose: kind of weights and number of rows.

    Raises:
        CompileError: there is none.
    """
    builders = tunable(_family(profile))
    if not builders:
        raise CompileError(f"target {profile.name} has kernels {profile.kernels}, of which no block size can be chosen")
    return list(itertools.product(builders, (*profile.decode_tokens, *profile.prefill_tokens)))


def search(profile: CpuProfile, kernels: Sequence[tuple[str, int]], seconds: float) -> Iterator[Measured]:
    """Yield what is found of each kernel on this machine, as long as there is time to begin one.

    Raises:
        CompileError: there is no linker, or it failed.
    """
    ends = time.monotonic() + seconds
    for done, (kind, rows) in enumerate(kernels):
        left = ends - time.monotonic()
        if left <= 0:
            return
        with TemporaryDirectory() as folder:
            share_ends = time.monotonic() + left / (len(kernels) - done)
            yield measure(_candidates(profile, kind, rows, Path(folder)), share_ends)


def measure(candidates: Sequence[Candidate], ends: float) -> Measured:
    """Time candidates in turn until ``ends`` of `time.monotonic`; the first one has the family's own block size."""
    for candidate in candidates:
        candidate.warm_up()
    rounds = 0
    while rounds < LEAST_ROUNDS or time.monotonic() < ends:
        for candidate in candidates:
            candidate.time_once()
        rounds += 1
    return judged(candidates)


def judged(candidates: Sequence[Candidate]) -> Measured:
    """Say which candidate is the fastest, and whether it was so twice."""
    own, best = candidates[0], min(candidates, key=lambda candidate: min(candidate.seconds))
    halves = [min(best.seconds[half::2]) / min(own.seconds[half::2]) for half in (0, 1)]
    return Measured(
        own=own.size,
        best=best.size,
        own_us=min(own.seconds) * 1e6,
        best_us=min(best.seconds) * 1e6,
        pays=max(halves) <= 1 - LEAST_GAIN,
    )


def sums_to_try(own: int) -> list[int]:
    """Return numbers of sums, a family's own first."""
    others = {min(MOST_SUMS, max(LEAST_SUMS, 2 * round(own * share / 2))) for share in SHARES}
    return [own, *sorted(others - {own})]


def _family(profile: CpuProfile) -> ModuleType:
    return import_module(f"engram_compilers.kernels.{profile.kernels}")


def _candidates(profile: CpuProfile, kind: str, rows: int, folder: Path) -> list[Candidate]:
    family = _family(profile)
    builder = tunable(family)[kind]
    made: dict[int, Any] = {}
    for sums in sums_to_try(own_sums(builder)):
        kernel = with_sums(builder, sums)(rows, OUTPUTS, INPUTS, MOST_PLANES)
        if not any(tvm_ffi.structural_equal(kernel, other) for other in made.values()):
            made[sums] = kernel
    library = _compiled({f"sums_{sums}": kernel for sums, kernel in made.items()}, profile, folder)
    arguments = _arguments(family, kind, rows)
    sizes = [BlockSize(kind=kind, rows=rows, sums=sums) for sums in made]
    return [Candidate(size, partial(_call, library.get_function(f"sums_{size.sums}"), arguments)) for size in sizes]


def _call(kernel: Callable[..., None], arguments: Iterator[list[Any]]) -> None:
    kernel(*next(arguments))


def _compiled(kernels: dict[str, Any], profile: CpuProfile, folder: Path) -> Any:
    """Compile kernels as a bundle's are, and load them, on one thread."""
    module = tvm.IRModule({name: made.with_attr("global_symbol", name) for name, made in kernels.items()})
    compiled = tvm.compile(module, tvm.target.Target(profile.llvm.target))
    path = folder / "kernels.so"
    compiled.export_library(str(path), fcompile=partial(link, mtriple=profile.llvm.mtriple))
    library = tvm_ffi.load_module(str(path))
    library.get_function("use_threads", query_imports=True)(1)
    return library


def _arguments(family: ModuleType, kind: str, rows: int) -> Iterator[list[Any]]:
    """Yield argument lists whose weights are never in a cache; all candidates share them."""
    rng = np.random.default_rng(0)
    weight = list(_packed(family, kind, rng).values())
    copies = -(-COLD_BYTES // sum(part.nbytes for part in weight))
    weights = itertools.cycle([[_tensor(part) for part in weight] for _ in range(copies)])
    values = rng.standard_normal((rows, INPUTS), dtype=np.float32)
    start = [_tensor(part) for part in quantise_rows_numpy(values, MOST_PLANES)]
    end = [_tensor(np.ones(OUTPUTS, np.float32)), _tensor(np.zeros((rows, OUTPUTS), np.float32))]
    return ([*start, *next(weights), *end] for _ in itertools.repeat(None))


def _packed(family: ModuleType, kind: str, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    if kind == "int8":
        weight: dict[str, NDArray[Any]] = family.pack_int8(rng.integers(0, 256, (OUTPUTS, INPUTS), np.uint8))
        return weight
    codes = rng.integers(0, 16, (OUTPUTS, INPUTS), np.uint8)
    groups = np.full((OUTPUTS, INPUTS // GROUP), 8, np.uint8)
    packed: dict[str, NDArray[Any]] = family.pack_int4(codes, groups, groups)
    return packed


def _tensor(values: NDArray[Any]) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(values))
