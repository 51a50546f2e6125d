"""What a graph says of its sites: how far each opened, and how much it changed the residual streams."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class SiteActivity:
    """A site's work on T tokens and G residual streams; arrays are float32 ``[T, G]``.

    Attributes:
        gate: what the rows' value is multiplied by, from 0 to 1. On rows of zeros it says nothing.
        added: L2 norm of all that the site added to a stream: gated values, their convolution, the output scale.
        stream: L2 norm of that stream before the site.
    """

    gate: Values
    added: Values
    stream: Values

    @classmethod
    def of(cls, values: Values) -> Self:
        """Name the values ``[T, G, 3]`` of a graph's output."""
        return cls(*np.moveaxis(values, -1, 0))

    @property
    def contribution(self) -> Values:
        """``[T]``: the norm of what was added to all streams over theirs before; 0 where nothing was added."""
        added, stream = (np.linalg.norm(norms, axis=1) for norms in (self.added, self.stream))
        ratio: Values = np.divide(added, stream, out=np.zeros_like(added), where=added > 0)
        return ratio


Activity = Mapping[str, SiteActivity]  # by site
