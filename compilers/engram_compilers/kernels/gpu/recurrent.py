# mypy: disable-error-code="valid-type, untyped-decorator"
"""Layers that carry a state of fixed size from token to token; each thread takes a channel, or a column, through all.

Arguments, results and order are those of `engram_compilers.kernels.recurrent`.
"""

from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.kernels.gpu import blocks
from engram_compilers.kernels.gpu.activation import silu
from engram_compilers.kernels.gpu.blocks import ATTRIBUTES, THREADS, fma, steps
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.packing import require_indexable

Activate = Callable[[Expr], Expr]  # of float32
ACTIVATIONS: Mapping[str, Activate] = {"silu": silu, "none": lambda x: x}  # of a convolution


def gated_delta(tokens: int, key_heads: int, heads: int, key_dim: int, value_dim: int, scale: float) -> tirx.PrimFunc:
    """Build the gated delta rule; the state is changed in place.

    ``(query f32 [T, Hk * dk], key f32 [T, Hk * dk], value f32 [T, H * dv], log_decay f32 [T, H], beta f32 [T, H],
    state f32 [1, H, dk, dv]) -> out f32 [T, H * dv]``.
    """
    require_indexable("the recurrent state", heads, key_dim, value_dim)
    group = heads // key_heads

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
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for head in blocks.blocks(heads, "y"):
                for block in blocks.blocks(steps(value_dim)):
                    for thread in blocks.threads():
                        if block * THREADS + thread < value_dim:
                            for t in T.serial(tokens):
                                _step(
                                    _Column(state, head, block * THREADS + thread),
                                    _Vector(query, t, head // group * key_dim),
                                    _Vector(key, t, head // group * key_dim),
                                    value,
                                    log_decay,
                                    beta,
                                    out,
                                    t,
                                    scale,
                                )

    return kernel


class _Column:
    """A column of a head's state."""

    def __init__(self, state: Expr, head: Expr, column: Expr) -> None:
        self.state, self.head, self.column = state, head, column
        self.rows, self.width = int(state.shape[2]), int(state.shape[3])

    def get(self, row: Expr) -> Expr:
        return self.state[0, self.head, row, self.column]

    def set(self, row: Expr, value: Expr) -> None:
        T.buffer_store(self.state, value, [0, self.head, row, self.column])


class _Vector:
    """A head's part of a token's row."""

    def __init__(self, rows: Expr, token: Expr, first: Expr) -> None:
        self._rows, self._token, self._first = rows, token, first

    def get(self, index: Expr) -> Expr:
        return self._rows[self._token, self._first + index]


def _step(
    column: _Column,
    query: _Vector,
    key: _Vector,
    value: Expr,
    log_decay: Expr,
    beta: Expr,
    out: Expr,
    t: Expr,
    scale: float,
) -> None:
    """Update a column by token t, and write its output."""
    decay = T.Bind(T.exp(log_decay[t, column.head]))
    place = T.Bind(column.head * column.width + column.column)
    total = blocks.local(1, "float32")
    T.buffer_store(total, T.float32(0.0), [0])
    with T.serial(column.rows) as row:
        T.buffer_store(total, fma(column.get(row), key.get(row), total[0]), [0])
    delta = T.Bind(fma(T.float32(0.0) - decay, total[0], value[t, place]) * beta[t, column.head])
    T.buffer_store(total, T.float32(0.0), [0])
    with T.serial(column.rows) as row:
        updated = T.Bind(fma(key.get(row), delta, column.get(row) * decay))
        column.set(row, updated)
        T.buffer_store(total, fma(updated, query.get(row), total[0]), [0])
    T.buffer_store(out, total[0] * T.float32(scale), [t, place])


def causal_conv(tokens: int, channels: int, taps: int, dilation: int, activate: Activate) -> tirx.PrimFunc:
    """Build ``(x f32 [T, C], weight f32 [taps, C], window f32 [W, C]) -> out f32 [T, C]``, W = (taps - 1) * dilation.

    The window is changed in place.
    """
    window_steps = (taps - 1) * dilation

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        x: T.Buffer((tokens, channels), "float32"),
        weight: T.Buffer((taps, channels), "float32"),
        window: T.Buffer((window_steps, channels), "float32"),
        out: T.Buffer((tokens, channels), "float32"),
    ) -> None:
        T.func_attr(ATTRIBUTES)
        with T.sblock("root"):
            for block in blocks.blocks(steps(channels)):
                for thread in blocks.threads():
                    if block * THREADS + thread < channels:
                        for t in T.serial(tokens):
                            _convolve(x, weight, window, out, t, block * THREADS + thread, dilation, activate)
                        for step in T.serial(window_steps):
                            window[step, block * THREADS + thread] = _at_step(
                                x, window, step + tokens, block * THREADS + thread
                            )

    return kernel


def _convolve(
    x: Expr, weight: Expr, window: Expr, out: Expr, t: Expr, channel: Expr, dilation: int, activate: Activate
) -> None:
    total = blocks.local(1, "float32")
    T.buffer_store(total, _at_step(x, window, t, channel) * weight[0, channel], [0])
    for tap in range(1, int(weight.shape[0])):
        value = _at_step(x, window, t + tap * dilation, channel)
        T.buffer_store(total, fma(value, weight[tap, channel], total[0]), [0])
    T.buffer_store(out, activate(total[0]), [t, channel])


def _at_step(x: Expr, window: Expr, step: Expr, channel: Expr) -> Expr:
    """Return an element of the window followed by x."""
    held = int(window.shape[0])
    return T.if_then_else(step < held, window[step, channel], x[step - held, channel])
