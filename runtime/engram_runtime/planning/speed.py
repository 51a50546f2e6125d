"""Predicted rates: a token's weights and cache over the memory bandwidth, a prompt's products over the kernels' rate.

Measured with SmolLM2 int8 and random models of `benchmarks/random_models.py` (12 layers in int4, 64 experts in int8),
for each kernel family on one thread of a Zen 4 core whose memory gave 32 GB/s: the best of 60 steps and of 8 prompts
of 256 tokens, as others used the machine; the portable kernels' rate of attention is scaled from one noisy run.
No command repeats that calibration: `engram plan --check` and `engram bench` tell what they come to elsewhere.
"""

import math
from dataclasses import dataclass

from engram_runtime.planning.machine import Machine
from engram_runtime.planning.outline import EXPERTS, HEAD, WHOLE, Outline

WEIGHT_SHARE, CACHE_SHARE = 0.68, 0.38  # of the memory bandwidth, at which one row reads weights and caches


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRates:
    """Products a second and thread, of a kernel family.

    Attributes:
        rows: of linear layers over many rows.
        row: over one row, or None where memory is what they wait for.
        attention: of scores and of values.
    """

    rows: float
    row: float | None
    attention: float


RATES = {
    "avx512_vnni": KernelRates(rows=95e9, row=None, attention=35e9),
    "avx2": KernelRates(rows=30e9, row=17e9, attention=19e9),
    "portable": KernelRates(rows=4.9e9, row=5.5e9, attention=1.6e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Experts that don't fit in memory.

    Attributes:
        share: of all experts' bytes that are read from the disk, as if each were as likely as any other.
        bytes_per_s: of the disk, or None where it isn't known.
    """

    share: float
    bytes_per_s: float | None

    def seconds(self, num_bytes: float) -> float:
        """Return how long it takes until experts of so many bytes are there."""
        if self.share == 0:
            return 0.0
        return math.inf if self.bytes_per_s is None else self.share * num_bytes / self.bytes_per_s


IN_MEMORY = Storage(share=0.0, bytes_per_s=None)


def decode_s(outline: Outline, machine: Machine, depth: int, storage: Storage = IN_MEMORY) -> float:
    """Return the seconds of a token after ``depth`` others; infinity where they can't be told."""
    bandwidth = machine.bandwidth_gb_s * 1e9
    weights = (outline.whole_bytes + outline.expert_bytes) / (bandwidth * WEIGHT_SHARE)
    rates = RATES.get(machine.kernels)
    if rates is not None and rates.row is not None:
        weights = max(weights, products(outline) / (rates.row * machine.threads))
    return weights + outline.cache_bytes(depth) / (bandwidth * CACHE_SHARE) + storage.seconds(outline.expert_bytes)


def prefill_s(outline: Outline, machine: Machine, tokens: int, storage: Storage = IN_MEMORY) -> float | None:
    """Return the seconds of a prompt; None where the kernels were never timed."""
    if (rates := RATES.get(machine.kernels)) is None:
        return None
    passes = math.ceil(tokens / machine.chunk)
    experts = sum(
        part.packed_bytes * (1 - (1 - part.chosen / part.copies) ** min(machine.chunk, tokens))
        for part in outline.of(EXPERTS)
    )
    streamed = passes * (outline.whole_bytes + experts) / (machine.bandwidth_gb_s * 1e9 * WEIGHT_SHARE)
    pairs = 2 * outline.attention_width * tokens * tokens // 2
    body = products(outline) - sum(part.values for part in outline.of(HEAD))
    computed = body * tokens / rates.rows + pairs / rates.attention
    return max(streamed, computed / machine.threads) + storage.seconds(passes * experts)


def products(outline: Outline) -> int:
    """Return the products of one token with the weights it reads."""
    return sum(part.read(part.values) for part in outline.of(*WHOLE, EXPERTS))
