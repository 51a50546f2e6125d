"""Turn a GGUF file's rope scaling into the ``rope_scaling`` of a Hugging Face config: linear, yarn or llama3."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_export.gguf_header import GgufHeader, shortest_float
from engram_export.source_files import read_exactly
from engram_runtime.errors import CheckpointError

FACTORS_TENSOR = "rope_freqs.weight"  # divisors of the rotary frequencies, how llama.cpp stores Llama 3's scaling
MAX_FACTORS = 1 << 12  # heads of 8192 values; published ones have 64 to 256
REPRODUCTION_ERROR = 1e-5  # relative; the factors are stored in float32
YARN_KEYS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
SCALING_KEYS = {"type", "factor", "original_context_length", "finetuned", *YARN_KEYS}


def rope_scaling(header: GgufHeader, arch: str, theta: float) -> dict[str, Any] | None:
    """Return the scaling of the rotary positions, or None if there is none."""
    prefix = f"{arch}.rope.scaling."
    kind = header.get(f"{prefix}type", str) or "none"
    for key in header.metadata:
        if key.startswith(prefix) and key.removeprefix(prefix) not in SCALING_KEYS:
            raise CheckpointError(f"{key!r} of {header.path} is not supported; export from safetensors")
    if FACTORS_TENSOR in header.tensors:
        if kind != "none":
            raise CheckpointError(f"{header.path} has rope factors and scaling {kind!r}; export from safetensors")
        return _llama3(header, theta)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(
            f"'{prefix}type' of {header.path} is {kind!r}, supported are none, linear and yarn; export from safetensors"
        )
    scaling = {"rope_type": kind, "factor": shortest_float(header.positive(f"{prefix}factor", float))}
    return scaling | (_yarn(header, prefix) if kind == "yarn" else {})


def _yarn(header: GgufHeader, prefix: str) -> dict[str, Any]:
    betas = {name: header.get(prefix + key, float) for key, name in YARN_KEYS.items()}
    return {
        "original_max_position_embeddings": header.positive(f"{prefix}original_context_length", int),
        **{name: shortest_float(value) for name, value in betas.items() if value is not None},
    }


def _llama3(header: GgufHeader, theta: float) -> dict[str, Any] | None:
    tensor = header.tensors[FACTORS_TENSOR]
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MAX_FACTORS:
        raise CheckpointError(
            f"tensor {FACTORS_TENSOR!r} of {header.path} is {tensor.type.name} {list(tensor.shape)}, "
            f"wanted F32 with one factor per frequency; convert the file again"
        )
    factors = read_exactly(header.path, tensor.offset, tensor.num_bytes).view("<f4").astype(np.float64)
    scaling = llama3_scaling(factors, theta)
    if scaling is None or not np.allclose(llama3_factors(scaling, theta, len(factors)), factors, REPRODUCTION_ERROR, 0):
        raise CheckpointError(
            f"tensor {FACTORS_TENSOR!r} of {header.path} is not the scaling of a Llama 3; export from safetensors"
        )
    return scaling


def llama3_scaling(factors: NDArray[np.float64], theta: float) -> dict[str, Any] | None:
    """Recover the parameters behind ``factors [hd / 2]``, or return None where there are none.

    Between the unscaled and the fully scaled frequencies, ``(1 / factor - 1 / max) / (1 - 1 / max)`` is the line
    ``(original * turns - low) / (high - low)`` over the turns per position. Only ratios of original, low and high
    matter, so low is 1, as in all published models.
    """
    largest = factors.max()
    between = (factors > 1) & (factors < largest)
    if not np.isfinite(factors).all() or between.sum() < 2:
        return None
    turns = _turns_per_position(theta, len(factors))[between]
    smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    slope, intercept = np.polyfit(turns, smooth, 1)
    if not -1000 < intercept < -1e-6:  # high would be 1 or out of all proportion
        return None
    high = 1 - 1 / intercept
    return {
        "rope_type": "llama3",
        "factor": shortest_float(largest),
        "low_freq_factor": 1.0,
        "high_freq_factor": round(float(high), 3),
        "original_max_position_embeddings": round(slope * (high - 1)),
    }


def llama3_factors(scaling: dict[str, Any], theta: float, count: int) -> NDArray[np.float64]:
    """Return the ``[count]`` divisors of the rotary frequencies that a llama3 scaling stands for."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = _turns_per_position(theta, count)
    smooth = np.clip((scaling["original_max_position_embeddings"] * turns - low) / (high - low), 0, 1)
    factors: NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return factors


def _turns_per_position(theta: float, count: int) -> NDArray[np.float64]:
    turns: NDArray[np.float64] = theta ** (-np.arange(count, dtype=np.float64) / count) / (2 * np.pi)
    return turns
