"""Weight formats whose modules hold nothing: each forward reads its weight slice by slice.

A model of any size runs in the memory of one slice and its activations; a forward pass costs one reading.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_export.formats import WeightFormat
from engram_export.safetensors_file import SafetensorsFile


class EncodedRows(Protocol):
    """Where the parameters of a module come from."""

    def row_slices(self, name: str) -> list[tuple[int, int]]:
        """Return row ranges that each fit in memory."""
        ...

    def encode(self, name: str, module: Any, start: int, stop: int) -> Mapping[str, NDArray[Any]]:
        """Return the parameters for rows of the weight of module ``name``."""
        ...


@dataclass(frozen=True, slots=True)
class BundleRows:
    """The parameters as they stand in a bundle's weights file."""

    source: EncodedRows
    weights: SafetensorsFile

    @classmethod
    def open(cls, source: EncodedRows, path: Path) -> "BundleRows":
        """Open the weights file of a bundle exported from ``source``."""
        return cls(source, SafetensorsFile(path))

    def row_slices(self, name: str) -> list[tuple[int, int]]:
        """See `EncodedRows`."""
        return self.source.row_slices(name)

    def encode(self, name: str, module: nn.Module, start: int, stop: int) -> Mapping[str, NDArray[Any]]:
        """See `EncodedRows`."""
        return {key: self.weights.read_raw_rows(f"{name}.{key}", start, stop) for key, _ in module.named_parameters()}


class StreamedLinear(nn.Module):
    """A linear layer ``[N, K]`` of some format."""

    def __init__(self, source: EncodedRows, make: Callable[[int], nn.Module], name: str) -> None:
        super().__init__()
        self._source, self._make, self._name = source, make, name  # makes the layer for a number of rows

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, K]`` to ``[T, N]``."""
        return torch.cat([part(x) for part in self._slices()], dim=-1)

    def restricted(self, x: Tensor, outputs: Tensor) -> Tensor:
        """Map ``[T, K]`` to ``[T, n]``, the outputs ``[n]`` alone."""
        found = torch.empty(len(x), len(outputs))
        for start, stop in self._source.row_slices(self._name):
            here = (outputs >= start) & (outputs < stop)
            found[:, here] = self.rows(start, stop).restricted(x, outputs[here] - start)
        return found

    def _slices(self) -> Iterator[Any]:
        for start, stop in self._source.row_slices(self._name):
            yield self.rows(start, stop)

    def rows(self, start: int, stop: int) -> Any:
        """Return the layer for rows of the weight."""
        module = self._make(stop - start)
        arrays = self._source.encode(self._name, module, start, stop)
        for key, parameter in module.named_parameters():
            parameter.data = torch.from_numpy(arrays[key]).reshape(parameter.shape)
        return module


class StreamedEmbedding(StreamedLinear):
    """An embedding ``[V, D]`` of some format; `logits` is the tied head."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``[T]`` ids, ``[T, D]``; only their rows are read."""
        distinct, places = torch.unique(ids, return_inverse=True)
        rows = [self.rows(token_id, token_id + 1)(torch.zeros(1, dtype=torch.int64)) for token_id in distinct.tolist()]
        return torch.cat(rows)[places]

    def logits(self, x: Tensor) -> Tensor:
        """Return ``[R, V]`` for ``x [R, D]``."""
        return torch.cat([part.logits(x) for part in self._slices()], dim=-1)


@dataclass(frozen=True, slots=True)
class ReportedRows:
    """Parameters whose bytes are reported as they are read."""

    rows: EncodedRows
    progress: Callable[[int], None]

    def row_slices(self, name: str) -> list[tuple[int, int]]:
        """See `EncodedRows`."""
        return self.rows.row_slices(name)

    def encode(self, name: str, module: Any, start: int, stop: int) -> Mapping[str, NDArray[Any]]:
        """See `EncodedRows`."""
        arrays = self.rows.encode(name, module, start, stop)
        self.progress(sum(values.nbytes for values in arrays.values()))
        return arrays


@dataclass(frozen=True, slots=True)
class StreamedExperts:
    """The weights of one layer of all experts, read one expert at a time."""

    layer: "StreamedExpertLinear"

    def of(self, expert: int) -> Tensor:
        """Return ``[N, K]`` float32 of one expert."""
        rows: Tensor = self.layer.rows(expert, expert + 1).weights().of(0)
        return rows


class StreamedExpertLinear(StreamedLinear):
    """A layer ``[E, N, K]`` of experts of some format."""

    def weights(self) -> Any:
        """See `engram_export.experts.ExpertLinear`."""
        return StreamedExperts(self)


def streamed_format(chosen: WeightFormat, source: EncodedRows) -> WeightFormat:
    """Return a format of streamed modules that compute what those of ``chosen`` do."""

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        return StreamedLinear(source, lambda rows: chosen.make_linear(name, in_features, rows), name)

    def embedding(name: str, vocab_size: int, hidden_size: int) -> Any:
        return StreamedEmbedding(source, lambda rows: chosen.make_embedding(name, rows, hidden_size), name)

    def expert_linear(name: str, num_experts: int, in_features: int, out_features: int, parts: int) -> Any:
        def make(rows: int) -> Any:
            return chosen.make_expert_linear(name, rows, in_features, out_features, parts)

        return StreamedExpertLinear(source, make, name)

    return WeightFormat(linear, embedding, expert_linear)
