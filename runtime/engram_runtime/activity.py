"""What a graph says of its sites: how far each opened, and how much it changed the residual streams."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.manifest import ACTIVITY

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class SiteActivity:
    """A site's work on T tokens and G residual streams: the graph's output ``[T, G, 3]``, its three values named."""

    values: Values

    @property
    def gate(self) -> Values:
        """``[T, G]``, what the rows' value is multiplied by, from 0 to 1; on rows of zeros it means nothing."""
        return self.values[..., 0]

    @property
    def added(self) -> Values:
        """``[T, G]``, L2 norm of all the site adds to a stream: gated value, its convolution, the output scale."""
        return self.values[..., 1]

    @property
    def stream(self) -> Values:
        """``[T, G]``, L2 norm of the stream before the site."""
        return self.values[..., 2]

    @property
    def contribution(self) -> Values:
        """``[T]``, norm of what is added to all streams over theirs before.

        0 where nothing is added, also to zeros; infinite where something is added to zeros.
        """
        added, stream = (np.linalg.norm(norms, axis=1) for norms in (self.added, self.stream))
        with np.errstate(divide="ignore"):
            ratio: Values = np.divide(added, stream, out=np.zeros_like(added), where=added > 0)
        return ratio


Activity = Mapping[str, SiteActivity]  # by site


def activity_of(told: Mapping[str, Values]) -> Activity:
    """Return what a pass said of its sites, of all that it said beside the logits."""
    return {
        name.removeprefix(ACTIVITY): SiteActivity(values) for name, values in told.items() if name.startswith(ACTIVITY)
    }
