"""Time the kernels one by one, with weights from memory, beside a plain read of memory and products of registers.

    TVM_NUM_THREADS=1 python benchmarks/kernels.py [--family avx512_vnni] [--only int8] [--planes 2] [--rounds 15]

Cells are timed in interleaved rounds, so a slow moment of the machine hits all of them; the median counts. On a
machine that others use too the best times say more, and only ratios of them; the last two columns are of those: the
share of what memory gives, and of the products of bytes that one thread makes of registers alone, which is told of
families of vector registers only.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm.script import tirx as T

from engram_compilers.kernels import activation, attention, experts, normalise, quantise
from engram_compilers.kernels.experts import Routing
from engram_compilers.kernels.intrinsics import lanes, splat
from engram_compilers.kernels.isa import DotIsa
from engram_runtime.cpu import machine, request_tiles
from engram_targets import cpu_profile_names, load_cpu_profile

SHAPES = ["960x576", "576x576", "3072x576", "576x1536", "49152x576", "2048x2048"]  # outputs x inputs
ROWS = [1, 4, 8, 64]
COLD_BYTES = 272 << 20  # weights rotate over this much, far beyond any cache
POSITION, CAPACITY = 500, 2048
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 9, 3, 64, 576, 1536
STREAM_ROWS, STREAM_PARTS = 64, 8
STREAM_COLUMNS = COLD_BYTES // STREAM_PARTS // STREAM_ROWS // 4
SAMPLE_US = 2000.0
TILED_FAMILIES = ["avx512_vnni", "avx_vnni", "avx2", "neon_dotprod", "neon_i8mm"]
FAMILIES = [*TILED_FAMILIES, "amx", "portable"]  # of the last two there is no peak to tell
PEAK_SUMS, PEAK_TURNS, DOT_PRODUCTS = 12, 4096, 64
EXPERTS, TOP_K = 16, 4


@dataclass
class Cell:
    """One thing to time: a compiled kernel and the argument lists it takes in turn."""

    name: str
    kernel: Callable[..., None]
    arguments: Iterator[list[Any]]
    bytes_read: int
    products: int = 0
    calls: int = 1
    us: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Set ``calls`` so that a sample is shorter than a time slice: on a busy machine some samples stay whole."""
        for _ in range(3):
            self.time_once()
        self.calls = max(1, int(SAMPLE_US / min(self.us)))
        self.us.clear()

    def time_once(self) -> None:
        start = time.perf_counter()
        for _ in range(self.calls):
            self.kernel(*next(self.arguments))
        self.us.append((time.perf_counter() - start) * 1e6 / self.calls)

    def line(self, read: "Cell", peak: "Cell | None") -> str:
        """Return times, and shares of a plain read and, where their rate is known, of products of registers."""
        best = min(self.us)
        of_read = self.bytes_read / best / (read.bytes_read / min(read.us))
        of_peak = "" if peak is None else f"{self.products / best / (peak.products / min(peak.us)):8.0%}"
        rate = self.bytes_read / best / 1e3
        return f"{self.name:34} {median(self.us):10.1f} {best:10.1f} {rate:8.1f} {of_read:8.0%} {of_peak:>8}"


def tensor(array: NDArray[Any]) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def floats(*shape: int) -> Any:
    return tensor(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def zeros(*shape: int) -> Any:
    return tensor(np.zeros(shape, np.float32))


def build_all(kernels: dict[str, Any], cpu: str) -> dict[str, Callable[..., None]]:
    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in kernels.items()})
    executable = tvm.compile(module, tvm.target.Target({"kind": "llvm", "mcpu": cpu}))
    return {name: executable[name] for name in kernels}


def stream_read() -> Any:
    """Build ``(x i32 [64, n]) -> y i32 [64, 16]``: read all of x, as fast as memory gives it."""

    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def kernel(x: T.Buffer((STREAM_ROWS, STREAM_COLUMNS), "int32"), y: T.Buffer((STREAM_ROWS, 16), "int32")) -> None:  # type: ignore[valid-type]
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in T.parallel(STREAM_ROWS):
                sums = T.alloc_local((8, 16), "int32")
                for i in T.unroll(8):
                    sums[i, lanes(0)] = splat(0)
                for step in T.serial(STREAM_COLUMNS // 128):
                    for i in T.unroll(8):
                        sums[i, lanes(0)] = sums[i, lanes(0)] + x[row, lanes(step * 128 + i * 16)]
                y[row, lanes(0)] = splat(0)
                for i in T.unroll(8):
                    y[row, lanes(0)] = y[row, lanes(0)] + sums[i, lanes(0)]

    return kernel


def register_products(isa: DotIsa) -> Any:
    """Build ``(x u8 [64], y i32 [12, 16]) -> ``: products of registers alone, as many as the unit makes."""

    @T.prim_func(s_tir=True, private=True)  # type: ignore[untyped-decorator]
    def kernel(x: T.Buffer((64,), "uint8"), y: T.Buffer((PEAK_SUMS, 16), "int32")) -> None:  # type: ignore[valid-type]
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            add_register_products(isa, x, y)

    return kernel


def add_register_products(isa: DotIsa, x: Any, y: Any) -> None:
    count = min(PEAK_SUMS, isa.sums)
    sums = [T.alloc_buffer((16,), "int32") for _ in range(count)]
    for i, total in enumerate(sums):
        T.buffer_store(total, y[i, lanes(0)], [lanes(0)])
    weights = T.Bind(x[lanes(0, 64)])
    activations = T.Bind(T.reinterpret("int8x64", T.broadcast(T.reinterpret("int32", x[lanes(0, 4)]), 16)))
    with T.serial(PEAK_TURNS):
        for total in sums:
            T.buffer_store(total, isa.dot4(total[lanes(0)], weights, activations), [lanes(0)])
    for i, total in enumerate(sums):
        T.buffer_store(y, total[lanes(0)], [i, lanes(0)])


def peak_cell(family: Any, cpu: str) -> Cell:
    kernel = build_all({"products": register_products(family.ISA)}, cpu)["products"]
    arguments = [tensor(np.ones(64, np.uint8)), tensor(np.zeros((PEAK_SUMS, 16), np.int32))]
    products = PEAK_TURNS * min(PEAK_SUMS, family.ISA.sums) * DOT_PRODUCTS
    return Cell("products of registers", kernel, itertools.repeat(arguments), 0, products)


def packed_weight(family: Any, kind: str, outputs: int, inputs: int) -> list[NDArray[Any]]:
    rng = np.random.default_rng(1)
    if kind == "int8":
        return list(family.pack_int8(rng.integers(0, 256, (outputs, inputs), np.uint8)).values())
    codes = rng.integers(0, 16, (outputs, inputs), np.uint8)
    groups = np.full((outputs, inputs // 32), 8, np.uint8)
    if kind == "int4":
        return list(family.pack_int4(codes, groups, groups).values())
    scale = np.full(groups.shape, 0.01, np.float32)
    return list(family.pack_block(codes, scale, int(kind[1])).values())


def linear_prim_func(family: Any, kind: str, rows: int, outputs: int, inputs: int, planes: int) -> Any:
    if kind.startswith("q"):
        return family.linear_block(rows, outputs, inputs, int(kind[1]))
    return getattr(family, f"linear_{kind}")(rows, outputs, inputs, planes)


def quantised(rows: int, inputs: int, planes: int) -> list[Any]:
    x = np.random.default_rng(2).normal(size=(rows, inputs)).astype(np.float32)
    return [tensor(array) for array in quantise.quantise_rows_numpy(x, planes)]


def with_cold_weight(start: list[Any], copies: Iterator[list[Any]], end: list[Any]) -> Iterator[list[Any]]:
    """Yield argument lists; cells share ``copies``, so that none finds what another has just read."""
    while True:
        yield [*start, *next(copies), *end]


def linear_cells(
    family: Any, kind: str, rows_list: list[int], shapes: list[str], planes: int, cpu: str
) -> Iterator[Cell]:
    for outputs, inputs in (tuple(map(int, shape.split("x"))) for shape in shapes):
        weight = packed_weight(family, kind, outputs, inputs)
        weight_bytes = sum(w.nbytes for w in weight)
        copies = itertools.cycle([[tensor(w) for w in weight] for _ in range(-(-COLD_BYTES // weight_bytes))])
        kernels = {f"m{m}": linear_prim_func(family, kind, m, outputs, inputs, planes) for m in rows_list}
        compiled = build_all(kernels, cpu)
        scale = [] if kind.startswith("q") else [floats(outputs)]
        for rows in rows_list:
            start = quantised(rows, inputs, planes)[: 2 if kind.startswith("q") else 3]
            arguments = with_cold_weight(start, copies, [*scale, zeros(rows, outputs)])
            name = f"{kind} {outputs}x{inputs} M={rows}"
            yield Cell(name, compiled[f"m{rows}"], arguments, weight_bytes, planes * rows * outputs * inputs)


def expert_cells(family_name: str, rows_list: list[int], shapes: list[str], cpu: str) -> Iterator[Cell]:
    """Yield int4 layers of 16 experts, 4 of them a token's."""
    family = import_module(f"engram_compilers.kernels.{family_name}_experts")
    rng = np.random.default_rng(3)
    for outputs, inputs in (tuple(map(int, shape.split("x"))) for shape in shapes):
        codes, groups = rng.integers(0, 16, (outputs, inputs), np.uint8), np.full((outputs, inputs // 32), 8, np.uint8)
        packed = family.pack_expert_int4(codes, groups, groups, np.ones(outputs, np.float32))
        slabs = [np.concatenate([part] * EXPERTS) for part in packed.values()]
        slab_bytes = sum(slab.nbytes for slab in slabs)
        copies = itertools.cycle([[tensor(slab) for slab in slabs] for _ in range(-(-COLD_BYTES // slab_bytes))])
        for rows in rows_list:
            routing = Routing(rows, EXPERTS, TOP_K)
            kernels = {"route": experts.route(routing, normalise=True)}
            kernels["linear"] = family.expert_linear_int4(routing, rows, outputs, inputs)
            compiled = build_all(kernels, cpu)
            segments = [tensor(np.zeros(n, np.int32)) for n in (routing.pairs, *2 * [routing.segments + 1], 1)]
            compiled["route"](
                tensor(rng.normal(size=(rows, EXPERTS)).astype(np.float32)), *segments, zeros(rows, TOP_K)
            )
            read = slab_bytes // EXPERTS * int(segments[-1].numpy()[0])
            start = [*quantised(rows, inputs, 2), *segments]
            arguments = with_cold_weight(start, copies, [zeros(routing.pairs, outputs)])
            name = f"experts {outputs}x{inputs} M={rows}"
            yield Cell(name, compiled["linear"], arguments, read, 2 * routing.pairs * outputs * inputs)


def other_cells(cpu: str) -> Iterator[Cell]:
    kernels, sizes = {}, (HEADS, KV_HEADS, HEAD_DIM, CAPACITY)
    for m in ROWS:
        kernels[f"attend at {POSITION} M={m}"] = attention.attend(m, *sizes, HEAD_DIM**-0.5)
        kernels[f"rope_append M={m}"] = attention.rope_append(m, *sizes)
        kernels[f"rms_norm {HIDDEN} M={m}"] = normalise.rms_norm(m, HIDDEN, 1e-5)
        kernels[f"silu_mul {INNER} M={m}"] = activation.gated(m, INNER, activation.silu)
        kernels[f"add {HIDDEN} M={m}"] = activation.add(m, HIDDEN)
        kernels[f"quantise_rows {HIDDEN} M={m}"] = quantise.quantise_rows(m, HIDDEN, quantise.MOST_PLANES)
        kernels[f"quantise_rows {INNER} M={m}"] = quantise.quantise_rows(m, INNER, quantise.MOST_PLANES)
    compiled = build_all({name.replace(" ", "_").replace("=", ""): f for name, f in kernels.items()}, cpu)
    cache, at = [floats(1, KV_HEADS, CAPACITY, HEAD_DIM) for _ in "kv"], tensor(np.array([POSITION]))
    tables = [floats(CAPACITY, HEAD_DIM // 2) for _ in range(2)]
    for name in kernels:
        m = int(name.rpartition("=")[2])
        inputs = INNER if str(INNER) in name else HIDDEN
        planes = [tensor(np.zeros((2 * m, inputs), np.int8)), zeros(m), tensor(np.zeros(2 * m, np.int32))]
        q = floats(m, HEADS * HEAD_DIM)
        arguments = {
            "attend": [q, *cache, at, zeros(m, HEADS * HEAD_DIM)],
            "rope_append": [floats(m, (HEADS + 2 * KV_HEADS) * HEAD_DIM), *tables, at, *cache, q],
            "rms_norm": [q, floats(HIDDEN), zeros(m, HIDDEN)],
            "silu_mul": [floats(m, 2 * INNER), zeros(m, INNER)],
            "add": [q, q, zeros(m, HIDDEN)],
            "quantise_rows": [floats(m, inputs), *planes],
        }[name.split()[0]]
        read = sum(a.numpy().nbytes for a in arguments[:2]) if not name.startswith("attend") else 0
        read = read or 2 * KV_HEADS * (POSITION + m) * HEAD_DIM * 4
        kernel = compiled[name.replace(" ", "_").replace("=", "")]
        yield Cell(name, kernel, itertools.repeat(arguments), read)


def stream_cell(cpu: str) -> Cell:
    kernel = build_all({"stream": stream_read()}, cpu)["stream"]
    y = tensor(np.zeros((STREAM_ROWS, 16), np.int32))
    parts = [[tensor(np.ones((STREAM_ROWS, STREAM_COLUMNS), np.int32)), y] for _ in range(STREAM_PARTS)]
    return Cell("plain read of memory", kernel, itertools.cycle(parts), COLD_BYTES // STREAM_PARTS)


def run(read: Cell, peak: Cell | None, made: Iterator[Cell], rounds: int) -> None:
    cells = [read, *([] if peak is None else [peak]), *made]
    for cell in cells:
        cell.warm_up()
    for _ in range(rounds):
        for cell in cells:
            cell.time_once()
    for cell in cells:
        print(cell.line(read, peak), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="avx512_vnni", choices=FAMILIES)
    parser.add_argument("--only", nargs="*", default=["int8", "int4", "q4_0", "q8_0", "experts", "other"])
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--planes", type=int, choices=[1, 2], default=2, help="of the int8 and int4 layers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="outputs x inputs")
    options = parser.parse_args()
    if options.family == "amx" and not request_tiles():
        parser.error("this machine has no AMX tiles, or doesn't let a process use them")
    family = import_module(f"engram_compilers.kernels.{options.family}")
    profiles = [load_cpu_profile(name) for name in cpu_profile_names()]
    cpu = next(one.llvm.mcpu for one in profiles if (one.kernels, one.machine) == (options.family, machine()))
    print(f"{'kernel, M rows':34} {'us median':>10} {'us best':>10} {'GB/s':>8} {'of read':>8} {'of peak':>8}")
    for kind in options.only:
        match kind:
            case "other":
                made = other_cells(cpu)
            case "experts":
                made = expert_cells(options.family, options.rows, options.shapes, cpu)
            case _:
                planes = 2 if kind.startswith("q") else options.planes
                made = linear_cells(family, kind, options.rows, options.shapes, planes, cpu)
        peak = peak_cell(family, cpu) if options.family in TILED_FAMILIES else None
        run(stream_cell(cpu), peak, made, options.rounds)


if __name__ == "__main__":
    main()
