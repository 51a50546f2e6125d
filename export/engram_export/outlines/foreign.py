"""What a checkpoint holds of which only tables and sites can be exported: DeepSeek-V4.1."""

from collections.abc import Sequence

from engram_export.checkpoint import Checkpoint
from engram_export.families.deepseek_sizes import engram_sizes
from engram_export.families.reading import count, text_part
from engram_export.outlines.headers import source_bytes, tensor_bytes
from engram_export.outlines.inventory import Inventory
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_runtime.planning.outline import Table

EXPERT = ".experts."
TABLE = ".engram.embed."
DENSE, EXPERTS = "all other weights", "experts"
# Bytes of 32 values, their scale included.
EXPERT_BLOCK_BYTES = {"fp4": 17, "fp8": 33}
BLOCK = 32


def site_inventory(checkpoint: Checkpoint, quant: str) -> Inventory:
    """Return the weights of the sites."""
    part = text_part(checkpoint)
    sizes, hidden_size = engram_sizes(checkpoint, part), count(part, "hidden_size")
    rows = (sizes.max_order - 1) * sizes.num_heads * sizes.row_dim
    made = Inventory(quant, count(part, "max_position_embeddings"), bfloat16=False)
    for layer in sizes.layers:
        made.linear(f"layer_{layer}.key_value", rows, (sizes.num_streams + 1) * hidden_size)
        made.plain(f"layer_{layer}.gain", sizes.num_streams, hidden_size)
    return made


def foreign_bytes(checkpoint: Checkpoint, tables: Sequence[Table]) -> dict[str, int]:
    """Return the bytes of experts and of other weights; without shards by config and index, as far as they tell."""
    tensors = checkpoint.tensors
    if isinstance(tensors, SafetensorsFile | SafetensorsShards):
        sizes = {name: tensor_bytes(tensors, name) for name in tensors.names() if TABLE not in name}
        experts = sum(size for name, size in sizes.items() if EXPERT in name)
        return {EXPERTS: experts, DENSE: sum(sizes.values()) - experts}
    stated, total = _stated_experts(text_part(checkpoint)), source_bytes(checkpoint)
    found = {} if stated is None else {EXPERTS: stated}
    if total is None:
        return found
    return {**found, DENSE: total - (stated or 0) - sum(table.num_bytes for table in tables)}


def _stated_experts(part: Checkpoint) -> int | None:
    """Return the bytes of all layers' experts, three matrices each, None where the config doesn't say their sizes."""
    if not {"n_routed_experts", "moe_intermediate_size"} <= part.config.keys():
        return None
    layers = count(part, "num_hidden_layers") - count(part, "first_k_dense_replace", default=0, least=0)
    values = 3 * count(part, "hidden_size") * count(part, "moe_intermediate_size")
    block = EXPERT_BLOCK_BYTES["fp4" if part.config.get("expert_dtype") == "fp4" else "fp8"]
    return layers * count(part, "n_routed_experts") * values * block // BLOCK
