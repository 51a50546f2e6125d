"""Run a text decoder layer by layer, so that only one layer's weights are in memory, over windows of a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engram_export.decoder import Stateful, Step
from engram_export.engram_site import EngramSite
from engram_export.formats import FLOAT, WeightFormat
from engram_export.linear import FloatLinear
from engram_export.operators import TWO_PLANES
from engram_export.source import ModelSource, load_parameters
from engram_export.streamed import streamed_format
from engram_export.text_decoder import Layer, TextDecoder
from engram_export.verify import checkpoint_rows


class ObservedLinear(FloatLinear):
    """A float layer that tells its inputs ``[T, K]``, or rounds them to one plane of int8.

    Attributes:
        observe: is given the inputs, where it is set.
        planes: of two, inputs are left as they are: what two lose can't be measured.
    """

    def __init__(self, name: str, in_features: int, out_features: int) -> None:
        super().__init__(name, in_features, out_features)
        self.observe: Callable[[Tensor], None] | None = None
        self.planes = TWO_PLANES

    def forward(self, x: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(x)
        return functional.linear(one_plane(x) if self.planes == 1 else x, self.weight)


def one_plane(x: Tensor) -> Tensor:
    """Round the rows of ``[T, K]`` to int8 with one scale each."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.where(scale == 0, x, torch.round(x / scale) * scale)


@dataclass(frozen=True, slots=True, eq=False)
class LayerwiseModel:
    """A text decoder whose layers get their weights one after another; all else has them, or streams them."""

    source: ModelSource
    module: TextDecoder

    def layer(self, index: int) -> Layer:
        """Return a layer, without weights unless it was loaded."""
        layer: Layer = self.module.layers[index]  # type: ignore[assignment]
        return layer

    def load(self, index: int, source: ModelSource) -> None:
        """Fill a layer's parameters from ``source``."""
        layer = self.layer(index).to_empty(device="cpu")
        for name, module in layer.named_modules(prefix=f"layers.{index}"):
            load_parameters(source, name, module)

    def drop(self, index: int) -> None:
        """Free a layer's parameters."""
        self.layer(index).to_empty(device="meta")

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the stream before the first layer ``[T, D]``."""
        embedded: Tensor = self.module.embedding(token_ids)
        return embedded

    def run(self, index: int, hidden: Sequence[Tensor], token_ids: Sequence[Tensor]) -> list[Tensor]:
        """Map the stream ``[T, D]`` of each window through a loaded layer, and the site before it."""
        return [self._run_window(index, x, ids) for x, ids in zip(hidden, token_ids, strict=True)]

    def _run_window(self, index: int, x: Tensor, token_ids: Tensor) -> Tensor:
        layer, sites = self.layer(index), self.module.sites
        site: EngramSite | None = sites[str(index)] if str(index) in sites else None  # type: ignore[assignment]  # noqa: SIM401
        modules = [*layer.modules(), *([] if site is None else site.modules())]
        specs = [spec for module in modules if isinstance(module, Stateful) for spec in module.state_specs]
        step = Step(
            token_ids=token_ids,
            position=torch.zeros(1, dtype=torch.int64),
            rows={} if site is None else self._rows(site, token_ids.numpy()),
            states={spec.name: torch.zeros(spec.shape) for spec in specs},
            rotations=self.module.rotation_tables(),
        )
        with torch.no_grad():
            updated: Tensor = layer(x if site is None else site(x, step), step)
        return updated

    def _rows(self, site: EngramSite, token_ids: NDArray[np.int64]) -> dict[str, Tensor]:
        (table,) = (table for table in self.source.tables if table.site == site.config.site)
        return {table.site: torch.from_numpy(checkpoint_rows(table, self.source, token_ids))}


def open_layers(source: ModelSource, window: int) -> LayerwiseModel:
    """Return a dense text decoder for texts of ``window`` tokens, its layers without weights."""
    with torch.device("meta"):
        module = source.build(_layerwise_format(source), context_length=window)
    assert isinstance(module, TextDecoder)
    for name, part in module.named_modules():
        if not name.startswith("layers."):
            part.to_empty(device="cpu", recurse=False)
            load_parameters(source, name, part)
    return LayerwiseModel(source, module)


def _layerwise_format(source: ModelSource) -> WeightFormat:
    streamed = streamed_format(FLOAT, source)

    def linear(name: str, in_features: int, out_features: int) -> torch.nn.Module:
        make = ObservedLinear if name.startswith("layers.") else streamed.make_linear
        return make(name, in_features, out_features)

    return WeightFormat(linear, streamed.make_embedding, streamed.make_expert_linear)
