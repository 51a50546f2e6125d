"""Time the kernels one by one, with weights from memory, beside a plain read of memory in the same run.

    TVM_NUM_THREADS=1 python benchmarks/kernels.py [--family avx512_vnni] [--only int8] [--rounds 15]

Cells are timed in interleaved rounds, so a slow moment of the machine hits all of them; the median counts.
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

from engram_compilers.kernels import activation, attention, normalise, quantise
from engram_compilers.kernels.intrinsics import lanes, splat

SHAPES = ["960x576", "576x576", "3072x576", "576x1536", "49152x576", "2048x2048"]  # outputs x inputs
ROWS = [1, 4, 8, 64]
COLD_BYTES = 272 << 20  # weights rotate over this much, far beyond any cache
POSITION, CAPACITY = 500, 2048
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 9, 3, 64, 576, 1536
STREAM_ROWS, STREAM_PARTS = 64, 8
STREAM_COLUMNS = COLD_BYTES // STREAM_PARTS // STREAM_ROWS // 4
SAMPLE_US = 2000.0


@dataclass
class Cell:
    """One thing to time: a compiled kernel and the argument lists it takes in turn."""

    name: str
    kernel: Callable[..., None]
    arguments: Iterator[list[Any]]
    bytes_read: int
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

    def line(self) -> str:
        middle = median(self.us)
        return f"{self.name:34} {middle:10.1f} {min(self.us):10.1f} {self.bytes_read / middle / 1e3:8.1f}"


def tensor(array: NDArray[Any]) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


def floats(*shape: int) -> Any:
    return tensor(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def zeros(*shape: int) -> Any:
    return tensor(np.zeros(shape, np.float32))


def build_all(kernels: dict[str, Any]) -> dict[str, Callable[..., None]]:
    cpu = tvm.target.codegen.llvm_get_system_cpu()
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


def linear_prim_func(family: Any, kind: str, rows: int, outputs: int, inputs: int) -> Any:
    if kind.startswith("q"):
        return family.linear_block(rows, outputs, inputs, int(kind[1]))
    return getattr(family, f"linear_{kind}")(rows, outputs, inputs, 2)


def linear_cells(family: Any, kind: str, rows_list: list[int], shapes: list[str]) -> Iterator[Cell]:
    for outputs, inputs in (tuple(map(int, shape.split("x"))) for shape in shapes):
        name = f"{kind} {outputs}x{inputs}"
        weight = packed_weight(family, kind, outputs, inputs)
        weight_bytes = sum(w.nbytes for w in weight)
        copies = [[tensor(w) for w in weight] for _ in range(-(-COLD_BYTES // weight_bytes))]
        kernels = build_all({f"m{m}": linear_prim_func(family, kind, m, outputs, inputs) for m in rows_list})
        scale = [] if kind.startswith("q") else [floats(outputs)]
        for rows in rows_list:
            x = np.random.default_rng(2).normal(size=(rows, inputs)).astype(np.float32)
            planes, row_scale, offset = (tensor(a) for a in quantise.quantise_rows_numpy(x))
            start = [planes, row_scale] if kind.startswith("q") else [planes, row_scale, offset]
            end = [*scale, zeros(rows, outputs)]
            arguments = itertools.cycle([[*start, *copy, *end] for copy in copies])
            yield Cell(f"{name} M={rows}", kernels[f"m{rows}"], arguments, weight_bytes)


def other_cells() -> Iterator[Cell]:
    kernels, sizes = {}, (HEADS, KV_HEADS, HEAD_DIM, CAPACITY)
    for m in ROWS:
        kernels[f"attend at {POSITION} M={m}"] = attention.attend(m, *sizes, HEAD_DIM**-0.5)
        kernels[f"rope_append M={m}"] = attention.rope_append(m, *sizes)
        kernels[f"rms_norm {HIDDEN} M={m}"] = normalise.rms_norm(m, HIDDEN, 1e-5)
        kernels[f"silu_mul {INNER} M={m}"] = activation.silu_mul(m, INNER)
        kernels[f"add {HIDDEN} M={m}"] = activation.add(m, HIDDEN)
        kernels[f"quantise_rows {HIDDEN} M={m}"] = quantise.quantise_rows(m, HIDDEN)
        kernels[f"quantise_rows {INNER} M={m}"] = quantise.quantise_rows(m, INNER)
    compiled = build_all({name.replace(" ", "_").replace("=", ""): f for name, f in kernels.items()})
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


def stream_cell() -> Cell:
    kernel = build_all({"stream": stream_read()})["stream"]
    y = tensor(np.zeros((STREAM_ROWS, 16), np.int32))
    parts = [[tensor(np.ones((STREAM_ROWS, STREAM_COLUMNS), np.int32)), y] for _ in range(STREAM_PARTS)]
    return Cell("plain read of memory", kernel, itertools.cycle(parts), COLD_BYTES // STREAM_PARTS)


def run(cells: list[Cell], rounds: int) -> None:
    for cell in cells:
        cell.warm_up()
    for _ in range(rounds):
        for cell in cells:
            cell.time_once()
    for cell in cells:
        print(cell.line(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="avx512_vnni", choices=["avx512_vnni", "portable"])
    parser.add_argument("--only", nargs="*", default=["int8", "int4", "q4_0", "q8_0", "other"])
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="outputs x inputs")
    options = parser.parse_args()
    family = import_module(f"engram_compilers.kernels.{options.family}")
    print(f"{'kernel, M rows':34} {'us median':>10} {'us best':>10} {'GB/s':>8}")
    for kind in options.only:
        made = other_cells() if kind == "other" else linear_cells(family, kind, options.rows, options.shapes)
        run([stream_cell(), *made], options.rounds)


if __name__ == "__main__":
    main()
