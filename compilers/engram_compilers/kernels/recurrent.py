# mypy: disable-error-code="valid-type, untyped-decorator"
"""Layers that carry a state of fixed size from token to token: gated delta rule, causal convolution.

Both walk the tokens in order, one at a time, and change the state in place, so a token's bits do not depend on how many
a call has. The chunked form of the delta rule does less work per token, but its bits depend on where chunks begin.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.activation import silu
from engram_compilers.kernels.intrinsics import Expr, exp16, fma, lanes, new_lanes, splat
from engram_compilers.kernels.loops import LANES, loop_over
from engram_compilers.kernels.packing import require_indexable

Activate = Callable[[Expr], Expr]  # of 16 lanes
ACTIVATIONS: Mapping[str, Activate] = {"silu": silu, "none": lambda x: x}  # of a convolution

_COLUMN_BLOCK = 64  # value columns one task takes: four sums run side by side, one alone would wait for each fma
_STATE_VALUES_PER_US = 10000.0
_TAPS_PER_US = 8000.0
_CHANNEL_BLOCK = 16  # vectors of channels one task takes through all tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Heads:
    """Sizes of a gated delta layer, and how its columns are cut."""

    tokens: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    scale: float

    @property
    def width(self) -> int:
        """Value columns in a block."""
        return LANES if self.value_dim % _COLUMN_BLOCK else _COLUMN_BLOCK

    @property
    def blocks(self) -> int:
        return -(-self.value_dim // self.width)

    def live_columns(self, column: Expr) -> Expr:
        """Return how many columns of the block that begins at ``column`` there are: a number where all are full."""
        return T.min(self.width, self.value_dim - column) if self.value_dim % self.width else self.width


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a gated delta layer reads."""

    query: Expr
    key: Expr
    value: Expr
    log_decay: Expr
    beta: Expr


def gated_delta(tokens: int, key_heads: int, heads: int, key_dim: int, value_dim: int, scale: float) -> tirx.PrimFunc:
    """Build the gated delta rule (arXiv 2412.06464).

    ``(query f32 [T, Hk * dk], key f32 [T, Hk * dk], value f32 [T, H * dv], log_decay f32 [T, H], beta f32 [T, H],
    state f32 [1, H, dk, dv]) -> out f32 [T, H * dv]``; value head h reads key head h // (H / Hk). The state S of a head
    is changed in place, so the call is by call_tir_inplace. Token by token, with d = exp(log_decay):

        delta = (value - d * S^T key) * beta,    S = d * S + key delta^T,    out = scale * S^T query

    Sums run over the dk rows ascending by fma.
    """
    shape = _Heads(tokens=tokens, key_heads=key_heads, heads=heads, key_dim=key_dim, value_dim=value_dim, scale=scale)
    require_indexable("the recurrent state", heads, key_dim, value_dim)
    work_us = tokens * heads * key_dim * value_dim / _STATE_VALUES_PER_US

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        query: T.Buffer((tokens, key_heads * key_dim), "float32"),
        key: T.Buffer((tokens, key_heads * key_dim), "float32"),
        value: T.Buffer((tokens, heads * value_dim), "float32"),
        log_decay: T.Buffer((tokens, heads), "float32"),
        beta: T.Buffer((tokens, heads), "float32"),
        state: T.Buffer((1, heads, key_dim, value_dim), "float32"),
        out: T.Buffer((tokens, heads * value_dim), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for task in loop_over(shape.heads * shape.blocks, work_us):
                _run_block(shape, _Inputs(query, key, value, log_decay, beta), state, out, task)

    return kernel


def _run_block(shape: _Heads, inputs: _Inputs, state: Expr, out: Expr, task: Expr) -> None:
    """Take a block of a head's columns through all tokens; its part of the state stays in a local copy meanwhile."""
    head, column = T.Bind(task // shape.blocks), T.Bind(task % shape.blocks * shape.width)
    live = shape.live_columns(column)
    memory = T.alloc_local((shape.key_dim, shape.width), "float32")
    values = T.alloc_buffer((1, shape.width), "float32")
    if not isinstance(live, int):  # lanes past the last column are computed with like the others, then dropped
        _clear(values, 1)
        _clear(memory, shape.key_dim)
    with T.serial(shape.key_dim) as row:
        _copy(memory, [row, 0], state, [0, head, row, column], live)
    with T.serial(shape.tokens) as t:
        at = [t, head * shape.value_dim + column]
        _copy(values, [0, 0], inputs.value, at, live)
        _step(shape, inputs, memory, values, t, head)
        _copy(out, at, values, [0, 0], live)
    with T.serial(shape.key_dim) as row:
        _copy(state, [0, head, row, column], memory, [row, 0], live)


def _step(shape: _Heads, inputs: _Inputs, memory: Expr, values: Expr, t: Expr, head: Expr) -> None:
    """Update the memory by token t and replace its values by the output."""
    first = T.Bind(head // (shape.heads // shape.key_heads) * shape.key_dim)
    decay, beta = T.Bind(exp16(splat(inputs.log_decay[t, head]))), T.Bind(splat(inputs.beta[t, head]))

    def recall(row: Expr, columns: Expr) -> tuple[Expr, Expr]:
        return memory[row, columns], splat(inputs.key[t, first + row])

    for columns, recalled in _sum_rows(shape, recall):
        T.buffer_store(values, fma(splat(0.0) - decay, recalled, values[0, columns]) * beta, [0, columns])

    def update(row: Expr, columns: Expr) -> tuple[Expr, Expr]:
        updated = fma(splat(inputs.key[t, first + row]), values[0, columns], memory[row, columns] * decay)
        T.buffer_store(memory, updated, [row, columns])
        return memory[row, columns], splat(inputs.query[t, first + row])

    for columns, total in _sum_rows(shape, update):
        T.buffer_store(values, total * splat(shape.scale), [0, columns])


def _sum_rows(shape: _Heads, factors: Callable[[Expr, Expr], tuple[Expr, Expr]]) -> list[tuple[Expr, Expr]]:
    """Return each vector of a block's columns and its sum of a * b over the rows; factors(row, columns) is (a, b)."""
    sums = T.alloc_buffer((1, shape.width), "float32")
    _clear(sums, 1)
    vectors = [lanes(column) for column in range(0, shape.width, LANES)]
    with T.serial(shape.key_dim) as row:
        for columns in vectors:
            T.buffer_store(sums, fma(*factors(row, columns), sums[0, columns]), [0, columns])
    return [(columns, sums[0, columns]) for columns in vectors]


def _clear(buffer: Expr, rows: int) -> None:
    with T.serial(rows) as row:
        for column in range(0, int(buffer.shape[1]), LANES):
            T.buffer_store(buffer, splat(0.0), [row, lanes(column)])


def _copy(target: Expr, at: Sequence[Expr], source: Expr, begin: Sequence[Expr], count: Expr) -> None:
    """Copy neighbours along the last axis: vectors of them if ``count`` is a number, else one by one."""
    if isinstance(count, int):
        for i in range(0, count, LANES):
            T.buffer_store(target, source[*begin[:-1], lanes(begin[-1] + i)], [*at[:-1], lanes(at[-1] + i)])
        return
    with T.serial(count) as i:
        T.buffer_store(target, source[*begin[:-1], begin[-1] + i], [*at[:-1], at[-1] + i])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conv:
    """Sizes of a depthwise convolution."""

    tokens: int
    channels: int
    taps: int
    dilation: int

    @property
    def window(self) -> int:
        """Earlier steps a token reads."""
        return (self.taps - 1) * self.dilation


def causal_conv(tokens: int, channels: int, taps: int, dilation: int, activate: Activate) -> tirx.PrimFunc:
    """Build ``(x f32 [T, C], weight f32 [taps, C], window f32 [W, C]) -> out f32 [T, C]``, W = (taps - 1) * dilation.

    With steps = window followed by x, out[t] = activate(sum over taps i of weight[i] * steps[t + i * dilation]), the
    first product rounded, the others added by fma, i ascending; ``activate`` maps 16 lanes. The window becomes the last
    W steps in place, so the call is by call_tir_inplace.
    """
    shape = _Conv(tokens=tokens, channels=channels, taps=taps, dilation=dilation)
    vectors, rest = divmod(channels, LANES)
    blocks = -(-vectors // _CHANNEL_BLOCK)

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((tokens, channels), "float32"),
        weight: T.Buffer((taps, channels), "float32"),
        window: T.Buffer((shape.window, channels), "float32"),
        out: T.Buffer((tokens, channels), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for block in loop_over(blocks, tokens * channels * taps / _TAPS_PER_US):
                _convolve_block(shape, x, weight, window, out, activate, block)
            if rest > 0:
                _convolve_edge(shape, x, weight, window, out, activate)

    return kernel


def _convolve_block(
    shape: _Conv, x: Expr, weight: Expr, window: Expr, out: Expr, activate: Activate, block: Expr
) -> None:
    """Take up to 16 vectors of channels through all tokens, then move their window on."""
    first = T.Bind(block * _CHANNEL_BLOCK)
    end = T.min(first + _CHANNEL_BLOCK, shape.channels // LANES)
    with T.serial(shape.tokens) as t, T.serial(first, end) as vector:
        channels = lanes(vector * LANES)
        T.buffer_store(out, activate(_tap_sum(shape, x, weight, window, t, channels)), [t, channels])
    with T.serial(shape.window) as step, T.serial(first, end) as vector:
        channels = lanes(vector * LANES)
        T.buffer_store(window, _at_step(shape, x, window, step + shape.tokens, channels), [step, channels])


def _convolve_edge(shape: _Conv, x: Expr, weight: Expr, window: Expr, out: Expr, activate: Activate) -> None:
    """Take the channels after the last whole vector through all tokens, then move their window on."""
    first = shape.channels // LANES * LANES
    edge = new_lanes("float32")
    T.buffer_store(edge, splat(0.0), [lanes(0)])
    with T.serial(shape.tokens) as t:
        with T.serial(shape.channels - first) as i:
            T.buffer_store(edge, _tap_sum(shape, x, weight, window, t, first + i), [i])
        T.buffer_store(edge, activate(edge[lanes(0)]), [lanes(0)])
        with T.serial(shape.channels - first) as i:
            T.buffer_store(out, edge[i], [t, first + i])
    with T.serial(shape.window) as step, T.serial(first, shape.channels) as channel:
        T.buffer_store(window, _at_step(shape, x, window, step + shape.tokens, channel), [step, channel])


def _tap_sum(shape: _Conv, x: Expr, weight: Expr, window: Expr, t: Expr, channel: Expr) -> Expr:
    """Return the convolution at token t; ``channel`` is one index or a ramp of them."""
    total = _at_step(shape, x, window, t, channel) * weight[0, channel]
    for tap in range(1, shape.taps):
        total = fma(_at_step(shape, x, window, t + tap * shape.dilation, channel), weight[tap, channel], total)
    return total


def _at_step(shape: _Conv, x: Expr, window: Expr, step: Expr, channel: Expr) -> Expr:
    """Return an element of the window followed by x."""
    return T.if_then_else(step < shape.window, window[step, channel], x[step - shape.window, channel])
