# mypy: disable-error-code="valid-type, untyped-decorator"
"""Linear layers for x86 with AVX512-VNNI: 16 outputs to a vector, four products to a lane.

A *tile* is 16 output features; a tile group shares each activation it loads, a row block shares each weight
vector. Row blocks run inside the tile group, so a call reads its weights from memory once. Sums of products are
integers, exact in any order: the bits depend neither on the blocking nor on the family (see `portable`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, dot4_vnni, fma, lanes, prefetch, splat
from engram_compilers.kernels.loops import LANES, loop_over, round_up
from engram_compilers.kernels.packing import (
    BLOCK_BIAS,
    GROUP,
    INT8_BIAS,
    Arrays,
    Bytes,
    Scalar,
    int4_header,
    pad,
    require_bits,
    require_groups,
    require_indexable,
)
from engram_compilers.kernels.quantise import PLANE_MULTIPLE

VECTOR_BYTES = 64
_GROUP_STEPS = GROUP // 4  # weight vectors of a tile in a group
_MOST_ROWS = 4  # rows that share a load of a weight vector
_COMPUTE_BOUND_ROWS = 16  # from here on memory does not set the time
_UNROLLED = 4  # weight vectors per turn of the int8 loop
_WEIGHTS_PER_US = 25_000.0  # from memory
_PRODUCTS_PER_US = 100_000.0  # of a weight and a 16-bit activation
_EMBEDDED_PER_US = 1000.0


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one linear layer is cut into tile groups and row blocks."""

    rows: int
    out_features: int
    in_features: int

    @property
    def padded_inputs(self) -> int:
        return round_up(self.in_features, PLANE_MULTIPLE)

    @property
    def groups(self) -> int:
        return self.padded_inputs // GROUP

    @property
    def tiles(self) -> int:
        return round_up(self.out_features, LANES) // LANES

    @property
    def edge_lanes(self) -> int:
        """Outputs in the last tile, 0 if it is full."""
        return self.out_features % LANES

    @property
    def block_rows(self) -> int:
        return min(self.rows, _MOST_ROWS)

    @property
    def group_tiles(self) -> int:
        """Tiles that share a load of an activation: more hide latency, one streams memory best. Measured."""
        if self.rows == 1:
            return 8
        return 2 if self.rows == 2 or self.rows >= _COMPUTE_BOUND_ROWS else 1

    @property
    def work_us(self) -> float:
        weights = self.out_features * self.in_features
        return max(weights / _WEIGHTS_PER_US, self.rows * weights / _PRODUCTS_PER_US)


def pack_int8(weight: Bytes) -> Arrays:
    """Pack weights stored as value + 128, ``[N, K]``, for `linear_int8` and `embed_int8`.

    Returns:
        weight: ``[Np/16, Kp/4, 64]``, N and K rounded up to 16 and 64; byte 4i + b of vector (t, s) is
            output 16t + i, input 4s + b.
    """
    return {"weight": _tile(pad(weight, LANES, PLANE_MULTIPLE, INT8_BIAS))}


def pack_int4(codes: Bytes, multiplier: Bytes, zero: Bytes) -> Arrays:
    """Pack ``codes [N, K]`` 0..15 with ``multiplier`` 1..16 and ``zero`` 0..15 ``[N, K/32]`` for `linear_int4`.

    Returns:
        codes: ``[Np/16, Kp/8, 64]``; byte 4i + b of vector (t, s) is output 16t + i, inputs 8s + b (low nibble)
            and 8s + 4 + b (high nibble).
        header: ``[Np/16, Kp/32, 16]``, (multiplier - 1) | zero << 4.

    Raises:
        CompileError: K is not a multiple of 32, or a group's weights do not fit int8.
    """
    require_groups(codes.shape[1])
    header = pad(int4_header(multiplier, zero), LANES, PLANE_MULTIPLE // GROUP)
    return {"codes": _tile_nibbles(pad(codes, LANES, PLANE_MULTIPLE)), "header": _tile_groups(header)}


def pack_block(codes: Bytes, block_scale: NDArray[np.float32], bits: int) -> Arrays:
    """Pack Q4_0 or Q8_0 ``codes [N, K]`` (value + 8 or 128) with ``block_scale [N, K/32]`` for `linear_block`.

    Returns:
        codes: as `pack_int4` (4 bits) or `pack_int8` (8 bits) lay them out.
        block_scale: float32 ``[Np/16, Kp/32, 16]``.
    """
    require_bits(bits)
    require_groups(codes.shape[1])
    padded = pad(codes, LANES, PLANE_MULTIPLE, BLOCK_BIAS[bits])
    scale = pad(block_scale, LANES, PLANE_MULTIPLE // GROUP)
    return {"codes": _tile_nibbles(padded) if bits == 4 else _tile(padded), "block_scale": _tile_groups(scale)}


def _tile(values: Bytes) -> Bytes:
    """[N, K] -> [N/16, K/4, 64]: four inputs of 16 outputs to a vector."""
    outputs, inputs = values.shape
    tiled = values.reshape(outputs // LANES, LANES, inputs // 4, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiled).reshape(outputs // LANES, inputs // 4, VECTOR_BYTES)


def _tile_nibbles(codes: Bytes) -> Bytes:
    """[N, K] -> [N/16, K/8, 64]: two neighbouring vectors of `_tile` to one, the first in the low nibbles."""
    vectors = _tile(codes)
    return vectors[:, ::2] | (vectors[:, 1::2] << np.uint8(4))


def _tile_groups(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """[N, G] -> [N/16, G, 16]."""
    outputs, groups = values.shape
    return np.ascontiguousarray(values.reshape(outputs // LANES, LANES, groups).transpose(0, 2, 1))


def _four_activations(planes: Expr, plane_row: Expr, step: Expr) -> Expr:
    """Repeat planes[plane_row, 4*step : 4*step + 4] in every lane, as int8x64."""
    four = T.reinterpret("int32", planes[plane_row, lanes(step * 4, 4)])
    return T.reinterpret("int8x64", T.broadcast(four, LANES))


def _joined(high: Expr, low: Expr) -> Expr:
    """Return 256 * f32(high) + f32(low); the product is exact, so there is one rounding."""
    return fma(T.cast(high, "float32x16"), splat(256.0), T.cast(low, "float32x16"))


def _low_nibbles(codes: Expr) -> Expr:
    return T.bitwise_and(codes, T.broadcast(T.uint8(15), VECTOR_BYTES))


def _high_nibbles(codes: Expr) -> Expr:
    return T.shift_right(codes, T.broadcast(T.uint8(4), VECTOR_BYTES))


def _pairs(header: Expr) -> Expr:
    """Repeat each of 16 header bytes in both 16-bit halves of its lane, as uint16x32."""
    wide = T.cast(header, "int32x16")
    return T.reinterpret("uint16x32", T.bitwise_or(wide, T.shift_left(wide, splat(16))))


def _multiplier(header: Expr) -> Expr:
    """Return each channel's multiplier twice, as uint16x32."""
    return T.bitwise_and(_pairs(header), T.broadcast(T.uint16(15), 32)) + T.broadcast(T.uint16(1), 32)


def _zero_bytes(header: Expr) -> Expr:
    """Return zero * multiplier - 128 (mod 256) in the four bytes of each channel, as uint8x64."""
    scaled = T.shift_right(_pairs(header), T.broadcast(T.uint16(4), 32)) * _multiplier(header)  # at most 225
    both = T.bitwise_or(scaled, T.shift_left(scaled, T.broadcast(T.uint16(8), 32)))
    return T.bitwise_xor(T.reinterpret("uint8x64", both), T.broadcast(T.uint8(INT8_BIAS), VECTOR_BYTES))


def _biased_weights(nibbles: Expr, multiplier: Expr, zero_bytes: Expr) -> Expr:
    """Return (code - zero) * multiplier + 128 as uint8x64: a 16-bit lane scales its two codes without a carry."""
    scaled = T.reinterpret("uint16x32", nibbles) * multiplier
    return T.reinterpret("uint8x64", scaled) - zero_bytes


@dataclass(frozen=True, slots=True)
class _Block:
    """The part of a linear layer that is summed in registers: some rows times some tiles."""

    plan: _Plan
    first_row: Expr
    num_rows: int
    first_tile: Expr
    num_tiles: int
    is_first: bool = True  # of the row blocks of its tiles: the one that waits for memory

    def plane_row(self, plane: int, r: int) -> Expr:
        return plane * self.plan.rows + self.first_row + r

    def add_products(self, sums: Expr, t: int, planes: Expr, step: Expr, weights: Expr) -> None:
        """Add weights * activations of inputs 4*step..4*step+3 to the sums of tile ``t``, for both planes."""
        weights = T.Bind(weights)
        for plane, r in product(range(2), range(self.num_rows)):
            index = [plane, r, t, lanes(0)]
            activations = _four_activations(planes, self.plane_row(plane, r), step)
            T.buffer_store(sums, dot4_vnni(sums[index], weights, activations), index)


def _each_tile_group(plan: _Plan, run: Callable[[Expr, int], None]) -> None:
    """Emit the outer loop: run(first_tile, num_tiles) for all output tiles."""
    whole, last_tiles = divmod(plan.tiles, plan.group_tiles)
    with loop_over(whole + (last_tiles > 0), plan.work_us) as group:
        if last_tiles == 0:
            run(group * plan.group_tiles, plan.group_tiles)
            return
        with T.If(group < whole):
            with T.Then():
                run(group * plan.group_tiles, plan.group_tiles)
            with T.Else():
                run(group * plan.group_tiles, last_tiles)


def _each_row_block(plan: _Plan, first_tile: Expr, num_tiles: int, run: Callable[[_Block], None]) -> None:
    """Emit the loop over the rows inside a tile group: run(block) for all row blocks."""
    whole, last_rows = divmod(plan.rows, plan.block_rows)
    run(_Block(plan, 0, plan.block_rows, first_tile, num_tiles))
    if whole > 1:
        with T.serial(1, whole) as index:
            run(_Block(plan, index * plan.block_rows, plan.block_rows, first_tile, num_tiles, is_first=False))
    if last_rows > 0:
        run(_Block(plan, plan.rows - last_rows, last_rows, first_tile, num_tiles, is_first=False))


def _start_sums(block: _Block, plane_offset: Expr) -> Expr:
    """Allocate int32 sums [2, rows, tiles, 16] that start at plane_offset."""
    sums = T.alloc_local((2, block.num_rows, block.num_tiles, LANES), "int32")
    for plane, r, t in product(range(2), range(block.num_rows), range(block.num_tiles)):
        T.buffer_store(sums, splat(plane_offset[block.plane_row(plane, r)]), [plane, r, t, lanes(0)])
    return sums


def _add_int8_products(block: _Block, sums: Expr, planes: Expr, weight: Expr, first_weight_tile: Expr) -> None:
    """Add all products with weights laid out [tiles, Kp/4, 64]; meanwhile the first block asks for the next tiles."""
    with T.serial(block.plan.padded_inputs // 4 // _UNROLLED) as turn:
        every = [
            (turn * _UNROLLED + u, first_weight_tile + t, t) for u in range(_UNROLLED) for t in range(block.num_tiles)
        ]
        for step, tile, t in every:
            block.add_products(sums, t, planes, step, weight[tile, step, lanes(0, VECTOR_BYTES)])
        # Prefetches go last: between the products they would keep LLVM from sharing loads.
        for step, tile, _ in every if block.is_first else ():
            prefetch(weight, tile + block.num_tiles, step, 0)


def _store(plan: _Plan, y: Expr, row: Expr, tile: Expr, value: Expr) -> None:
    """y[row, 16*tile + i] = value[i], only as many as there are outputs."""
    if plan.edge_lanes == 0:
        T.buffer_store(y, value, [row, lanes(tile * LANES)])
        return
    with T.If(tile < plan.out_features // LANES):
        with T.Then():
            T.buffer_store(y, value, [row, lanes(tile * LANES)])
        with T.Else():
            edge = T.alloc_local((LANES,), "float32")
            T.buffer_store(edge, value, [lanes(0)])
            for i in range(plan.edge_lanes):
                T.buffer_store(y, edge[i], [row, tile * LANES + i])


def _load_scale(plan: _Plan, channel_scale: Expr, tile: Expr) -> Expr:
    """Return the channel scales of a tile in a local buffer, zeros where there are no outputs."""
    scale = T.alloc_local((LANES,), "float32")
    if plan.edge_lanes == 0:
        T.buffer_store(scale, channel_scale[lanes(tile * LANES)], [lanes(0)])
        return scale
    with T.If(tile < plan.out_features // LANES):
        with T.Then():
            T.buffer_store(scale, channel_scale[lanes(tile * LANES)], [lanes(0)])
        with T.Else():
            T.buffer_store(scale, splat(0.0), [lanes(0)])
            for i in range(plan.edge_lanes):
                T.buffer_store(scale, channel_scale[tile * LANES + i], [i])
    return scale


def _store_sums(block: _Block, y: Expr, sums: Expr, channel_scale: Expr, row_scale: Expr) -> None:
    """y = ((256 * f32(H) + f32(L)) * channel_scale) * row_scale"""
    for t in range(block.num_tiles):
        scale = _load_scale(block.plan, channel_scale, block.first_tile + t)
        for r in range(block.num_rows):
            joined = _joined(sums[0, r, t, lanes(0)], sums[1, r, t, lanes(0)])
            row = block.first_row + r
            _store(block.plan, y, row, block.first_tile + t, joined * scale[lanes(0)] * splat(row_scale[row]))


def _each_nibble_vector(codes: Expr, tile: Expr, group: Expr, use: Callable[[Expr, Expr], None]) -> None:
    """Emit use(step, codes) for every 4 inputs of a group of packed nibbles."""
    for s in range(_GROUP_STEPS // 2):
        vector = T.Bind(codes[tile, group * (_GROUP_STEPS // 2) + s, lanes(0, VECTOR_BYTES)])
        use(group * _GROUP_STEPS + 2 * s, _low_nibbles(vector))
        use(group * _GROUP_STEPS + 2 * s + 1, _high_nibbles(vector))


def _each_byte_vector(codes: Expr, tile: Expr, group: Expr, use: Callable[[Expr, Expr], None]) -> None:
    """Emit use(step, codes) for every 4 inputs of a group of bytes."""
    for s in range(_GROUP_STEPS):
        step = group * _GROUP_STEPS + s
        use(step, codes[tile, step, lanes(0, VECTOR_BYTES)])


def _each_int4_vector(codes: Expr, header: Expr, tile: Expr, group: Expr, use: Callable[[Expr, Expr], None]) -> None:
    """Emit use(step, weights) for every 4 inputs of a group: (code - zero) * multiplier + 128 as uint8x64."""
    multiplier = T.Bind(_multiplier(header[tile, group, lanes(0)]))
    zero_bytes = T.Bind(_zero_bytes(header[tile, group, lanes(0)]))
    _each_nibble_vector(
        codes, tile, group, lambda step, nibbles: use(step, _biased_weights(nibbles, multiplier, zero_bytes))
    )


def _prefetch_group(codes: Expr, first_tile: Expr, num_tiles: int, group: Expr, group_vectors: int) -> None:
    """Ask for the code vectors of a group of some tiles."""
    for t, s in product(range(num_tiles), range(group_vectors)):
        prefetch(codes, first_tile + t, group * group_vectors + s, 0)


def linear_int8(rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build the linear layer on int8 weights, packed as `pack_int8` returns them.

    ``(planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M], weight u8 [Np/16, Kp/4, 64],
    channel_scale f32 [N]) -> y f32 [M, N]``:
    y[m, n] = ((256 * f32(H) + f32(L)) * channel_scale[n]) * row_scale[m], where H and L are the int32 sums of the
    high and the low plane, plane_offset[p] + sum_k planes[p, k] * weight[n, k].
    """
    plan = _Plan(rows, out_features, in_features)
    require_indexable("the weight", out_features, plan.padded_inputs)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
        weight: T.Buffer((plan.tiles, plan.padded_inputs // 4, VECTOR_BYTES), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            _int8_body(plan, planes, row_scale, plane_offset, weight, channel_scale, y)

    return kernel


def _int8_body(
    plan: _Plan, planes: Expr, row_scale: Expr, plane_offset: Expr, weight: Expr, channel_scale: Expr, y: Expr
) -> None:
    def row_block(block: _Block) -> None:
        sums = _start_sums(block, plane_offset)
        _add_int8_products(block, sums, planes, weight, block.first_tile)
        _store_sums(block, y, sums, channel_scale, row_scale)

    _each_tile_group(plan, lambda tile, num_tiles: _each_row_block(plan, tile, num_tiles, row_block))


def linear_int4(rows: int, out_features: int, in_features: int) -> tirx.PrimFunc:
    """Build `linear_int8` for two-level int4 weights, packed as `pack_int4` returns them.

    ``(planes i8 [2M, Kp], row_scale f32 [M], plane_offset i32 [2M], codes u8 [Np/16, Kp/8, 64],
    header u8 [Np/16, Kp/32, 16], channel_scale f32 [N]) -> y f32 [M, N]``;
    the int8 weight is (code - zero) * multiplier. Up to 4 rows use each weight as it is unpacked; more rows
    share one unpacked tile group.
    """
    plan = _Plan(rows, out_features, in_features)
    require_groups(in_features)
    require_indexable("the weight", out_features, plan.padded_inputs)
    body = _int4_direct_body if rows == plan.block_rows else _int4_unpacking_body

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        plane_offset: T.Buffer((2 * rows,), "int32"),
        codes: T.Buffer((plan.tiles, plan.padded_inputs // 8, VECTOR_BYTES), "uint8"),
        header: T.Buffer((plan.tiles, plan.groups, LANES), "uint8"),
        channel_scale: T.Buffer((out_features,), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            body(plan, planes, row_scale, plane_offset, codes, header, channel_scale, y)

    return kernel


def _int4_direct_body(
    plan: _Plan,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    codes: Expr,
    header: Expr,
    channel_scale: Expr,
    y: Expr,
) -> None:
    def tile_group(first_tile: Expr, num_tiles: int) -> None:
        block = _Block(plan, 0, plan.rows, first_tile, num_tiles)
        sums = _start_sums(block, plane_offset)
        with T.serial(plan.groups) as group:
            for t in range(num_tiles):
                multiply = partial(block.add_products, sums, t, planes)
                _each_int4_vector(codes, header, first_tile + t, group, multiply)
            _prefetch_group(codes, first_tile + num_tiles, num_tiles, group, _GROUP_STEPS // 2)
        _store_sums(block, y, sums, channel_scale, row_scale)

    _each_tile_group(plan, tile_group)


def _int4_unpacking_body(
    plan: _Plan,
    planes: Expr,
    row_scale: Expr,
    plane_offset: Expr,
    codes: Expr,
    header: Expr,
    channel_scale: Expr,
    y: Expr,
) -> None:
    def tile_group(first_tile: Expr, num_tiles: int) -> None:
        weight = T.alloc_local((num_tiles, plan.padded_inputs // 4, VECTOR_BYTES), "uint8")
        with T.grid(num_tiles, plan.groups) as (t, group):

            def keep(step: Expr, weights: Expr) -> None:
                T.buffer_store(weight, weights, [t, step, lanes(0, VECTOR_BYTES)])

            _each_int4_vector(codes, header, first_tile + t, group, keep)
            _prefetch_group(codes, first_tile + num_tiles + t, 1, group, _GROUP_STEPS // 2)

        def row_block(block: _Block) -> None:
            sums = _start_sums(block, plane_offset)
            _add_int8_products(block, sums, planes, weight, 0)
            _store_sums(block, y, sums, channel_scale, row_scale)

        _each_row_block(plan, first_tile, num_tiles, row_block)

    _each_tile_group(plan, tile_group)


def linear_block(rows: int, out_features: int, in_features: int, bits: int) -> tirx.PrimFunc:
    """Build the linear layer on Q4_0 (4 bits) or Q8_0 (8 bits) weights, packed as `pack_block` returns them.

    ``(planes i8 [2M, Kp], row_scale f32 [M], codes u8 [Np/16, Kp*bits/32, 64],
    block_scale f32 [Np/16, Kp/32, 16]) -> y f32 [M, N]``; the weight is (code - 8 or 128) * block_scale.
    Order: groups ascending, o = fma(256 * f32(H) + f32(L), block_scale, o) with the int32 sums H and L of the
    group; y = o * row_scale.
    """
    plan = _Plan(rows, out_features, in_features)
    require_bits(bits)
    require_groups(in_features)
    require_indexable("the weight", out_features, plan.padded_inputs)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        planes: T.Buffer((2 * rows, plan.padded_inputs), "int8"),
        row_scale: T.Buffer((rows,), "float32"),
        codes: T.Buffer((plan.tiles, plan.padded_inputs * bits // 32, VECTOR_BYTES), "uint8"),
        block_scale: T.Buffer((plan.tiles, plan.groups, LANES), "float32"),
        y: T.Buffer((rows, out_features), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            _block_body(plan, bits, planes, row_scale, codes, block_scale, y)

    return kernel


def _block_body(plan: _Plan, bits: int, planes: Expr, row_scale: Expr, codes: Expr, block_scale: Expr, y: Expr) -> None:
    each_vector = _each_nibble_vector if bits == 4 else _each_byte_vector

    def row_block(block: _Block) -> None:
        outputs = T.alloc_local((block.num_rows, block.num_tiles, LANES), "float32")
        for r, t in product(range(block.num_rows), range(block.num_tiles)):
            T.buffer_store(outputs, splat(0.0), [r, t, lanes(0)])
        with T.serial(plan.groups) as group:
            offsets = _group_offsets(block, planes, group, BLOCK_BIAS[bits])
            for t in range(block.num_tiles):
                sums = _copied(offsets, block.num_rows)
                multiply = partial(block.add_products, sums, 0, planes)
                each_vector(codes, block.first_tile + t, group, multiply)
                scale = block_scale[block.first_tile + t, group, lanes(0)]
                for r in range(block.num_rows):
                    joined = _joined(sums[0, r, 0, lanes(0)], sums[1, r, 0, lanes(0)])
                    T.buffer_store(outputs, fma(joined, scale, outputs[r, t, lanes(0)]), [r, t, lanes(0)])
            if block.is_first:
                _prefetch_group(codes, block.first_tile + block.num_tiles, block.num_tiles, group, bits)
        for r, t in product(range(block.num_rows), range(block.num_tiles)):
            row = block.first_row + r
            _store(plan, y, row, block.first_tile + t, outputs[r, t, lanes(0)] * splat(row_scale[row]))

    _each_tile_group(plan, lambda tile, num_tiles: _each_row_block(plan, tile, num_tiles, row_block))


def _group_offsets(block: _Block, planes: Expr, group: Expr, bias: int) -> Expr:
    """Return -bias * sum(activations of the group), int32 [2, rows, 1, 16]: biased codes then act as signed."""
    offsets = T.alloc_local((2, block.num_rows, 1, LANES), "int32")
    every = list(product(range(2), range(block.num_rows)))
    for plane, r in every:
        T.buffer_store(offsets, splat(0), [plane, r, 0, lanes(0)])
    for s in range(_GROUP_STEPS):
        biases = T.broadcast(T.uint8(bias), VECTOR_BYTES)
        block.add_products(offsets, 0, planes, group * _GROUP_STEPS + s, biases)
    for plane, r in every:
        T.buffer_store(offsets, splat(0) - offsets[plane, r, 0, lanes(0)], [plane, r, 0, lanes(0)])
    return offsets


def _copied(offsets: Expr, num_rows: int) -> Expr:
    sums = T.alloc_local((2, num_rows, 1, LANES), "int32")
    for plane, r in product(range(2), range(num_rows)):
        T.buffer_store(sums, offsets[plane, r, 0, lanes(0)], [plane, r, 0, lanes(0)])
    return sums


def embed_int8(tokens: int, vocabulary: int, columns: int) -> tirx.PrimFunc:
    """Build ``(token_ids i64 [T], weight, channel_scale f32 [V]) -> x f32 [T, D]`` from a weight packed by `pack_int8`.

    x[t, d] = (weight[id, d] - 128) * channel_scale[id]. Ids must be in 0..V-1: the runtime checks them.
    """
    plan = _Plan(tokens, vocabulary, columns)
    require_indexable("the embedding", vocabulary, plan.padded_inputs)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        token_ids: T.Buffer((tokens,), "int64"),
        weight: T.Buffer((plan.tiles, plan.padded_inputs // 4, VECTOR_BYTES), "uint8"),
        channel_scale: T.Buffer((vocabulary,), "float32"),
        x: T.Buffer((tokens, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for token in loop_over(tokens, tokens * columns / _EMBEDDED_PER_US):
                row: T.let = T.cast(token_ids[token], "int32")
                for d in T.serial(columns):
                    value: T.let = weight[row // LANES, d // 4, row % LANES * 4 + d % 4]
                    x[token, d] = T.cast(T.cast(value, "int32") - INT8_BIAS, "float32") * channel_scale[row]

    return kernel
