"""Tiny random checkpoints of Gemma 3n and Gemma 4, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
from tests.tiny import save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, TABLE_VOCAB, HIDDEN, WIDTH, WINDOW, CONTEXT = 300, 280, 64, 32, 24, 320
SLIDING, FULL = "sliding_attention", "full_attention"
COMMON = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": HIDDEN,
    "hidden_size_per_layer_input": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 30.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    # Ids beyond the table, sparse gates, the first stream active.
    "gemma3n": {
        "vocab_size_per_layer_input": TABLE_VOCAB,
        "num_hidden_layers": 5,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 2,
        "laurel_rank": 32,
        "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.0, 0.0],
    },
    "gemma3n-second-stream": {
        "num_hidden_layers": 4,
        "layer_types": [FULL, SLIDING, FULL, SLIDING],
        "num_kv_shared_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": [64, 96, 128, 160],
        "laurel_rank": 64,
        "activation_sparsity_pattern": [0.0, 0.9, 0.0, 0.9],
        "altup_num_inputs": 3,
        "altup_active_idx": 1,
        "altup_correct_scale": False,
    },
    "gemma3n-unshared": {
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "num_kv_shared_layers": 0,
        "num_key_value_heads": 4,
        "laurel_rank": 32,
        "activation_sparsity_pattern": [0.0, 0.0],
        "altup_num_inputs": 2,
    },
    # Like E2B: larger heads in full attention, wide feed-forwards where caches are shared.
    "gemma4": {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 3,
        "global_head_dim": 32,
        "use_double_wide_mlp": True,
    },
    "gemma4-keys-are-values": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 0,
        "num_attention_heads": 8,
        "global_head_dim": 48,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "final_logit_softcapping": None,
    },
    "gemma4-without-table": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "hidden_size_per_layer_input": 0,
        "num_key_value_heads": 1,
        "global_head_dim": 16,
        "tie_word_embeddings": False,
    },
}


def save_gemma(folder: Path, name: str) -> Path:
    """Save a random checkpoint of one of `CONFIGS` and a tokenizer."""
    settings = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    family = name.partition("-")[0]
    config = AutoConfig.for_model(f"{family}_text", **{**COMMON, **CONFIGS[name], **settings})
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def randomise(model: torch.nn.Module) -> None:
    """Draw weights that matter: linear layers keep the size of what they are given, gains are not all one.

    Embeddings are multiplied by the root of their width in the model.
    """
    rng = torch.Generator().manual_seed(21)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = torch.randn(tensor.shape, generator=rng)
        if name.endswith(("norm.weight", "layer_scalar", "correct_output_scale")):
            tensor.data = 1 + values / 5
        elif tensor.ndim == 2:
            tensor.data = values / tensor.shape[-1] ** 0.5
