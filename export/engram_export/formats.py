"""The quantisations of ``--quant``: which weight format each part of a model gets."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from engram_export.experts import ExpertFactory, FloatExpertLinear, Int4ExpertLinear, Int8ExpertLinear
from engram_export.linear import (
    BlockLinear,
    FloatEmbedding,
    FloatLinear,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    LinearFactory,
)
from engram_export.quantise import ALWAYS_INT8

EmbeddingFactory = Callable[[str, int, int], FloatEmbedding | Int8Embedding]  # (name, vocab_size, hidden_size)

KEPT_BITS = {"Q4_0": 4, "Q8_0": 8}  # GGUF types whose integers and scales can be taken over exactly


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Factories for the linear layers, the embedding and the layers of experts."""

    make_linear: LinearFactory
    make_embedding: EmbeddingFactory
    make_expert_linear: ExpertFactory


FLOAT = WeightFormat(FloatLinear, FloatEmbedding, FloatExpertLinear)


def count_formats(graphs: Iterable[nn.Module]) -> dict[str, int]:
    """Return how many weight matrices of each format graphs have; those of the same name are one."""
    modules = {name: module for graph in graphs for name, module in graph.named_modules()}
    return dict(Counter(str(module.label) for module in modules.values() if hasattr(module, "label")))


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """Of a linear layer: ``label`` is that of the weight, ``planes`` of int8 hold a row of its inputs."""

    label: str
    planes: int


def calibrated_format(formats: Callable[[str], LinearFormat | None]) -> WeightFormat:
    """Return int4 with the layers that were calibrated, by name, as they were found to need."""
    plain = weight_format("int4", lambda name: None)

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        if (found := formats(name)) is None:
            return plain.make_linear(name, in_features, out_features)
        make = Int8Linear if found.label == Int8Linear.label else Int4Linear
        return make(name, in_features, out_features, found.planes)

    return dataclasses.replace(plain, make_linear=linear)


def weight_format(quant: str, kept_type: Callable[[str], str | None]) -> WeightFormat:
    """Return the format of a ``--quant`` choice.

    Args:
        kept_type: for a linear layer's name, the GGUF type all its tensors share, or None.
    """

    def int4_or_int8(name: str, in_features: int, out_features: int) -> nn.Module:
        linear = Int4Linear if ALWAYS_INT8.isdisjoint(name.split(".")) else Int8Linear
        return linear(name, in_features, out_features)

    def kept_or_int8(name: str, in_features: int, out_features: int) -> nn.Module:
        if bits := KEPT_BITS.get(kept_type(name) or ""):
            return BlockLinear(name, in_features, out_features, bits)
        return Int8Linear(name, in_features, out_features)

    formats = {
        "none": FLOAT,
        "int8": WeightFormat(Int8Linear, Int8Embedding, Int8ExpertLinear),
        "int4": WeightFormat(int4_or_int8, Int8Embedding, Int4ExpertLinear),
        "keep": WeightFormat(kept_or_int8, Int8Embedding, Int8ExpertLinear),
    }
    return formats[quant]
