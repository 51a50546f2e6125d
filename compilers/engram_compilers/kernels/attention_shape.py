"""Sizes and buffers of an attention layer, and how its work is cut."""

from dataclasses import dataclass

from tvm.script import tirx as T

from engram_compilers.kernels.intrinsics import Expr
from engram_compilers.kernels.loops import LANES, round_up

KEY_BLOCK = 64  # keys between two updates of the running softmax
MOST_ACCUMULATORS = 16  # vectors of output kept in registers
_TOKEN_BLOCK = 8  # tokens that read a key block while it is in cache
_TILED_TOKENS = 16  # tokens that read a transposed key block, which takes as long as the scores of about four
_WIDE_TOGETHER = 4  # measured on 16 heads of 256: 4 take 0.6 of the time of 1 at 2,000 tokens, 0.3 at 30,000
_FEWEST_TASKS = 4  # left to the threads by wide heads; narrow ones apart took 1.1 to 1.4 times as long on one thread
_SCORES_PER_US = 250.0  # of 64 dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Sizes of one attention layer, and how its work is cut."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    scale: float
    window: int

    @property
    def vectors(self) -> int:
        """Vectors in a head."""
        return self.head_dim // LANES

    @property
    def group(self) -> int:
        """Query heads that read the same key/value head."""
        return self.heads // self.kv_heads

    @property
    def together(self) -> int:
        """Query heads that share each load of a value: a divisor of the group."""
        fitting = (n for n in range(2, self.group + 1) if n * self.vectors <= MOST_ACCUMULATORS or self._pays(n))
        return max((n for n in fitting if self.group % n == 0), default=1)

    def _pays(self, together: int) -> bool:
        """Whether wide heads gain by it, though their values are then read a part at a time."""
        return together <= _WIDE_TOGETHER and self.heads // together * self.token_blocks >= _FEWEST_TASKS

    @property
    def tiled(self) -> bool:
        """Whether key blocks are transposed first, for tokens enough to share them."""
        return self.tokens >= _TILED_TOKENS

    @property
    def token_block(self) -> int:
        """Tokens that read a key block together."""
        return _TILED_TOKENS if self.tiled else _TOKEN_BLOCK

    @property
    def token_blocks(self) -> int:
        """Blocks of tokens that read a key block together."""
        return -(-self.tokens // self.token_block)

    @property
    def us_per_key(self) -> float:
        """Time one more key in the cache takes."""
        return self.tokens * self.heads * (self.head_dim / 64) / _SCORES_PER_US


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """Buffers of one attention layer.

    Attributes:
        q: f32 ``[T, H * hd]``, rotated.
        k_cache: f32 or f16 ``[1, Hkv, S, hd]``. ``v_cache`` alike.
        position: i64 ``[1]``.
        live: None, or i32 ``[T, words]``: bit i of word w says whether a token attends to key 16 * w + i.
        out: f32 ``[T, H * hd]``.
        sequence: where there are several, each with caches of its own: the place of this one's position, and of its
            first row of the others.
    """

    q: Expr
    k_cache: Expr
    v_cache: Expr
    position: Expr
    live: Expr | None
    out: Expr
    sequence: int = 0

    @property
    def start(self) -> Expr:
        """How many tokens the caches held before, i32."""
        return T.cast(self.position[self.sequence], "int32")


def live_words(capacity: int) -> int:
    """Return the words of 16 keys in a row of ``live``, whole key blocks."""
    return round_up(capacity, KEY_BLOCK) // LANES
