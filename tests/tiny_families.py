"""Tiny random checkpoints of families with experts, streams and n-gram tables, in the layouts they are published in."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tests.tiny import VOCAB
from transformers import AutoConfig, AutoModelForCausalLM

CONTEXT = 384
END_ID = 0  # where the n-grams of Qwen4-Exp start anew
Weights = dict[str, torch.Tensor]
Rewrite = Callable[[Path], None]


def as_saved(folder: Path) -> None:
    """Leave a checkpoint as transformers saves it: experts one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFamily:
    """What a checkpoint is made of.

    Attributes:
        sizes: values of the config.
        rewrite: changes what transformers saved into another layout of the same model.
    """

    model_type: str
    sizes: Mapping[str, Any]
    dtype: str = "float32"
    shard_size: str = "5GB"
    rewrite: Rewrite = as_saved

    @property
    def original(self) -> "TinyFamily":
        """The same model as transformers saves it."""
        return dataclasses.replace(self, rewrite=as_saved)


def save_family(folder: Path, family: TinyFamily) -> None:
    """Save a random model as transformers does, then change its layout."""
    common = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "intermediate_size": 128}
    ends = {"bos_token_id": None, "eos_token_id": END_ID, "pad_token_id": None}
    config = AutoConfig.for_model(family.model_type, **common, **ends, **family.sizes)
    model = AutoModelForCausalLM.from_config(config)
    _randomise(model)
    model.to(getattr(torch, family.dtype)).save_pretrained(folder, max_shard_size=family.shard_size)
    family.rewrite(folder)


def _randomise(model: torch.nn.Module) -> None:
    """Draw weights that matter: linear layers keep the size of what they are given, no gain is the default's."""
    rng = torch.Generator().manual_seed(20)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=rng)
        if name.endswith(("A_log", "dt_bias")):
            parameter.data = values * 0.3
        elif "norm" in name:
            parameter.data = parameter.data + values / 5
        elif "conv1d" in name:
            parameter.data = values / 2
        else:
            parameter.data = values / parameter.shape[-1] ** 0.5


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Replace the tensors of a checkpoint in one file."""
    path = folder / "model.safetensors"
    tensors = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file({name: values.contiguous() for name, values in tensors.items()}, path)


EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def fused(folder: Path) -> None:
    """Store all experts of a layer in two tensors, ``[E, 2 I, D]`` and ``[E, D, I]``."""
    edit_weights(folder, fuse_experts)


def fuse_experts(tensors: Weights) -> Weights:
    """Return a checkpoint's tensors with the experts of each layer stacked."""
    stacks: dict[str, dict[str, list[torch.Tensor]]] = {}
    rest = {}
    numbered = sorted(tensors, key=lambda name: int(match[2]) if (match := EXPERT.fullmatch(name)) else -1)
    for name in numbered:
        if match := EXPERT.fullmatch(name):
            stacks.setdefault(match[1], {}).setdefault(match[3], []).append(tensors[name])
        else:
            rest[name] = tensors[name]
    for prefix, parts in stacks.items():
        gate, up, down = ("w1", "w3", "w2") if "w1" in parts else ("gate_proj", "up_proj", "down_proj")
        rest[f"{prefix}.gate_up_proj"] = torch.cat([torch.stack(parts[gate]), torch.stack(parts[up])], dim=1)
        rest[f"{prefix}.down_proj"] = torch.stack(parts[down])
    return {name.replace(".block_sparse_moe.", ".mlp."): values for name, values in rest.items()}


def nested(folder: Path) -> None:
    """Store the model as the text part of a multimodal one, beside a tower for images and a draft head."""
    others = {f"{name}.0.proj.weight": torch.ones(3, 5) for name in ("model.visual.blocks", "mtp.layers")}
    edit_weights(
        folder,
        lambda tensors: others | {re.sub("^model", "model.language_model", name): tensors[name] for name in tensors},
    )
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": text["model_type"].removesuffix("_text"), "text_config": text, "vision_config": {"depth": 1}}
    (folder / "config.json").write_text(json.dumps(whole))


TABLE_SCALE = 2.0**-7  # FP8 numbers of a table around 1 / 4 are then around 32


def fp8_table(folder: Path) -> None:
    """Store n-gram rows as FP8 numbers with one factor for each table."""

    def store(tensors: Weights) -> Weights:
        codes = {name: _fp8(values) if ".shard_" in name else values for name, values in tensors.items()}
        tables = {name.rpartition(".shard_")[0] for name in tensors if ".shard_" in name}
        return codes | {f"{table}.weight_scale": torch.tensor(TABLE_SCALE) for table in tables}

    edit_weights(folder, store)


def fp8_rounded_table(folder: Path) -> None:
    """Store the numbers that `fp8_table` stands for as float32."""

    def round_rows(tensors: Weights) -> Weights:
        return {
            name: _fp8(values).float() * TABLE_SCALE if ".shard_" in name else values
            for name, values in tensors.items()
        }

    edit_weights(folder, round_rows)


def bfloat16_table(folder: Path) -> None:
    """Store n-gram rows as bfloat16 numbers, all else as it was."""
    edit_weights(
        folder,
        lambda tensors: {name: v.bfloat16() if ".shard_" in name else v for name, v in tensors.items()},
    )


def _fp8(values: torch.Tensor) -> torch.Tensor:
    return (values / TABLE_SCALE).to(torch.float8_e4m3fn)


def published_names(folder: Path) -> None:
    """Spell Qwen3-MoE's number of experts as published configs do; transformers 5 saves it as num_local_experts."""
    config = json.loads((folder / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(config))


def fused_published_names(folder: Path) -> None:
    """See `fused` and `published_names`."""
    fused(folder)
    published_names(folder)


def rope(factor: float) -> dict[str, Any]:
    """Return the parameters of a rotation of the first dimensions of a head."""
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}


def heads(count: int, kv: int, dim: int) -> dict[str, int]:
    """Return the sizes of attention."""
    return {"num_attention_heads": count, "num_key_value_heads": kv, "head_dim": dim}


def delta(key_heads: int, value_heads: int, key_dim: int = 16, value_dim: int = 16, kernel: int = 4) -> dict[str, int]:
    """Return the sizes of linear attention."""
    return {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": key_dim,
        "linear_value_head_dim": value_dim,
        "linear_conv_kernel_dim": kernel,
    }


def experts(count: int, top_k: int, size: int = 32) -> dict[str, int]:
    """Return the sizes of routed experts."""
    return {"num_experts": count, "num_experts_per_tok": top_k, "moe_intermediate_size": size}


def indexer(budget: int, block: int, num_heads: int = 8, dim: int = 32) -> dict[str, int]:
    """Return the sizes of sparse attention; with fewer heads whole blocks score an exact 0 and tie."""
    return {
        "indexer_n_heads": num_heads,
        "indexer_kv_heads": 1,
        "indexer_head_dim": dim,
        "indexer_budget": budget,
        "indexer_compress_ratio": block,
    }


def ngrams(layers: list[int], order: int, heads_per_order: int, width: int, base: int = 31) -> dict[str, Any]:
    """Return the sizes of n-gram memories before 1-based ``layers``; their tables have some 100 rows in 4 shards."""
    return {
        "ple_layer_ids": layers,
        "ngram_size": order,
        "heads_per_ngram": heads_per_order,
        "ple_embed_dim": width,
        "ngram_vocab_size_base": base,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 4,
    }


LINEAR, FULL, INDEXED = "linear_attention", "full_attention", "indexed_attention"
SHARED = {"shared_expert_intermediate_size": 32}
HYPER_RANK = {"hc_lowrank": 32}

# The first of each family is what tests run by default; the others are exhaustive ones.
FAMILIES: dict[str, tuple[TinyFamily, ...]] = {
    "mixtral": (
        TinyFamily(
            model_type="mixtral",
            sizes={"hidden_size": 64, "num_hidden_layers": 2, "num_local_experts": 4, **heads(4, 2, 16)},
        ),
        TinyFamily(
            model_type="mixtral",
            dtype="bfloat16",
            rewrite=fused,
            sizes={
                "hidden_size": 96,
                "num_hidden_layers": 2,
                "num_local_experts": 6,
                "num_experts_per_tok": 3,
                "tie_word_embeddings": True,
                **heads(3, 1, 32),
            },
        ),
        TinyFamily(
            model_type="mixtral",
            shard_size="100KB",
            sizes={
                "hidden_size": 128,
                "num_hidden_layers": 3,
                "num_local_experts": 3,
                "num_experts_per_tok": 1,
                **heads(8, 8, 16),
            },
        ),
    ),
    "qwen3_moe": (
        TinyFamily(
            model_type="qwen3_moe",
            rewrite=published_names,
            sizes={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "mlp_only_layers": [0],
                "norm_topk_prob": True,
                **heads(4, 2, 32),
                **experts(8, 2),
            },
        ),
        TinyFamily(
            model_type="qwen3_moe",
            dtype="bfloat16",
            rewrite=fused_published_names,
            sizes={
                "hidden_size": 96,
                "num_hidden_layers": 3,
                "decoder_sparse_step": 2,
                "norm_topk_prob": False,
                **heads(6, 3, 16),
                **experts(5, 4, 64),
            },
        ),
        TinyFamily(
            model_type="qwen3_moe",
            shard_size="100KB",
            sizes={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "norm_topk_prob": False,
                "tie_word_embeddings": True,
                **heads(8, 1, 16),
                **experts(16, 1),
            },
        ),
    ),
    "qwen3_5_moe": (
        TinyFamily(
            model_type="qwen3_5_moe_text",
            rewrite=nested,
            sizes={
                "hidden_size": 64,
                "num_hidden_layers": 3,
                "layer_types": [LINEAR, FULL, LINEAR],
                "rope_parameters": rope(0.5),
                **heads(4, 2, 32),
                **experts(8, 2),
                **SHARED,
                **delta(2, 4),
            },
        ),
        TinyFamily(
            model_type="qwen3_5_moe_text",
            dtype="bfloat16",
            sizes={
                "hidden_size": 96,
                "num_hidden_layers": 4,
                "rope_parameters": rope(0.25),
                "tie_word_embeddings": True,
                **heads(2, 1, 64),
                **experts(6, 3),
                "shared_expert_intermediate_size": 64,
                **delta(4, 4, key_dim=32, kernel=2),
            },
        ),
        TinyFamily(
            model_type="qwen3_5_moe_text",
            rewrite=fused,
            sizes={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "layer_types": [FULL, LINEAR],
                "rope_parameters": rope(0.25),
                **heads(6, 3, 64),
                **experts(4, 1, 64),
                **SHARED,
                **delta(2, 6, value_dim=32, kernel=3),
            },
        ),
    ),
    "qwen4_exp": (
        TinyFamily(
            model_type="qwen4_exp_text",
            sizes={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "layer_types": [LINEAR, INDEXED],
                "hc_count": 2,
                "rope_parameters": rope(0.5),
                **HYPER_RANK,
                **heads(4, 2, 32),
                **experts(8, 2),
                **SHARED,
                **delta(2, 4),
                **indexer(budget=16, block=4),
                **ngrams([1], order=3, heads_per_order=2, width=64),
            },
        ),
        TinyFamily(
            model_type="qwen4_exp_text",
            dtype="bfloat16",
            rewrite=nested,
            sizes={
                "hidden_size": 96,
                "num_hidden_layers": 4,
                "layer_types": [LINEAR, INDEXED, LINEAR, LINEAR],
                "hc_count": 3,
                "output_gate_type": "sigmoid",
                "rope_parameters": rope(0.25),
                **HYPER_RANK,
                **heads(2, 1, 64),
                **experts(6, 3),
                **SHARED,
                **delta(2, 6, key_dim=32),
                **indexer(budget=512, block=8),
                **ngrams([1, 3], order=2, heads_per_order=4, width=64, base=23),
            },
        ),
        TinyFamily(
            model_type="qwen4_exp_text",
            rewrite=fused,
            sizes={
                "hidden_size": 64,
                "num_hidden_layers": 3,
                "layer_types": [INDEXED, LINEAR, INDEXED],
                "hc_count": 4,
                "rope_parameters": rope(1.0),
                "tie_word_embeddings": True,
                **HYPER_RANK,
                **heads(6, 2, 16),
                **experts(16, 4),
                "shared_expert_intermediate_size": 64,
                **delta(4, 4, value_dim=32, kernel=2),
                **indexer(budget=24, block=3, num_heads=12, dim=16),
                **ngrams([2], order=4, heads_per_order=1, width=96, base=41),
            },
        ),
    ),
}
MANY_EXPERTS = dataclasses.replace(
    FAMILIES["qwen4_exp"][0],
    rewrite=fused,
    sizes={**FAMILIES["qwen4_exp"][0].sizes, **experts(512, 10)},
)
