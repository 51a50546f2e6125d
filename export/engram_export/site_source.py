"""Sites and tables of a checkpoint that are exported without a decoder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import nn

from engram_export.checkpoint import Checkpoint
from engram_export.host_table import TableSource
from engram_export.linear import LinearFactory
from engram_export.multi_stream_site import MultiStreamConfig, MultiStreamSite
from engram_export.text_decoder import TextConfig
from engram_export.weight_map import Slice, WeightSource


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteSource:
    """One site: its table, its sizes and its weights by the names of the module's parameters."""

    table: TableSource
    config: MultiStreamConfig
    weights: WeightSource

    @property
    def name(self) -> str:
        """The site's name in the bundle."""
        return self.table.site

    def build(self, make_linear: LinearFactory) -> MultiStreamSite:
        """Make the site's module with uninitialised parameters."""
        return MultiStreamSite(self.config, make_linear)

    def row_slices(self, name: str) -> list[tuple[int, int]]:
        """See `engram_export.streamed.EncodedRows`."""
        return self.weights.row_slices(f"{name}.weight")

    def encode(self, name: str, module: Any, start: int, stop: int) -> Mapping[str, NDArray[Any]]:
        """See `engram_export.streamed.EncodedRows`."""
        arrays: Mapping[str, NDArray[Any]] = module.encode(self.weights.read_rows(f"{name}.weight", start, stop))
        return arrays

    def parameters(self, module: nn.Module) -> Iterator[Slice]:
        """Yield the parameters of a module of `build`, read and encoded slice by slice."""
        yield "gain", 0, self.weights.read("gain")
        linear = module.get_submodule("key_value")
        for start, stop in self.row_slices("key_value"):
            arrays = self.encode("key_value", linear, start, stop)
            yield from ((f"key_value.{key}", start, values) for key, values in arrays.items())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TablesSource:
    """A checkpoint whose sites are exported by themselves."""

    checkpoint: Checkpoint
    text: TextConfig
    sites: tuple[SiteSource, ...]
