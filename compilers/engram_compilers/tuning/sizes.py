"""Block sizes as data, and what was measured of them."""

from dataclasses import dataclass

KINDS = ("int8", "int4")  # of weights, whose linear layers are nearly all of a forward pass
LEAST_SUMS, MOST_SUMS = 2, 64  # two planes need two


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSize:
    """How a linear layer on weights of a kind is cut for a number of rows.

    Attributes:
        kind: ``int8`` or ``int4``.
        rows: tokens of the forward pass.
        sums: sums of 16 lanes kept in registers, see `engram_compilers.kernels.isa.Isa`.
    """

    kind: str
    rows: int
    sums: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Block sizes to compile with.

    Attributes:
        source: where they come from, for the library's description; empty for a family's own.
        sizes: those that differ from the family's own.
    """

    source: str
    sizes: tuple[BlockSize, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a search found of one kernel.

    Attributes:
        own: the family's block size. ``best``: the fastest of all that were tried.
        own_us, best_us: best times of a call.
        pays: whether ``best`` is worth using in place of ``own``.
    """

    own: BlockSize
    best: BlockSize
    own_us: float
    best_us: float
    pays: bool

    @property
    def gain(self) -> float:
        """Share of the time that ``best`` saves, 0 where the family's own is the fastest."""
        return 1 - self.best_us / self.own_us


OWN_BLOCKS = Blocks(source="", sizes=())
