"""What an ONNX value is while a graph is lowered: mostly an activation, sometimes something known or put off."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from tvm import relax

from engram_compilers.onnx_model import Weight


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """A tensor computed at run time."""

    expr: relax.Expr
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Batched:
    """An activation under a leading axis of one, which attention asks for in ONNX and kernels don't."""

    inner: Activation


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """``scale [N, 1]`` spread over the blocks of each row; of experts ``[E, N, 1]``."""

    scale: Weight


@dataclass(frozen=True, slots=True)
class TwoLevelScales:
    """``multiplier [N, K / 32] * scale [N, 1]``; of experts ``[E, N, K / 32] * [E, N, 1]``."""

    multiplier: Weight
    scale: Weight


@dataclass(frozen=True, slots=True)
class TransposedWeight:
    """A float weight ``[N, K]`` used as ``[K, N]``."""

    weight: Weight


@dataclass(frozen=True, slots=True)
class Half:
    """One half of an activation's last axis."""

    whole: Activation
    index: int


@dataclass(frozen=True, slots=True)
class HalfSigmoid:
    """sigmoid(half)."""

    half: Half


@dataclass(frozen=True, slots=True)
class HalfSilu:
    """half * sigmoid(half)."""

    half: Half


@dataclass(frozen=True, slots=True)
class HalfGelu:
    """gelu(half), by tanh."""

    half: Half


@dataclass(frozen=True, slots=True)
class Softmax:
    """softmax over an activation's last axis."""

    whole: Activation


Deferred = Half | HalfSigmoid | HalfSilu | HalfGelu | Softmax
Value = (
    Activation | Batched | ChannelScales | TwoLevelScales | TransposedWeight | Weight | Deferred | NDArray[Any] | None
)
