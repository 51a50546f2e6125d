"""Qwen Sparse Attention: an indexer chooses the blocks of tokens that a query attends to.

Reference: transformers ``modeling_qwen4_exp.py``, ``Qwen4ExpTextAttention`` and ``Qwen4ExpTextQSAIndexer``.
"""

from dataclasses import dataclass

from torch import Tensor

from engram_export.attention import Attention, AttentionConfig
from engram_export.attention_operators import indexed_attention
from engram_export.decoder import Step
from engram_export.formats import WeightFormat
from engram_export.norms import RmsNorm
from engram_runtime.manifest import StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerConfig:
    """Query heads and their size, and how many tokens of complete blocks are chosen."""

    num_heads: int
    head_dim: int
    budget: int
    block: int
    norm_eps: float


class IndexedAttention(Attention):
    """Attention over chosen blocks; the index keys are a third positional state."""

    def __init__(
        self,
        name: str,
        layer: int,
        config: AttentionConfig,
        indexer: IndexerConfig,
        *,
        context_length: int,
        weights: WeightFormat,
    ) -> None:
        super().__init__(name, layer, config, context_length=context_length, weights=weights)
        self.indexer = indexer
        shape = (1, 1, context_length, indexer.head_dim)
        index = StateSpec(name=f"index.{layer}", dtype="float32", shape=shape, kind="positional")
        self.state_specs = (*self.state_specs, index)
        self.index = weights.make_linear(
            f"{name}.index", config.hidden_size, (indexer.num_heads + 1) * indexer.head_dim
        )
        self.index_query_norm = RmsNorm(indexer.head_dim, indexer.norm_eps)
        self.index_key_norm = RmsNorm(indexer.head_dim, indexer.norm_eps)

    def attend(self, qkv: Tensor, x: Tensor, step: Step) -> Tensor:
        """See `Attention.attend`."""
        keys, values, index = (spec.name for spec in self.state_specs)
        attended, step.states[keys], step.states[values], step.states[index] = indexed_attention(
            qkv,
            self.index(x),
            self.index_query_norm.weight,
            self.index_key_norm.weight,
            step.states[keys],
            step.states[values],
            step.states[index],
            step.position,
            *step.rotations["full"],
            num_heads=self.config.num_heads,
            scale=self.config.head_dim**-0.5,
            budget=self.indexer.budget,
            block=self.indexer.block,
            eps=self.indexer.norm_eps,
        )
        return attended
