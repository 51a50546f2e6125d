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


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """What each sequence of a pass has of its own, such as its caches and its position.

    Attributes:
        rows: one tensor of all, a row of each sequence, where there is one.
    """

    of: "tuple[Value, ...]"
    rows: Activation | None = None


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


@dataclass(frozen=True, slots=True)
class Sum:
    """a + b, both ``[M, D]``."""

    a: Activation
    b: Activation

    @property
    def shape(self) -> tuple[int, ...]:
        return self.a.shape


@dataclass(frozen=True, slots=True)
class Normed:
    """``x [M, D]`` divided by the root mean square of its rows, times ``gain [D]``."""

    x: "Activation | Sum"
    gain: Activation
    eps: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape


@dataclass(frozen=True, slots=True)
class Gated:
    """function(first half) * second half of the rows of ``gate_up [M, 2F]``; the function is "silu" or "gelu"."""

    gate_up: Activation
    function: str

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.gate_up.shape
        return rows, columns // 2


Rows = Activation | Sum | Normed | Gated  # [M, K]; the last three may be quantised as they are computed
Deferred = Half | HalfSigmoid | HalfSilu | HalfGelu | Softmax | Sum | Normed | Gated
Value = (
    Activation
    | Apart
    | Batched
    | ChannelScales
    | TwoLevelScales
    | TransposedWeight
    | Weight
    | Deferred
    | NDArray[Any]
    | None
)
