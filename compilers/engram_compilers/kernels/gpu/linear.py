# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers on quantised weights, and the int8 embedding.

The functions are those of `engram_compilers.kernels.portable`, with weights as `packing` lays them out and no plane
offsets. Integer sums are exact, so `linear_int8` and `linear_int4` have the bits of that family.
"""

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, LANES, fma, own_columns, quads
from engram_compilers.kernels.gpu.packing import CHUNK, TILE, tiles_of
from engram_compilers.kernels.gpu.products import (
    MOST_ROWS,
    PARTS,
    Place,
    add_products,
    each_chunk,
    finish,
    four_sums,
    zeros,
)
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import largest_divisor, round_up
from engram_compilers.kernels.packing import GROUP, require_groups, require_indexable
from engram_compilers.kernels.quantise import PLANE_MULTIPLE


def linear_int8(rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build the linear layer on int8 weights, packed by `packing.pack_int8`; ``planes`` (P) is 1 or 2.

    ``(planes i8 [P*M, Kp], row_scale f32 [M], weight i8 [Np/32, Kp/16, 32, 16], channel_scale f32 [N])
    -> y f32 [M, N]``: y[m, n] = (f32(S) * channel_scale[n]) * row_scale[m] of one plane,
    ((256 * f32(H) + f32(L)) * channel_scale[n]) * row_scale[m] of two; S, H and L are int32 sums of products.
    """
    padded, tiles, count = round_up(in_features, PLANE_MULTIPLE), tiles_of(out_features), planes
    together = largest_divisor(rows, MOST_ROWS)
    require_indexable("the weight", tiles * TILE, padded)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((count * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        weight: T.Buffer((tiles, padded // CHUNK, TILE, CHUNK), "int8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for block in blocks.blocks(rows // together, "y"):
                for tile in blocks.blocks(tiles):
                    for part in blocks.threads(PARTS, "y"):
                        for lane in blocks.threads(TILE):
                            _linear_int8(
                                Place(tile, block * together, together, lane, part),
                                planes,
                                row_scale,
                                weight,
                                channel_scale,
                                y,
                            )

    return kernel


def _linear_int8(place: Place, planes: Expr, row_scale: Expr, weight: Expr, channel_scale: Expr, y: Expr) -> None:
    rows = int(y.shape[0])
    sums = int8_sums(place, planes, rows, lambda chunk, quad: weight[place.tile, chunk, place.lane, quads(quad)])
    _finish_integers(place, sums, row_scale, channel_scale, y)


def int8_sums(place: Place, planes: Expr, rows: int, load: Callable[[Expr, Expr], Expr]) -> Sequence[Expr]:
    """Return the thread's sums of products, of each row and plane; ``load(chunk, first byte)`` is four weights."""
    count = int(planes.shape[0]) // rows
    sums = zeros(place.count * count * LANES, "int32")

    def add_chunk(chunk: Expr) -> None:
        with T.serial(CHUNK // LANES) as quad:
            weights = T.Bind(T.cast(load(chunk, quad * LANES), f"int32x{LANES}"))
            column = T.Bind(chunk * CHUNK + quad * LANES)
            add_to_all(place, sums, weights, planes, rows, column)

    each_chunk(int(planes.shape[1]) // CHUNK, place.part, add_chunk)
    return [four_sums(sums, index) for index in range(place.count * count)]


def add_to_all(place: Place, sums: Expr, weights: Expr, planes: Expr, rows: int, column: Expr) -> None:
    """Add four weights' products with four columns to the sums of each row and plane."""
    count = int(planes.shape[0]) // rows
    for row in range(place.count):
        for plane in range(count):
            activations = planes[plane * rows + place.first_row + row, quads(column)]
            add_products(sums, row * count + plane, weights, activations)


def joined(sums: Sequence[Expr]) -> Expr:
    """Return f32(S) of the int32 sum of one plane, 256 * f32(H) + f32(L) of two."""
    *high, low = (T.cast(part, "float32") for part in sums)
    return fma(high[0], T.float32(256.0), low) if high else low


def _finish_integers(place: Place, sums: Sequence[Expr], row_scale: Expr, channel_scale: Expr, y: Expr) -> None:
    def store(row: Expr, totals: Sequence[Expr]) -> None:
        with T.If(place.output < y.shape[1]), T.Then():
            T.buffer_store(y, joined(totals) * channel_scale[place.output] * row_scale[row], [row, place.output])

    finish(place, sums, "int32", store)


def linear_int4(rows: int, out_features: int, in_features: int, planes: int) -> tirx.PrimFunc:
    """Build `linear_int8` for two-level int4 weights, packed by `packing.pack_int4`.

    ``(planes i8 [P*M, Kp], row_scale f32 [M], codes u8 [Np/32, Kp/32, 32, 16], header u8 [Np/32, Kp/32, 32],
    channel_scale f32 [N]) -> y f32 [M, N]``; the int8 weight is (code - zero) * multiplier.
    """
    padded, tiles, count = round_up(in_features, PLANE_MULTIPLE), tiles_of(out_features), planes
    together = largest_divisor(rows, MOST_ROWS)
    require_groups(in_features)
    require_indexable("the weight", tiles * TILE, padded)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((count * rows, padded), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        codes: T.Buffer((tiles, padded // GROUP, TILE, CHUNK), "uint8"),
        header: T.Buffer((tiles, padded // GROUP, TILE), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for block in blocks.blocks(rows // together, "y"):
                for tile in blocks.blocks(tiles):
                    for part in blocks.threads(PARTS, "y"):
                        for lane in blocks.threads(TILE):
                            _linear_int4(
                                Place(tile, block * together, together, lane, part),
                                planes,
                                row_scale,
                                codes,
                                header,
                                channel_scale,
                                y,
                            )

    return kernel


def _linear_int4(
    place: Place, planes: Expr, row_scale: Expr, codes: Expr, header: Expr, channel_scale: Expr, y: Expr
) -> None:
    sums = int4_sums(
        place,
        planes,
        int(y.shape[0]),
        lambda group, quad: codes[place.tile, group, place.lane, quads(quad)],
        lambda group: header[place.tile, group, place.lane],
    )
    _finish_integers(place, sums, row_scale, channel_scale, y)


def int4_sums(
    place: Place, planes: Expr, rows: int, load: Callable[[Expr, Expr], Expr], header_of: Callable[[Expr], Expr]
) -> Sequence[Expr]:
    """Return the thread's sums of products, of each row and plane; ``load(group, first byte)`` is four of codes."""
    count = int(planes.shape[0]) // rows
    sums = zeros(place.count * count * LANES, "int32")

    def add_group(group: Expr) -> None:
        header = T.Bind(T.cast(header_of(group), "int32"))
        multiplier = T.Bind(T.broadcast(T.bitwise_and(header, 15) + 1, LANES))
        zero = T.Bind(T.broadcast(T.shift_right(header, 4), LANES))

        def add(codes: Expr, column: Expr) -> None:
            add_to_all(place, sums, T.Bind((codes - zero) * multiplier), planes, rows, column)

        each_nibble(group, load, add)

    each_chunk(int(planes.shape[1]) // GROUP, place.part, add_group)
    return [four_sums(sums, index) for index in range(place.count * count)]


def each_nibble(group: Expr, load: Callable[[Expr, Expr], Expr], add: Callable[[Expr, Expr], None]) -> None:
    """Emit add(four codes as int32x4, their first column) for the codes of a group of 32, four bits each."""
    with T.serial(CHUNK // LANES) as quad:
        both = T.Bind(T.cast(load(group, quad * LANES), f"int32x{LANES}"))
        low = T.Bind(T.bitwise_and(both, T.broadcast(T.int32(15), LANES)))
        add(low, T.Bind(group * GROUP + quad * LANES))
        high = T.Bind(T.shift_right(both, T.broadcast(T.int32(4), LANES)))
        add(high, T.Bind(group * GROUP + CHUNK + quad * LANES))


def embed_int8(tokens: int, vocabulary: int, columns: int) -> tirx.PrimFunc:
    """Build ``(token_ids i64 [T], weight i8 [Vp/32, Dp/16, 32, 16], channel_scale f32 [V]) -> x f32 [T, D]``.

    x[t, d] = weight of id and d * channel_scale[id]. Ids must be in 0..V-1: the runtime checks them.
    """
    padded, tiles = round_up(columns, PLANE_MULTIPLE), tiles_of(vocabulary)
    require_indexable("the embedding", tiles * TILE, padded)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        token_ids: T.Buffer((tokens,), "int64"),
        weight: T.Buffer((tiles, padded // CHUNK, TILE, CHUNK), "int8"),
        channel_scale: T.Buffer((vocabulary,), "float32"),
        x: T.Buffer((tokens, columns), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for token in blocks.blocks(tokens):
                for thread in blocks.threads():
                    _embed(token_ids, weight, channel_scale, x, token, thread)

    return kernel


def _embed(token_ids: Expr, weight: Expr, channel_scale: Expr, x: Expr, token: Expr, thread: Expr) -> None:
    row = T.Bind(T.cast(token_ids[token], "int32"))
    with own_columns(int(x.shape[1]), thread) as (_, column):
        value = weight[row // TILE, column // CHUNK, row % TILE, column % CHUNK]
        T.buffer_store(x, T.cast(value, "float32") * channel_scale[row], [token, column])
