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


@dataclass(slots=True)
class RowsWaits:
    """Rows of a site in all forward passes.

    Attributes:
        passes: how many there were.
        fetch_s: from a pass's begin until all sites' rows up to this one were there, measured.
        until_s: of the accelerator from a pass's begin until the site's layer, simulated.
        hidden_s: what the second hides of the first.
    """

    passes: int = 0
    fetch_s: float = 0.0
    until_s: float = 0.0
    hidden_s: float = 0.0


class Ledger:
    """Costs so far.

    Attributes:
        layers: by the weight's name, in the order of the graph.
        waits: by the site's place in manifest order.
        passes: how many forward passes there were.
        host_s: measured in them outside the accelerator and without waiting for rows.
    """

    def __init__(self, layers: Sequence[str], clock_hz: int) -> None:
        self._names = layers
        self._clock_hz = clock_hz
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.layers = {name: LayerCost() for name in self._names}
        self.waits: dict[int, RowsWaits] = {}
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

    def add_wait(self, site: int, fetch_s: float, device_cycles: int) -> None:
        """Count a pass that reached a site's layer ``device_cycles`` after its begin."""
        entry, until_s = self.waits.setdefault(site, RowsWaits()), device_cycles / self._clock_hz
        entry.passes += 1
        entry.fetch_s += fetch_s
        entry.until_s += until_s
        entry.hidden_s += min(fetch_s, until_s)
