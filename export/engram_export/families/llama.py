"""Llama and what rides on it: RMSNorm, rotary positions, grouped-query attention, SwiGLU; Qwen3 adds q/k norms.

Reference: transformers ``modeling_llama.py`` and ``modeling_qwen3.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engram_export.attention_operators import group_query_attention
from engram_export.checkpoint import Checkpoint
from engram_export.engram_site import EngramSite
from engram_export.linear import FloatEmbedding, Int8Embedding, LinearFactory
from engram_export.norms import RmsNorm
from engram_export.rope import RotaryEmbedding, rotary_embedding
from engram_runtime.errors import CheckpointError

# Weight of the module -> tensors of the checkpoint, joined along the output axis.
NAME_MAP: Mapping[str, tuple[str, ...]] = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "layers.{layer}.attention_norm.weight": ("model.layers.{layer}.input_layernorm.weight",),
    "layers.{layer}.qkv.weight": (
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
    ),
    "layers.{layer}.query_norm.weight": ("model.layers.{layer}.self_attn.q_norm.weight",),
    "layers.{layer}.key_norm.weight": ("model.layers.{layer}.self_attn.k_norm.weight",),
    "layers.{layer}.output.weight": ("model.layers.{layer}.self_attn.o_proj.weight",),
    "layers.{layer}.mlp_norm.weight": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "layers.{layer}.gate_up.weight": (
        "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
    ),
    "layers.{layer}.down.weight": ("model.layers.{layer}.mlp.down_proj.weight",),
    "norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
# Tensors older checkpoints carry although they are computed from the config.
IGNORED = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)

# Far above any published model: what a config may claim before anything is allocated for it.
LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 24,
}

EmbeddingFactory = Callable[[str, int, int], FloatEmbedding | Int8Embedding]  # (name, vocab_size, hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The architecture."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RotaryEmbedding
    max_positions: int
    tied: bool
    qk_norm: bool


def read_config(checkpoint: Checkpoint) -> LlamaConfig:
    """Read a config of ``model_type`` llama or qwen3."""
    hidden_size = _count(checkpoint, "hidden_size")
    num_heads = _count(checkpoint, "num_attention_heads")
    head_dim = _count(checkpoint, "head_dim", default=hidden_size // num_heads)
    max_positions = _count(checkpoint, "max_position_embeddings")
    _refuse_unsupported(checkpoint)
    return LlamaConfig(
        family=checkpoint.require("model_type", str),
        vocab_size=_count(checkpoint, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_count(checkpoint, "intermediate_size"),
        num_layers=_count(checkpoint, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_count(checkpoint, "num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        rms_norm_eps=checkpoint.require("rms_norm_eps", float),
        rope=_rope(checkpoint, head_dim, max_positions),
        max_positions=max_positions,
        tied=bool(checkpoint.config.get("tie_word_embeddings", False)),
        qk_norm=checkpoint.require("model_type", str) == "qwen3",
    )


def _count(checkpoint: Checkpoint, key: str, *, default: int | None = None) -> int:
    if default is not None and checkpoint.config.get(key) is None:
        return default
    value, limit = checkpoint.require(key, int), LIMITS[key]
    if not 1 <= value <= limit:
        raise CheckpointError(
            f"{key!r} in {checkpoint.config_name} is {value}, wanted 1 to {limit}; correct the config"
        )
    return value


def _rope(checkpoint: Checkpoint, head_dim: int, max_positions: int) -> RotaryEmbedding:
    # transformers 5 keeps theta and the scaling in one block, earlier releases in two keys.
    parameters = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"the rope scaling in {checkpoint.config_name} is {parameters!r:.80}, wanted an object")
    theta = parameters.get("rope_theta", checkpoint.config.get("rope_theta", 10000.0))
    return rotary_embedding(head_dim=head_dim, theta=theta, scaling=parameters, max_positions=max_positions)


def _refuse_unsupported(checkpoint: Checkpoint) -> None:
    wanted = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
    }
    for key, value in wanted.items():
        if (found := checkpoint.config.get(key, value)) != value:
            raise CheckpointError(f"{key!r} in {checkpoint.config_name} is {found!r}, only {value!r} is supported")


class LlamaLayer(nn.Module):
    """Attention and SwiGLU around one residual stream."""

    def __init__(self, config: LlamaConfig, index: int, make_linear: LinearFactory) -> None:
        super().__init__()
        heads = config.num_heads + 2 * config.num_kv_heads
        name = f"layers.{index}"
        self.config = config
        self.attention_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv = make_linear(f"{name}.qkv", config.hidden_size, heads * config.head_dim)
        self.query_norm = RmsNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.key_norm = RmsNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.output = make_linear(f"{name}.output", config.num_heads * config.head_dim, config.hidden_size)
        self.mlp_norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up = make_linear(f"{name}.gate_up", config.hidden_size, 2 * config.intermediate_size)
        self.down = make_linear(f"{name}.down", config.intermediate_size, config.hidden_size)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map ``x [T, D]`` and the caches to outputs and the caches with T more entries."""
        attended, keys, values = group_query_attention(
            self._normalised(self.qkv(self.attention_norm(x))),
            keys,
            values,
            position,
            cos,
            sin,
            num_heads=self.config.num_heads,
            scale=self.config.head_dim**-0.5,
        )
        x = x + self.output(attended)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up), keys, values

    def _normalised(self, qkv: Tensor) -> Tensor:
        if self.query_norm is None or self.key_norm is None:
            return qkv
        sizes = [count * self.config.head_dim for count in (self.config.num_heads, self.config.num_kv_heads)]
        query, key, value = torch.split(qkv, [*sizes, sizes[1]], dim=-1)
        normed = [
            norm(torch.unflatten(part, -1, (-1, self.config.head_dim))).flatten(-2)
            for norm, part in ((self.query_norm, query), (self.key_norm, key))
        ]
        return torch.cat([*normed, value], dim=-1)


class LlamaModel(nn.Module):
    """The decoder, its Engram sites before the layers they belong to."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        context_length: int,
        make_linear: LinearFactory,
        make_embedding: EmbeddingFactory,
        sites: Sequence[EngramSite],
    ) -> None:
        super().__init__()
        self.config = config
        self.context_length = context_length
        self.embedding = make_embedding("embedding", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, index, make_linear) for index in range(config.num_layers))
        self.sites = nn.ModuleDict({str(site.config.layer_id): site for site in sites})
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tied else make_linear("lm_head", config.hidden_size, config.vocab_size)
        self.cos = nn.Parameter(torch.empty(context_length, config.head_dim // 2), requires_grad=False)
        self.sin = nn.Parameter(torch.empty(context_length, config.head_dim // 2), requires_grad=False)

    def forward(
        self, token_ids: Tensor, position: Tensor, logit_rows: Tensor, rows: list[Tensor], states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run T tokens after ``position [1]`` earlier ones.

        Args:
            token_ids: ``[T]`` int64.
            logit_rows: ``[R]`` int64, which of the T tokens get logits.
            rows: ``[T, C, d]`` float32 per site.
            states: key and value cache of each layer, then the convolution window of each site that has one.

        Returns:
            ``[R, V]`` logits and the next states, in the order of ``states``.
        """
        caches, windows = states[: 2 * len(self.layers)], list(states[2 * len(self.layers) :])
        next_caches: list[Tensor] = []
        next_windows: list[Tensor] = []
        remaining = dict(zip(self.sites, rows, strict=True))
        x = self.embedding(token_ids)
        for index, layer in enumerate(self.layers):
            if str(index) in remaining:
                site = self.sites[str(index)]
                x, window = site(x, remaining[str(index)], windows.pop(0) if site.conv else None)
                next_windows += [] if window is None else [window]
            x, keys, values = layer(x, caches[2 * index], caches[2 * index + 1], position, self.cos, self.sin)
            next_caches += [keys, values]
        x = self.norm(x.index_select(0, logit_rows))
        logits = self.embedding.logits(x) if self.lm_head is None else self.lm_head(x)
        return logits, *next_caches, *next_windows
