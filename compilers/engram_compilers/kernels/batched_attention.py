"""Attention of a token of each of several sequences, each with key/value caches of its own.

A kernel has an argument for every cache, so that sequences need not lie side by side in memory. Token b has the bits
that `attention`'s kernels give it alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as tir

from engram_compilers.kernels.attention import append_token
from engram_compilers.kernels.attention_shape import AttentionShape, Operands
from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.online_softmax import attend_task


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    """Caches of ``sequences`` sequences, ``[1, Hkv, S, hd]`` each."""

    sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    dtype: str = "float32"

    def arguments(self) -> tuple[list[Expr], list[Expr]]:
        """Declare the key caches, then the value caches, as arguments of the kernel that is being built."""
        shape = (1, self.kv_heads, self.capacity, self.head_dim)
        keys = [_argument(f"k_cache_{index}", shape, self.dtype) for index in range(self.sequences)]
        return keys, [_argument(f"v_cache_{index}", shape, self.dtype) for index in range(self.sequences)]


def rope_append_each(caches: Caches, rotary_dim: int) -> tirx.PrimFunc:
    """Build `attention.rope_append` for a token of each sequence.

    ``(qkv f32 [B, (H + 2*Hkv) * hd], cos f32 [S, rotary_dim/2], sin f32 [S, rotary_dim/2], position i64 [B],
    B key caches, B value caches) -> q f32 [B, H * hd]``; the caches are changed in place.
    """
    count, width = caches.sequences, caches.heads * caches.head_dim
    with IRBuilder() as builder, tir.prim_func(is_private=True, s_tir=True):
        qkv = _argument("qkv", (count, width + 2 * caches.kv_heads * caches.head_dim))
        cos, sin = (_argument(name, (caches.capacity, rotary_dim // 2)) for name in ("cos", "sin"))
        position = _argument("position", (count,), "int64")
        keys, values = caches.arguments()
        q = _argument("q", (count, width))
        tir.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with tir.sblock("root"):
            for index, (key, value) in enumerate(zip(keys, values, strict=True)):
                append_token(qkv, index, cos, sin, T.cast(position[index], "int32"), key, value, q)
    return builder.get()


def attend_each(caches: Caches, scale: float, window: int | None) -> tirx.PrimFunc:
    """Build `attention.attend` for a token of each sequence.

    ``(q f32 [B, H * hd], B key caches, B value caches, position i64 [B]) -> out f32 [B, H * hd]``
    """
    count, width = caches.sequences, caches.heads * caches.head_dim
    shape = AttentionShape(
        tokens=1,
        heads=caches.heads,
        kv_heads=caches.kv_heads,
        head_dim=caches.head_dim,
        capacity=caches.capacity,
        scale=scale,
        window=caches.capacity if window is None else window,
    )
    with IRBuilder() as builder, tir.prim_func(is_private=True, s_tir=True):
        q = _argument("q", (count, width))
        keys, values = caches.arguments()
        position = _argument("position", (count,), "int64")
        out = _argument("out", (count, width))
        tir.func_attr({"op_pattern": 8, "tirx.noalias": True})
        operands = [
            Operands(q=q, k_cache=key, v_cache=value, position=position, live=None, out=out, sequence=index)
            for index, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
        with tir.sblock("root"):
            _attend_each(shape, operands)
    return builder.get()


def _attend_each(shape: AttentionShape, each: Sequence[Operands]) -> None:
    tasks = shape.heads // shape.together
    with T.parallel(len(each) * tasks) as task:
        for operands in each:
            with T.If(task // tasks == operands.sequence), T.Then():
                attend_task(shape, operands, task % tasks)


def _argument(name: str, shape: tuple[int, ...], dtype: str = "float32") -> Expr:
    return tir.arg(name, tirx.decl_buffer(shape, dtype, name))
