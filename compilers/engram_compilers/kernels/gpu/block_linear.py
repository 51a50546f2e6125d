# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers on weights of blocks with a float32 scale each, as GGUF's Q4_0 and Q8_0 have them."""

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, LANES, fma, quads
from engram_compilers.kernels.gpu.linear import add_to_all, each_nibble, joined
from engram_compilers.kernels.gpu.packing import CHUNK, TILE, tiles_of
from engram_compilers.kernels.gpu.products import MOST_ROWS, PARTS, Place, each_chunk, finish, four_sums, zeros
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import largest_divisor, round_up
from engram_compilers.kernels.packing import BLOCK_BIAS, GROUP, require_bits, require_groups, require_indexable
from engram_compilers.kernels.quantise import MOST_PLANES, PLANE_MULTIPLE


def linear_block(rows: int, out_features: int, in_features: int, bits: int) -> tirx.PrimFunc:
    """Build the linear layer on Q4_0 (4 bits) or Q8_0 (8 bits) weights, packed by `packing.pack_block`.

    ``(planes i8 [2M, Kp], row_scale f32 [M], codes u8 [Np/32, Kp*bits/128, 32, 16], block_scale f32 [Np/32, Kp/32, 32])
    -> y f32 [M, N]``; the weight is (code - 8 or 128) * block_scale.
    Order: part p of 8 takes groups p, p + 8, ... ascending, o = fma(256 * f32(H) + f32(L), block_scale, o) with the
    int32 sums H and L of the group; the parts are added ascending; y is the sum times row_scale.
    """
    padded, tiles = round_up(in_features, PLANE_MULTIPLE), tiles_of(out_features)
    together = largest_divisor(rows, MOST_ROWS)
    require_bits(bits)
    require_groups(in_features)
    require_indexable("the weight", tiles * TILE, padded)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        codes: T.Buffer((tiles, padded * bits // 8 // CHUNK, TILE, CHUNK), "uint8"),
        block_scale: T.Buffer((tiles, padded // GROUP, TILE), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for block in blocks.blocks(rows // together, "y"):
                for tile in blocks.blocks(tiles):
                    for part in blocks.threads(PARTS, "y"):
                        for lane in blocks.threads(TILE):
                            _linear_block(
                                Place(tile, block * together, together, lane, part),
                                planes,
                                row_scale,
                                codes,
                                block_scale,
                                y,
                                bits,
                            )

    return kernel


def _linear_block(
    place: Place, planes: Expr, row_scale: Expr, codes: Expr, block_scale: Expr, y: Expr, bits: int
) -> None:
    rows = int(y.shape[0])
    totals = zeros(place.count, "float32")

    def load(chunk: Expr, quad: Expr) -> Expr:
        return codes[place.tile, chunk, place.lane, quads(quad)]

    def add_group(group: Expr) -> None:
        sums = zeros(place.count * MOST_PLANES * LANES, "int32")

        def add(codes: Expr, column: Expr) -> None:
            bias = T.broadcast(T.int32(BLOCK_BIAS[bits]), LANES)
            add_to_all(place, sums, T.Bind(codes - bias), planes, rows, column)

        each_nibble(group, load, add) if bits == 4 else _each_byte(group, load, add)
        scale = T.Bind(block_scale[place.tile, group, place.lane])
        for row in range(place.count):
            parts = [four_sums(sums, row * MOST_PLANES + plane) for plane in range(MOST_PLANES)]
            T.buffer_store(totals, fma(joined(parts), scale, totals[row]), [row])

    def store(row: Expr, sums: Sequence[Expr]) -> None:
        with T.If(place.output < y.shape[1]), T.Then():
            T.buffer_store(y, sums[0] * row_scale[row], [row, place.output])

    each_chunk(int(planes.shape[1]) // GROUP, place.part, add_group)
    finish(place, [totals[row] for row in range(place.count)], "float32", store)


def _each_byte(group: Expr, load: Callable[[Expr, Expr], Expr], add: Callable[[Expr, Expr], None]) -> None:
    """Emit add(four codes as int32x4, their first column) for the codes of a group of 32, eight bits each."""
    with T.serial(GROUP // LANES) as quad:
        chunk, byte = group * (GROUP // CHUNK) + quad * LANES // CHUNK, quad * LANES % CHUNK
        add(T.Bind(T.cast(load(chunk, byte), f"int32x{LANES}")), T.Bind(group * GROUP + quad * LANES))
