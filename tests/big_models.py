"""Configs and indexes of models too large to be here, as they are published; what isn't known of them is made up."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIB = 1 << 30
QWEN_LAYERS, QWEN_HIDDEN, QWEN_EXPERTS, QWEN_INNER = 60, 2560, 512, 512
DEEPSEEK_BYTES = 510_242_000_000  # 475.2 GiB

QWEN: Mapping[str, Any] = {
    "model_type": "qwen4_exp",
    "tie_word_embeddings": False,
    "text_config": {
        "vocab_size": 248320,
        "hidden_size": QWEN_HIDDEN,
        "num_hidden_layers": QWEN_LAYERS,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": QWEN_EXPERTS,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": QWEN_INNER,
        "shared_expert_intermediate_size": 512,
        "hc_count": 4,
        "hc_lowrank": 320,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 128,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 16,
        "ple_layer_ids": [2],
        "ple_embed_dim": 2560,
        "ple_conv_kernel_size": 4,
        "ngram_size": 3,
        "heads_per_ngram": 8,
        "ngram_vocab_size_base": 20_000_000,
        "make_ngram_vocab_size_divisible_by": 128,
        "split_ngram_parts": 128,
        "eos_token_id": 248044,
        "dtype": "bfloat16",
    },
}
DEEPSEEK: Mapping[str, Any] = {
    "model_type": "deepseek_v41",
    "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"},
    "text_config": {
        "vocab_size": 129280,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "hc_mult": 4,
        "rms_norm_eps": 1e-20,
        "max_position_embeddings": 1048576,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2304,
        "expert_dtype": "fp4",
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 16_000_000,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 99092,
    },
}


def qwen(folder: Path) -> Path:
    """Write Qwen3.8-Flash-Next's config and an index that names its tables' shards."""
    root = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding."
    names = [f"{root}shard_{number}.weight" for number in range(128)]
    return _write(folder, QWEN, [*names, f"{root}weight_scale"], None)


def deepseek(folder: Path) -> Path:
    """Write DeepSeek-V4.1-Flash's config and an index as long as its own, 96,085 tensors."""
    tables = [f"layers.{layer}.engram.embed.{part}" for layer in (1, 14) for part in ("weight", "scale")]
    others = [
        f"layers.{layer}.ffn.experts.{expert}.w{matrix}.{part}"
        for layer in range(40)
        for expert in range(384)
        for matrix in (1, 2, 3)
        for part in ("weight", "scale")
    ]
    return _write(folder, DEEPSEEK, [*tables, *others][:96_085], DEEPSEEK_BYTES)


def _write(folder: Path, config: Mapping[str, Any], names: list[str], total: int | None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {} if total is None else {"total_size": total}
    shards = {name: f"model-{number % 48 + 1:05}-of-00048.safetensors" for number, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": shards}))
    return folder
