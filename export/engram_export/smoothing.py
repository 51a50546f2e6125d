"""Smoothing: factors moved from a layer's inputs into its weights, exactly, by what makes the inputs.

Inputs with a few large columns lose the others to rounding. Dividing a column by a factor and multiplying the weight's
column by it changes no product (Xiao et al., arXiv 2211.10438, with alpha 0.5); the division is folded into the gain of
the norm before, the rows of ``up`` or the rows of the values. Factors are powers of two, so folding rounds nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import nn

from engram_export.attention import Attention
from engram_export.text_decoder import Layer, Mlp
from engram_export.weight_map import Scale

Floats = NDArray[np.float32]
MAX_EXPONENT = 16  # of a factor, far above any that helps


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What makes an input of linear layers, and the layers.

    Attributes:
        producer: the parameter whose rows from ``first_row`` on are divided by the factors.
        consumers: linear layers whose columns are multiplied by them.
        places: ``[K]``, which factor a column takes.
    """

    producer: str
    first_row: int
    consumers: Sequence[str]
    places: NDArray[np.intp]

    @property
    def size(self) -> int:
        """Number of factors."""
        return int(self.places.max()) + 1

    def factors(self, inputs: Floats, weights: Sequence[Floats]) -> Floats:
        """Return the factors for the largest magnitudes ``[K]`` of inputs and the consumers' ``[N, K]``."""
        columns = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
        largest_input, largest_weight = (self._largest(values) for values in (inputs, columns))
        used = (largest_input > 0) & (largest_weight > 0)
        ratios = np.divide(largest_input, largest_weight, out=np.ones_like(largest_input), where=used)
        exponents = np.rint(np.log2(ratios) / 2).clip(-MAX_EXPONENT, MAX_EXPONENT)
        values: Floats = np.exp2(exponents, dtype=np.float32)
        return values

    def _largest(self, columns: Floats) -> Floats:
        largest = np.zeros(self.size, dtype=np.float32)
        np.maximum.at(largest, self.places, columns)
        return largest


def is_dense(layer: nn.Module) -> TypeGuard[Layer]:
    """Return whether a layer is attention and SwiGLU, which `layer_folds` knows."""
    return isinstance(layer, Layer) and type(layer.mixer) is Attention and isinstance(layer.feed_forward, Mlp)


def layer_folds(name: str, layer: Layer) -> list[Fold]:
    """Return what can be smoothed in a layer of attention and SwiGLU."""
    mixer, feed_forward = layer.mixer, layer.feed_forward
    assert isinstance(mixer, Attention)
    assert isinstance(feed_forward, Mlp)
    config = mixer.config
    hidden, between = np.arange(config.hidden_size), np.arange(feed_forward.intermediate_size)
    qkv = [f"{name}.mixer.qkv", *([f"{name}.mixer.gate"] if config.output_gate else [])]
    values = np.arange(config.num_kv_heads * config.head_dim).reshape(config.num_kv_heads, 1, config.head_dim)
    shared = values.repeat(config.num_heads // config.num_kv_heads, axis=1).reshape(-1)  # by the heads of a group
    first_value = (config.num_heads + config.num_kv_heads) * config.head_dim
    return [
        Fold(f"{name}.mixer_norm.weight", 0, qkv, hidden),
        Fold(f"{name}.mixer.qkv.weight", first_value, [f"{name}.mixer.output"], shared),
        Fold(f"{name}.feed_forward_norm.weight", 0, [f"{name}.feed_forward.gate_up"], hidden),
        Fold(f"{name}.feed_forward.gate_up.weight", len(between), [f"{name}.feed_forward.down"], between),
    ]


def weight_scales(
    folds: Sequence[Fold], factors: Mapping[str, Floats], shape: Callable[[str], Sequence[int]]
) -> dict[str, Scale]:
    """Return how weights change by name.

    Args:
        factors: of each fold, by producer.
        shape: returns that of a weight.
    """
    touched = {fold.producer for fold in folds} | {f"{name}.weight" for fold in folds for name in fold.consumers}
    scales = {
        name: Scale(
            np.ones(shape(name)[0], dtype=np.float32),
            np.ones(shape(name)[1], dtype=np.float32) if len(shape(name)) == 2 else None,
        )
        for name in touched
    }
    for fold in folds:
        values = factors[fold.producer]
        scales[fold.producer].rows[fold.first_row : fold.first_row + fold.size] /= values
        for name in fold.consumers:
            columns = scales[f"{name}.weight"].columns
            assert columns is not None
            columns *= values[fold.places]
    return scales
