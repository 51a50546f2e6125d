"""Llama, and Qwen3 with its norms of queries and keys.

Reference: transformers ``modeling_llama.py`` and ``modeling_qwen3.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engram_export.attention import Attention, AttentionConfig
from engram_export.checkpoint import Checkpoint
from engram_export.engram_site import EngramSite
from engram_export.families.reading import check_heads, count, flag, require_values, rope
from engram_export.formats import WeightFormat
from engram_export.host_table import TableSource
from engram_export.rope import RotaryEmbedding
from engram_export.text_decoder import Layer, Mlp, TextConfig, TextDecoder
from engram_export.weight_map import Joined, Recipe

# Tensors older checkpoints carry although they are computed from the config.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
SUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaArchitecture:
    """A checkpoint of ``model_type`` llama or qwen3."""

    text: TextConfig
    attention: AttentionConfig
    intermediate_size: int
    rope: RotaryEmbedding
    ignored: Sequence[str] = IGNORED

    def name_map(self) -> dict[str, Recipe]:
        """Return what every weight is made of."""
        names = text_names("model.")
        for layer in range(self.text.num_layers):
            names |= norm_names("model.", layer) | attention_names("model.", layer) | mlp_names("model.", layer)
        return names

    def tables(self, checkpoint: Checkpoint) -> Sequence[TableSource]:
        """The family has no tables of its own."""
        return ()

    def build(self, context_length: int, weights: WeightFormat, sites: Sequence[EngramSite]) -> TextDecoder:
        """Make the model's module with uninitialised parameters."""
        layers = [
            self.layer(f"layers.{index}", index, context_length, weights) for index in range(self.text.num_layers)
        ]
        return TextDecoder(
            self.text, layers, sites, context_length=context_length, rotations={"full": self.rope}, weights=weights
        )

    def layer(self, name: str, index: int, context_length: int, weights: WeightFormat) -> Layer:
        """Make one layer; its cache is named by ``index``."""
        mixer = Attention(f"{name}.mixer", index, self.attention, context_length=context_length, weights=weights)
        mlp = Mlp(f"{name}.feed_forward", self.text.hidden_size, self.intermediate_size, weights)
        return Layer(self.text, mixer, mlp)


def read(checkpoint: Checkpoint) -> LlamaArchitecture:
    """Read the architecture of a checkpoint."""
    require_values(checkpoint, SUPPORTED)
    text = text_config(checkpoint)
    qk_norm = checkpoint.require("model_type", str) != "llama"
    attention = attention_config(checkpoint, norm_eps=text.rms_norm_eps if qk_norm else None)
    return LlamaArchitecture(
        text=text,
        attention=attention,
        intermediate_size=count(checkpoint, "intermediate_size"),
        rope=rope(checkpoint, head_dim=attention.head_dim, max_positions=text.max_positions),
    )


def text_config(checkpoint: Checkpoint) -> TextConfig:
    """Read what decoders of all families have."""
    return TextConfig(
        family=checkpoint.require("model_type", str),
        vocab_size=count(checkpoint, "vocab_size"),
        hidden_size=count(checkpoint, "hidden_size"),
        num_layers=count(checkpoint, "num_hidden_layers"),
        rms_norm_eps=checkpoint.require("rms_norm_eps", float),
        max_positions=count(checkpoint, "max_position_embeddings"),
        tied=flag(checkpoint, "tie_word_embeddings", default=False),
    )


def attention_config(
    checkpoint: Checkpoint, *, norm_eps: float | None = None, output_gate: bool = False
) -> AttentionConfig:
    """Read the sizes of attention."""
    hidden_size, num_heads = count(checkpoint, "hidden_size"), count(checkpoint, "num_attention_heads")
    head_dim = count(checkpoint, "head_dim", default=hidden_size // num_heads)
    num_kv_heads = count(checkpoint, "num_key_value_heads", default=num_heads)
    check_heads(checkpoint, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    return AttentionConfig(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=norm_eps,
        output_gate=output_gate,
    )


def text_names(prefix: str) -> dict[str, Recipe]:
    """Return the weights outside the layers."""
    return {
        "embedding.weight": Joined(f"{prefix}embed_tokens.weight"),
        "norm.weight": Joined(f"{prefix}norm.weight"),
        "lm_head.weight": Joined("lm_head.weight"),
    }


def norm_names(prefix: str, layer: int, gain: Callable[[str], Recipe] = Joined) -> dict[str, Recipe]:
    """Return a layer's two norms; ``gain`` says how the checkpoint stores gains."""
    source, target = f"{prefix}layers.{layer}.", f"layers.{layer}."
    return {
        f"{target}mixer_norm.weight": gain(f"{source}input_layernorm.weight"),
        f"{target}feed_forward_norm.weight": gain(f"{source}post_attention_layernorm.weight"),
    }


def attention_names(prefix: str, layer: int, gain: Callable[[str], Recipe] = Joined) -> dict[str, Recipe]:
    """Return a layer's attention."""
    source, target = f"{prefix}layers.{layer}.self_attn.", f"layers.{layer}.mixer."
    return {
        f"{target}qkv.weight": Joined(*(f"{source}{part}_proj.weight" for part in "qkv")),
        f"{target}query_norm.weight": gain(f"{source}q_norm.weight"),
        f"{target}key_norm.weight": gain(f"{source}k_norm.weight"),
        f"{target}output.weight": Joined(f"{source}o_proj.weight"),
    }


def mlp_names(prefix: str, layer: int) -> dict[str, Recipe]:
    """Return a layer's SwiGLU."""
    source, target = f"{prefix}layers.{layer}.mlp.", f"layers.{layer}.feed_forward."
    return {
        f"{target}gate_up.weight": Joined(f"{source}gate_proj.weight", f"{source}up_proj.weight"),
        f"{target}down.weight": Joined(f"{source}down_proj.weight"),
    }
