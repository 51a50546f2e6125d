"""What layers of several families consist of; names and sizes are those of the modules that are exported."""

from dataclasses import dataclass

from engram_export.checkpoint import Checkpoint
from engram_export.engram_config import EngramConfig
from engram_export.families.reading import count
from engram_export.ngram_config import NgramSiteConfig
from engram_export.outlines.inventory import Inventory


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Sizes of attention."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim


def heads(checkpoint: Checkpoint) -> Heads:
    """Read the sizes of attention."""
    hidden_size, num_heads = count(checkpoint, "hidden_size"), count(checkpoint, "num_attention_heads")
    return Heads(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=count(checkpoint, "num_key_value_heads", default=num_heads),
        head_dim=count(checkpoint, "head_dim", default=hidden_size // num_heads),
    )


def attention(
    made: Inventory, layer: int, sizes: Heads, *, normed: bool, gated: bool = False, keys_are_values: bool = False
) -> None:
    """Add `engram_export.attention.Attention` or `engram_export.gemma_attention.GemmaAttention`."""
    name, projections = f"layers.{layer}.mixer", 1 if keys_are_values else 2
    made.linear(f"{name}.qkv", sizes.hidden_size, sizes.width + projections * sizes.num_kv_heads * sizes.head_dim)
    if gated:
        made.linear(f"{name}.gate", sizes.hidden_size, sizes.width)
    if normed:
        made.plain(f"{name}.query_norm", sizes.head_dim)
        made.plain(f"{name}.key_norm", sizes.head_dim)
    made.linear(f"{name}.output", sizes.width, sizes.hidden_size)
    for cache in ("key", "value"):
        made.cache(f"{cache}.{layer}", sizes.num_kv_heads, sizes.head_dim)


def index(made: Inventory, layer: int, hidden_size: int, num_heads: int, head_dim: int) -> None:
    """Add what `engram_export.indexed_attention.IndexedAttention` has besides."""
    name = f"layers.{layer}.mixer"
    made.linear(f"{name}.index", hidden_size, (num_heads + 1) * head_dim)
    made.plain(f"{name}.index_query_norm", head_dim)
    made.plain(f"{name}.index_key_norm", head_dim)
    made.cache(f"index.{layer}", 1, head_dim)


def delta_net(made: Inventory, layer: int, checkpoint: Checkpoint) -> None:
    """Add `engram_export.delta_net.GatedDeltaNet`."""
    name, hidden_size = f"layers.{layer}.mixer", count(checkpoint, "hidden_size")
    key_dim, value_dim = count(checkpoint, "linear_key_head_dim"), count(checkpoint, "linear_value_head_dim")
    value_heads, kernel = count(checkpoint, "linear_num_value_heads"), count(checkpoint, "linear_conv_kernel_dim")
    value_width = value_heads * value_dim
    conv_width = 2 * count(checkpoint, "linear_num_key_heads") * key_dim + value_width
    made.linear(f"{name}.qkv", hidden_size, conv_width)
    made.linear(f"{name}.gate", hidden_size, value_width)
    made.float_linear(f"{name}.decay_rate", hidden_size, 2 * value_heads)
    made.plain(f"{name}.conv", conv_width, kernel)
    made.plain(f"{name}.time_bias", value_heads)
    made.plain(f"{name}.decay_scale", value_heads)
    made.plain(f"{name}.norm_gain", value_dim)
    made.linear(f"{name}.output", value_width, hidden_size)
    made.window(f"conv.{layer}", kernel - 1, conv_width)
    made.recurrent(f"delta.{layer}", 1, value_heads, key_dim, value_dim)


def feed_forward(made: Inventory, name: str, hidden_size: int, inner_size: int) -> None:
    """Add a gated feed-forward."""
    made.linear(f"{name}.gate_up", hidden_size, 2 * inner_size)
    made.linear(f"{name}.down", inner_size, hidden_size)


def mixture(made: Inventory, layer: int, checkpoint: Checkpoint, *, experts: str, inner: str, shared: bool) -> None:
    """Add `engram_export.mixture.Mixture`; ``experts`` and ``inner`` are the keys of its sizes."""
    name, hidden_size, inner_size = (
        f"layers.{layer}.feed_forward",
        count(checkpoint, "hidden_size"),
        count(checkpoint, inner),
    )
    number, top_k = count(checkpoint, experts), count(checkpoint, "num_experts_per_tok")
    made.float_linear(f"{name}.router", hidden_size, number)
    made.experts(f"{name}.experts.gate_up", hidden_size, 2 * inner_size, number, top_k)
    made.experts(f"{name}.experts.down", inner_size, hidden_size, number, top_k)
    if shared:
        feed_forward(made, f"{name}.shared", hidden_size, count(checkpoint, "shared_expert_intermediate_size"))
        made.float_linear(f"{name}.shared_gate", hidden_size, 1)


def norms(made: Inventory, layer: int, hidden_size: int, *names: str) -> None:
    """Add norms of the residual stream."""
    for name in names:
        made.plain(f"layers.{layer}.{name}", hidden_size)


def stream_mixer(made: Inventory, name: str, width: int, rank: int) -> None:
    """Add `engram_export.hyper_connection.StreamMixer`."""
    made.plain(f"{name}.gain", width)
    made.linear(f"{name}.down", width, rank)
    made.linear(f"{name}.up", rank, width)


def hyper_connection(made: Inventory, name: str, width: int, streams: int, rank: int) -> None:
    """Add `engram_export.hyper_connection.HyperConnection`."""
    stream_mixer(made, name, width, rank)
    made.float_linear(f"{name}.inject", width, streams)


def ngram_site(made: Inventory, config: NgramSiteConfig, streams: int, hidden_size: int) -> None:
    """Add `engram_export.ngram_site.NgramSite`."""
    name, width = f"layers.{config.layer}.site", streams * hidden_size
    rows = config.columns * config.row_dim
    made.linear(f"{name}.key", rows, width)
    made.linear(f"{name}.value", rows, hidden_size)
    for gain in ("key_gain", "query_gain", "conv_gain"):
        made.plain(f"{name}.{gain}", width)
    made.plain(f"{name}.conv", width, config.conv_kernel)
    made.window(f"window.{config.site}", config.window, width)


def engram_site(made: Inventory, config: EngramConfig, hidden_size: int) -> None:
    """Add `engram_export.engram_site.EngramSite`."""
    name, rows = f"sites.{config.layer_id}", config.num_columns * config.row_dim
    for projection in ("key_proj", "value_proj"):
        made.linear(f"{name}.{projection}", rows, hidden_size)
    for norm in ("query_norm", "key_norm"):
        made.plain(f"{name}.{norm}", hidden_size)
    if config.gate_bias is not None:
        made.plain(f"{name}.gate_bias", 1)
    if config.conv is not None:
        made.plain(f"{name}.conv.norm", hidden_size)
        made.plain(f"{name}.conv", hidden_size, config.conv.kernel)
        made.window(f"window.{config.site}", config.conv.window, hidden_size)
