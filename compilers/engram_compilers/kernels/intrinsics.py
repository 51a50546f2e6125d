"""LLVM intrinsics and vector helpers: the only file that knows an intrinsic by name.

Vectors have 16 lanes; LLVM splits them where the machine has shorter ones. Every sum of products
that matters goes through `fma`, so that no compiler is free to choose between one rounding and two.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.loops import LANES

Expr = Any  # a TVM expression

_LOG2_E = 1.44269504088896341
_LN2_HIGH = 0.693359375  # exact in 10 bits: step * _LN2_HIGH has no rounding error
_LN2_LOW = -2.12194440e-4
_LARGEST_16 = 65504.0  # finite float16
_EXP_LOWEST = -87.33  # below, the result would be subnormal: 0 is returned
_EXP_HIGHEST = 88.37  # above, 2**step would not be finite
# exp(r) = 1 + r + r^2 * poly(r) on |r| <= ln(2)/2, highest power first (Cephes expf).
_EXP_POLY = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def lanes(start: Expr, count: int = LANES) -> Expr:
    """Index ``count`` neighbouring elements from ``start``."""
    return T.ramp(start, 1, count)


def splat(value: Expr, count: int = LANES) -> Expr:
    """Repeat a scalar in every lane; a Python float or int becomes float32 or int32."""
    if isinstance(value, float):
        value = T.float32(value)
    elif isinstance(value, int):
        value = T.int32(value)
    return T.broadcast(value, count)


def new_lanes(dtype: str) -> Expr:
    """Allocate one vector of 16 lanes that LLVM can keep in a register, if all its indices are constants.

    That is what a buffer of scope "global" under 1 KiB becomes. One by `alloc_local` is memory: `scratch_memory.c`
    gives it a place on its thread's own stack, and every use loads and stores.
    """
    return T.alloc_buffer((LANES,), dtype)


def converted(value: Expr, dtype: str, count: int = LANES) -> Expr:
    """Return ``count`` numbers in another dtype: exact when widened, to the nearest (even) when narrowed.

    A float16 of what is beyond its largest is that, not infinite; a nan stays one.
    """
    wanted = dtype if count == 1 else f"{dtype}x{count}"
    if value.ty.dtype == wanted:
        return value
    return T.cast(_within_float16(value, count) if dtype == "float16" else value, wanted)


def _within_float16(value: Expr, count: int) -> Expr:
    low, high = (T.float32(bound) if count == 1 else splat(bound, count) for bound in (-_LARGEST_16, _LARGEST_16))
    return let(value, lambda x: T.Select(x > high, high, T.Select(x < low, low, x)))


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """Return a*b + c with one rounding, on float32 scalars or vectors of one length."""
    return T.call_llvm_pure_intrin(a.ty.dtype, "llvm.fma", a, b, c)


def dot4_vnni(total: Expr, weights: Expr, activations: Expr) -> Expr:
    """Add four products to each lane: total[i] += sum_b weights[4i+b] * activations[4i+b].

    ``total`` is int32x16, ``weights`` uint8x64 (unsigned), ``activations`` int8x64 (signed); no saturation.
    """
    return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, weights, activations)


def dot4_avx_vnni(total: Expr, weights: Expr, activations: Expr) -> Expr:
    """Do what `dot4_vnni` does, in two vectors of 256 bits; LLVM writes it as AVX-VNNI or as AVX512-VL."""
    name = "llvm.x86.avx512.vpdpbusd.256"
    return _in_parts(2, lambda *parts: T.call_llvm_pure_intrin("int32x8", name, *parts), total, weights, activations)


def dot4_avx2(total: Expr, weights: Expr, activations: Expr) -> Expr:
    """Do what `dot4_vnni` does, by products of 16 bits: those of 8 bits that AVX2 has would saturate."""
    wide = T.Bind(T.reinterpret("uint16x32", weights))
    even = T.bitwise_and(wide, T.broadcast(T.uint16(255), 32))
    odd = T.shift_right(wide, T.broadcast(T.uint16(8), 32))
    signed = T.Bind(T.reinterpret("int16x32", activations))
    byte = T.broadcast(T.int16(8), 32)
    for part, factor in ((even, T.shift_right(T.shift_left(signed, byte), byte)), (odd, T.shift_right(signed, byte))):
        total = total + _in_parts(2, pair_sums_avx2, T.reinterpret("int16x32", part), factor)
    return total


def pair_sums_avx2(a: Expr, b: Expr) -> Expr:
    """Return int32x8, the sums of two neighbouring products of int16x16 vectors."""
    return T.call_llvm_pure_intrin("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)


def byte_pair_sums_avx2(unsigned: Expr, signed: Expr) -> Expr:
    """Return int16x16, the sums of two neighbouring products of uint8x32 and int8x32; they saturate at 16 bits."""
    return T.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.pmadd.ub.sw", unsigned, signed)


def dot4_sdot(total: Expr, weights: Expr, activations: Expr) -> Expr:
    """Do what `dot4_vnni` does with signed ``weights``, in four vectors of 128 bits."""
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
    return _in_parts(4, lambda *parts: T.call_llvm_pure_intrin("int32x4", name, *parts), total, weights, activations)


def multiply_usmmla(total: Expr, weights: Expr, activations: Expr) -> Expr:
    """Add eight products to each lane: total[2i+j] += sum_b weights[8i+b] * activations[8j+b].

    ``total`` is int32x16, ``weights`` uint8x64 (unsigned), ``activations`` int8x16 (signed); four instructions.
    """
    name = "llvm.aarch64.neon.usmmla.v4i32.v16i8"

    def matrix(total: Expr, weights: Expr) -> Expr:
        return T.call_llvm_pure_intrin("int32x4", name, total, weights, activations)

    return _in_parts(4, matrix, total, weights)


def _in_parts(count: int, operation: Callable[..., Expr], *vectors: Expr) -> Expr:
    """Return the joined results of an operation on each of ``count`` equal parts of its operands."""
    vectors = tuple(T.Bind(vector) for vector in vectors)

    def part(vector: Expr, index: int) -> Expr:
        size = vector.ty.dtype.lanes // count
        return T.Shuffle([vector], list(range(index * size, (index + 1) * size)))

    results = [operation(*(part(vector, i) for vector in vectors)) for i in range(count)]
    return T.Shuffle(results, list(range(LANES)))


def prefetch(buffer: Expr, *indices: Expr) -> None:
    """Ask for the cache line of ``buffer[indices]``; an address past the end is harmless."""
    read, keep_in_l2, data = T.int32(0), T.int32(2), T.int32(1)
    address = T.address_of(buffer[indices])
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, read, keep_in_l2, data))


def let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Evaluate ``value`` once and use it several times in ``body``."""
    var = tirx.Var("value", value.ty)
    return tirx.Let(var, value, body(var))


def halves(vector: Expr, count: int) -> tuple[Expr, Expr]:
    """Split a vector of ``count`` lanes into its lower and upper half."""
    middle = count // 2
    return T.Shuffle([vector], list(range(middle))), T.Shuffle([vector], list(range(middle, count)))


def lane_fold(vector: Expr, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine 16 lanes to a scalar in one fixed tree: lane i with i+8, then i+4, i+2, i+1."""

    def fold(part: Expr, count: int) -> Expr:
        if count == 1:
            return part
        return let(combine(*halves(part, count)), lambda half: fold(half, count // 2))

    return let(vector, lambda whole: fold(whole, LANES))


def lane_sum(vector: Expr) -> Expr:
    """Add 16 lanes in the tree of `lane_fold`."""
    return lane_fold(vector, lambda a, b: a + b)


def lane_max(vector: Expr) -> Expr:
    """Return the largest of 16 lanes."""
    return lane_fold(vector, T.max)


def lane_sums(vectors: Sequence[Expr]) -> Expr:
    """Add up each of 16 vectors in the tree of `lane_fold`; lane i of the result is the sum of vector i.

    Each level merges two vectors of partial sums into one, so 16 sums cost 15 additions, not 64.
    """

    def merge(a: Expr, b: Expr, width: int) -> Expr:
        lower = [first + i for first in range(0, 2 * LANES, width) for i in range(width // 2)]
        upper = [index + width // 2 for index in lower]
        return let(a, lambda a: let(b, lambda b: T.Shuffle([a, b], lower) + T.Shuffle([a, b], upper)))

    width = LANES
    while width > 1:
        vectors = [merge(a, b, width) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        width //= 2
    return vectors[0]


def transposed(vectors: Sequence[Expr]) -> list[Expr]:
    """Return 16 vectors of which vector i holds lane i of each of the 16 given; every step is bound."""

    def swapped(first: Expr, second: Expr, width: int) -> tuple[Expr, Expr]:
        """Swap the lanes of ``first`` whose index has bit ``width`` with those of ``second`` that lack it."""
        keep = [lane + (LANES - width) * bool(lane & width) for lane in range(LANES)]
        take = [lane + width + (LANES - width) * bool(lane & width) for lane in range(LANES)]
        return T.Bind(T.Shuffle([first, second], keep)), T.Bind(T.Shuffle([first, second], take))

    rows = list(vectors)
    for width in (8, 4, 2, 1):
        for row in (row for row in range(LANES) if not row & width):
            rows[row], rows[row + width] = swapped(rows[row], rows[row + width], width)
    return rows


def power_of_two(step: Expr) -> Expr:
    """Return 2**step for whole float32x16 steps in -126..127, by writing the exponent bits."""
    exponent = T.cast(step, "int32x16") + splat(127)
    return T.reinterpret("float32x16", T.shift_left(exponent, splat(23)))


def exp16(x: Expr) -> Expr:
    """Return exp(x) on float32x16 to about 1 ulp; 0 below -87.33 (also for -inf), exp(88.37) above 88.37.

    exp(x) = 2**n * exp(r) with n = nearbyint(x * log2(e)) and r = x - n*ln(2), ln(2) in two parts.
    """

    def scaled(step: Expr, r: Expr) -> Expr:
        poly = splat(_EXP_POLY[0])
        for coefficient in _EXP_POLY[1:]:
            poly = fma(poly, r, splat(coefficient))
        return (fma(poly, r * r, r) + splat(1.0)) * power_of_two(step)

    def reduced(clamped: Expr, step: Expr) -> Expr:
        rest = fma(step, splat(-_LN2_LOW), fma(step, splat(-_LN2_HIGH), clamped))
        return let(rest, lambda r: scaled(step, r))

    def clamp_and_reduce(value: Expr) -> Expr:
        clamped = T.min(T.max(value, splat(_EXP_LOWEST)), splat(_EXP_HIGHEST))
        return let(clamped, lambda c: let(T.nearbyint(c * splat(_LOG2_E)), lambda step: reduced(c, step)))

    return let(x, lambda value: T.Select(value >= splat(_EXP_LOWEST), clamp_and_reduce(value), splat(0.0)))


# AMX tiles: registers 0..7 that hold up to 16 rows of 64 bytes each, in a shape their thread has given them.

TILE_ROWS, TILE_BYTES = 16, 64


def shape_tiles(shapes: Sequence[tuple[int, int]]) -> None:
    """Give the running thread's tiles their (rows, bytes of a row), one after the other, and zero them."""
    config = bytearray(64)
    config[0] = 1  # the one palette there is
    for tile, (rows, row_bytes) in enumerate(shapes):
        config[16 + 2 * tile], config[48 + tile] = row_bytes, rows
    words = T.alloc_buffer((16,), "int32")
    for i in range(16):
        T.buffer_store(words, int.from_bytes(config[4 * i : 4 * i + 4], "little"), [i])
    _tile_instruction("ldtilecfg", T.address_of(words[0]))


def release_tiles() -> None:
    """Give the running thread's tiles back, so that the system need not keep them."""
    _tile_instruction("tilerelease")


def zero_tile(tile: int) -> None:
    """Fill a tile with zeros."""
    _tile_instruction("tilezero", T.uint8(tile))


def load_tile(tile: int, buffer: Expr, indices: Sequence[Expr], row_bytes: int) -> None:
    """Load a tile whose first row begins at ``buffer[indices]`` and whose rows are ``row_bytes`` apart."""
    _tile_instruction("tileloadd64", T.uint8(tile), T.address_of(buffer[tuple(indices)]), T.int64(row_bytes))


def store_tile(tile: int, buffer: Expr, indices: Sequence[Expr], row_bytes: int) -> None:
    """Store a tile to where `load_tile` would load it from."""
    _tile_instruction("tilestored64", T.uint8(tile), T.address_of(buffer[tuple(indices)]), T.int64(row_bytes))


def dot_tiles(sums: int, activations: int, weights: int) -> None:
    """sums[m, n] += sum over k and b of activations[m, 4k + b] (int8) * weights[k, 4n + b] (uint8), as int32."""
    _tile_instruction("tdpbsud", T.uint8(sums), T.uint8(activations), T.uint8(weights))


def _tile_instruction(name: str, *operands: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("int32", f"llvm.x86.{name}", *operands))
