"""Rotary position embedding as two tables, with the frequency scalings that models are published with.

The formulas are those of transformers' ``modeling_rope_utils.py``; YaRN is arXiv 2309.00071.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import CheckpointError

STATIC_SCALINGS = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotaryEmbedding:
    """``inverse_frequencies [hd / 2]`` float64 and the factor on cosine and sine."""

    inverse_frequencies: NDArray[np.float64]
    attention_factor: float

    def tables(self, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return cosine and sine ``[stop - start, hd / 2]`` of positions from ``start`` on."""
        # Angles in float32, as every implementation a checkpoint was trained or tested with computes them.
        angles = np.outer(np.arange(start, stop, dtype=np.float32), self.inverse_frequencies.astype(np.float32))
        factor = np.float32(self.attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor


def rotary_embedding(
    *, head_dim: int, theta: float, scaling: dict[str, Any] | None, max_positions: int
) -> RotaryEmbedding:
    """Build from a config's ``rope_theta`` and ``rope_scaling``.

    Raises:
        CheckpointError: a scaling that changes with the length of the text, an unknown or an incomplete one.
    """
    try:
        return _from_parameters(dict(scaling or {}), head_dim=head_dim, theta=theta, max_positions=max_positions)
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"rope scaling {scaling} with theta {theta} is malformed: {error!r}") from error


def _from_parameters(parameters: dict[str, Any], *, head_dim: int, theta: float, max_positions: int) -> RotaryEmbedding:
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    match kind:
        case "default":
            return RotaryEmbedding(inverse_frequencies=frequencies, attention_factor=1.0)
        case "linear":
            return RotaryEmbedding(inverse_frequencies=frequencies / parameters["factor"], attention_factor=1.0)
        case "llama3":
            return RotaryEmbedding(inverse_frequencies=_llama3(frequencies, parameters), attention_factor=1.0)
        case "yarn":
            return _yarn(frequencies, parameters, head_dim=head_dim, theta=theta, max_positions=max_positions)
        case "proportional":
            return RotaryEmbedding(inverse_frequencies=_proportional(frequencies, parameters), attention_factor=1.0)
        case _:
            raise CheckpointError(f"rope scaling {kind!r} is not supported; supported are {list(STATIC_SCALINGS)}")


def _llama3(frequencies: NDArray[np.float64], parameters: dict[str, Any]) -> NDArray[np.float64]:
    original = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    blended: NDArray[np.float64] = (1 - smooth) * frequencies / parameters["factor"] + smooth * frequencies
    return blended


def _proportional(frequencies: NDArray[np.float64], parameters: dict[str, Any]) -> NDArray[np.float64]:
    """Let only the first frequencies turn; the halves of a head are paired as if all did."""
    rotated = int(parameters.get("partial_rotary_factor", 1.0) * len(frequencies))
    turning = np.arange(len(frequencies)) < rotated
    return np.where(turning, frequencies / parameters.get("factor", 1.0), 0.0)


def _yarn(
    frequencies: NDArray[np.float64], parameters: dict[str, Any], *, head_dim: int, theta: float, max_positions: int
) -> RotaryEmbedding:
    original = parameters.get("original_max_position_embeddings") or max_positions
    factor = parameters["factor"]

    def dimension_of(rotations: float) -> float:
        """Return the dimension that turns this often over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (dimension_of(parameters.get(key, turns)) for key, turns in (("beta_fast", 32), ("beta_slow", 1)))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return RotaryEmbedding(
        inverse_frequencies=frequencies / factor * ramp + frequencies * (1 - ramp),
        attention_factor=_yarn_attention_factor(factor, parameters),
    )


def _yarn_attention_factor(factor: float, parameters: dict[str, Any]) -> float:
    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if (given := parameters.get("attention_factor")) is not None:
        return float(given)
    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all:
        return magnitude(factor, mscale) / magnitude(factor, mscale_all)
    return magnitude(factor)
