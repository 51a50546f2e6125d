"""What an accelerator's runs came to, layer by layer, and how long rows of tables were on their way meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engram_runtime.npu.device import Cost, Product


@dataclass(slots=True)
class LayerCost:
    """What the products with one weight took.

    Attributes:
        runs: how many there were; one for each expert of a routed layer that tokens chose.
        compulsory_bytes: the least they could move, see `Product.compulsory_bytes`.
    """

    cost: Cost = field(default_factory=Cost)
    runs: int = 0
    compulsory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RowsWait:
    """Rows of a site in one forward pass.

    Attributes:
        site: its place in manifest order.
        fetch_s: from the pass's begin until all sites' rows up to this one were there, measured.
        device_cycles: of the accelerator from the pass's begin until the site's layer.
    """

    site: int
    fetch_s: float
    device_cycles: int


class Ledger:
    """Costs so far.

    Attributes:
        layers: by the weight's name, in the order of the graph.
        waits: of every forward pass with sites.
        passes: how many forward passes there were.
        host_s: measured in them outside the accelerator and without waiting for rows.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self._names = layers
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.layers = {name: LayerCost() for name in self._names}
        self.waits: list[RowsWait] = []
        self.passes = 0
        self.host_s = 0.0
        self.cycles = 0

    def add(self, layer: int, product: Product, rows: int, cost: Cost) -> None:
        """Count a run with ``rows``."""
        entry = self.layers[self._names[layer]]
        entry.cost += cost
        entry.runs += 1
        entry.compulsory_bytes += product.compulsory_bytes(rows)
        self.cycles += cost.cycles
