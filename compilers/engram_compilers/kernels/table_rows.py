# mypy: disable-error-code="valid-type, untyped-decorator"
"""Records of a host table to float32 rows: gathered from anywhere in memory and dequantised in one pass.

The values are those of `engram_runtime.records.RecordFormat.decode`, bit for bit except in a nan: payload * scale *
factor, each product rounded. Nothing is assumed of the alignment of records: they are read as bytes.
"""

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr, prefetch
from engram_compilers.kernels.loops import LANES
from engram_runtime.records import NO_FACTOR, PAYLOAD_BITS, SCALE_BYTES, RecordFormat
from engram_runtime.tables.decoding import SHARED_FROM_ROWS

_ROWS_AHEAD = 8  # asked for early: their reads overlap, where a row alone waits 100 ns for memory
_LINE_BYTES = 64
_MOST_LINES = 32  # asked for of a part: beyond 2 KiB a processor reads on by itself as fast
# Bits of the mantissa and of the exponent, and the first code that is not finite; by integers, as a cast of float16 is
# a call to a C library on machines that lack it, and of FP8 one everywhere.
_SMALL_FLOATS = {"float16": (10, 5, 0x7C00), "float8_e4m3": (3, 4, 0x7F)}


def decode_rows(record: RecordFormat, parts: Sequence[int]) -> tirx.PrimFunc:
    """Build ``(memory u8 [bytes], offsets i64 [parts, N], out f32 [N, columns])`` for any N.

    Args:
        parts: bytes of each part of a record: all in one, or payload and scales apart.
    """

    @T.prim_func(s_tir=True)
    def kernel(memory_: T.handle, offsets_: T.handle, out_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        size, count = T.int64(), T.int64()
        memory = T.match_buffer(memory_, (size,), "uint8", align=1)
        offsets = T.match_buffer(offsets_, (len(parts), count), "int64", align=8)
        out = T.match_buffer(out_, (count, record.columns), "float32", align=4)
        with T.sblock("root"):
            for row in T.serial(T.min(count, T.int64(_ROWS_AHEAD))):
                _ask_for(parts, memory, offsets, row)
            if count >= SHARED_FROM_ROWS:
                for row in T.parallel(count):
                    _decode_row(record, parts, memory, offsets, out, row)
            else:
                for row in T.serial(count):
                    _decode_row(record, parts, memory, offsets, out, row)

    return kernel


def _ask_for(parts: Sequence[int], memory: Expr, offsets: Expr, row: Expr) -> None:
    """Ask for the cache lines of a row's record, the first ones of a long one."""
    for part, part_bytes in enumerate(parts):
        for byte in (*range(0, part_bytes - 1, _LINE_BYTES), part_bytes - 1)[:_MOST_LINES]:
            prefetch(memory, offsets[part, row] + byte)


def _decode_row(record: RecordFormat, parts: Sequence[int], memory: Expr, offsets: Expr, out: Expr, row: Expr) -> None:
    _ask_for(parts, memory, offsets, T.Bind(T.min(row + _ROWS_AHEAD, out.shape[0] - 1)))
    payload = T.Bind(offsets[0, row])
    scales = T.Bind(offsets[1, row] if len(parts) > 1 else payload + record.payload_bytes)
    with T.serial(record.columns // record.scale_columns) as group:
        scale = _scale(record, memory, scales + group * SCALE_BYTES[record.scale])
        factors = [] if scale is None else [T.Bind(scale)]
        if record.factor != NO_FACTOR:
            factors.append(T.float32(float.fromhex(record.factor)))

        def store(column: Expr, count: int) -> None:
            values = _values(record.payload, memory, payload, group * record.scale_columns + column, count)
            for factor in factors:
                values = values * _repeated(factor, count)
            T.buffer_store(out, values, [row, _run(group * record.scale_columns + column, count)])

        _each_run(record, store)


def _each_run(record: RecordFormat, emit: Callable[[Expr, int], None]) -> None:
    """Emit code for runs of neighbouring columns of a group; the last one may do columns of the one before again."""
    group = record.scale_columns
    count = 1 if record.payload == "int4" and group % 2 else min(group, LANES)  # int4 runs begin at whole bytes
    with T.serial(-(-group // count)) as step:
        emit(T.min(step * count, group - count), count)


def _run(start: Expr, count: int) -> Expr:
    return start if count == 1 else T.ramp(start, 1, count)


def _repeated(value: Expr, count: int) -> Expr:
    return value if count == 1 else T.broadcast(value, count)


def _vector(dtype: str, count: int) -> str:
    return dtype if count == 1 else f"{dtype}x{count}"


def _load(memory: Expr, start: Expr, dtype: str, item_bytes: int, count: int = 1) -> Expr:
    """Return ``count`` numbers whose bytes begin at ``start``."""
    return T.reinterpret(_vector(dtype, count), memory[_run(start, item_bytes * count)])


def _values(payload: str, memory: Expr, start: Expr, column: Expr, count: int) -> Expr:
    """Return ``count`` float32 values of a payload that begins at byte ``start``."""
    if payload == "int4":
        return _int4_values(memory, start, column, count)
    item_bytes = PAYLOAD_BITS[payload] // 8
    first = start + column * item_bytes
    floats = _vector("float32", count)
    if payload == "bfloat16":
        bits = T.cast(_load(memory, first, "uint16", 2, count), _vector("uint32", count))
        return T.reinterpret(floats, T.shift_left(bits, _repeated(T.uint32(16), count)))
    if payload in _SMALL_FLOATS:
        return _small_floats(_load(memory, first, f"uint{8 * item_bytes}", item_bytes, count), payload, count)
    return T.cast(_load(memory, first, payload, item_bytes, count), floats)


def _int4_values(memory: Expr, start: Expr, column: Expr, count: int) -> Expr:
    """Return values of two's complement halves of bytes, the low half first."""
    first = start + T.floordiv(column, 2)
    if count == 1:
        up = T.int32(28) - 4 * T.cast(column % 2, "int32")
        bits = T.cast(memory[first], "int32")
    else:
        up = T.Shuffle([T.int32(28), T.int32(24)] * (count // 2), list(range(count)))
        pairs = T.Bind(memory[_run(first, count // 2)])
        bits = T.cast(T.Shuffle([pairs, pairs], [lane // 2 for lane in range(count)]), f"int32x{count}")
    return T.cast(T.shift_right(T.shift_left(bits, up), _repeated(T.int32(28), count)), _vector("float32", count))


def _small_floats(codes: Expr, dtype: str, count: int) -> Expr:
    """Return the float32 values of the unsigned ``codes`` of a dtype of `_SMALL_FLOATS`."""
    mantissa_bits, exponent_bits, first_special = _SMALL_FLOATS[dtype]
    bias, up = (1 << exponent_bits - 1) - 1, _repeated(T.int32(23 - mantissa_bits), count)
    sign_bit = 1 << mantissa_bits + exponent_bits

    def integer(value: int) -> Expr:
        return _repeated(T.int32(value), count)

    codes = T.Bind(T.cast(codes, _vector("int32", count)))
    size = T.Bind(T.bitwise_and(codes, integer(sign_bit - 1)))
    shifted = T.Bind(T.shift_left(size, up))
    unit = _repeated(T.float32(2.0 ** (1 - bias - mantissa_bits)), count)
    subnormal = T.reinterpret(_vector("int32", count), T.cast(size, _vector("float32", count)) * unit)
    finite = T.Select(size < integer(1 << mantissa_bits), subnormal, shifted + integer((127 - bias) << 23))
    magnitude = T.Select(size >= integer(first_special), T.bitwise_or(shifted, integer(255 << 23)), finite)
    sign = T.shift_left(T.bitwise_and(codes, integer(sign_bit)), integer(31 - mantissa_bits - exponent_bits))
    return T.reinterpret(_vector("float32", count), T.bitwise_or(magnitude, sign))


def _scale(record: RecordFormat, memory: Expr, start: Expr) -> Expr | None:
    """Return the float32 scale whose bytes begin at ``start``, or None where records have none."""
    if record.scale == "none":
        return None
    if record.scale == "float32":
        return _load(memory, start, "float32", 4)
    if record.scale == "float16":
        return _small_floats(_load(memory, start, "uint16", 2), "float16", 1)
    exponent = T.Bind(T.cast(memory[start], "int32"))
    # 2**-127 is subnormal, and the largest exponent is a nan: half an implicit bit each.
    half = T.Select(T.Or(exponent == 0, exponent == 255), T.int32(1 << 22), T.int32(0))
    return T.reinterpret("float32", T.bitwise_or(T.shift_left(exponent, T.int32(23)), half))
