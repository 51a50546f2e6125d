"""A checkpoint of a family with experts that can't be right leaves one sentence and no file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Command
from tests.tiny import edit_config
from tests.tiny_families import FAMILIES, Weights, edit_weights, fp8_table, rope
from tests.workshop import Workshop, copy_folder

from engram_export.checkpoint import open_checkpoint
from engram_export.families import read_architecture
from engram_export.formats import FLOAT
from engram_export.inspection import describe_checkpoint
from engram_runtime.errors import CheckpointError

Damage = Callable[[Path], None]

MEMORY = "model.layers.0.ple.ple_embedding."
TABLE = f"{MEMORY}ngram_embedding."
FIRST_SHARD = f"{TABLE}shard_0.weight"
CONSTANTS = [f"{MEMORY}{name}" for name in ("layer_multipliers", "ngram_heads_offsets", "ngram_heads_vocab_sizes")]
MULTIPLIERS = "[14383222055071283, 17200026167610081, 13040324987628097]"
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"
KINDS = "supported are ['linear_attention', 'indexed_attention', 'full_attention']"


def shard(number: int) -> str:
    return f"{TABLE}shard_{number}.weight"


def config(**values: Any) -> Damage:
    return lambda checkpoint: edit_config(checkpoint, **values)


def without_key(key: str) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps({name: v for name, v in json.loads(path.read_text()).items() if name != key}))

    return damage


def tensors(change: Callable[[Weights], Weights]) -> Damage:
    """Put what ``change`` returns into the tensors."""
    return lambda checkpoint: edit_weights(checkpoint, lambda weights: weights | change(weights))


def without(*names: str) -> Damage:
    return lambda checkpoint: edit_weights(
        checkpoint, lambda weights: {name: values for name, values in weights.items() if name not in names}
    )


def both(first: Damage, second: Damage) -> Damage:
    def damage(checkpoint: Path) -> None:
        first(checkpoint)
        second(checkpoint)

    return damage


def numbered_from_one(weights: Weights) -> Weights:
    shards = [name for name in weights if ".shard_" in name]
    rest = {name: values for name, values in weights.items() if name not in shards}
    return rest | {shard(number + 1): weights[shard(number)] for number in range(len(shards))}


def factor(value: torch.Tensor) -> Damage:
    return both(fp8_table, tensors(lambda weights: {f"{TABLE}weight_scale": value}))


TABLE_DAMAGE: dict[str, tuple[Damage, str]] = {
    "a-shard-missing": (without(shard(2)), f"the checkpoint lacks {shard(2)}, one of 4; it is incomplete"),
    "shards-numbered-from-one": (
        lambda checkpoint: edit_weights(checkpoint, numbered_from_one),
        f"the checkpoint lacks {FIRST_SHARD}, one of 4; it is incomplete",
    ),
    "a-shard-too-many": (
        config(split_ngram_parts=3),
        f"the checkpoint has {shard(3)}, its config says 3 of them",
    ),
    "a-shorter-last-shard-in-the-middle": (
        tensors(lambda weights: {shard(1): weights[shard(1)][:-1]}),
        f"{shard(1)} is F32 [37, 16], {FIRST_SHARD} F32 [38, 16]; "
        "shards must be equal, the last alone may have fewer rows",
    ),
    "shards-of-two-dtypes": (
        tensors(lambda weights: {shard(3): weights[shard(3)].half()}),
        f"{shard(3)} is F16 [38, 16], {FIRST_SHARD} F32 [38, 16]; "
        "shards must be equal, the last alone may have fewer rows",
    ),
    "rows-of-another-width": (config(ple_embed_dim=128), f"{FIRST_SHARD} has shape [38, 16], expected [rows, 32]"),
    "rows-are-not-the-sum-of-the-primes": (
        both(without(*CONSTANTS), config(ngram_vocab_size_base=61)),
        f"{FIRST_SHARD} to {shard(3)} has 152 rows, the hash of table layer_0 wants 272",
    ),
    "another-seed": (
        config(seed=7),
        f"{CONSTANTS[0]} is {MULTIPLIERS}, the config gives [4487276066259889, 28064160954025813, 15875010731316793]; "
        "config and checkpoint don't belong together",
    ),
    "other-multipliers": (
        tensors(lambda weights: {CONSTANTS[0]: weights[CONSTANTS[0]] + 2}),
        f"{CONSTANTS[0]} is [14383222055071285, 17200026167610083, 13040324987628099], the config gives {MULTIPLIERS}; "
        "config and checkpoint don't belong together",
    ),
    "other-offsets": (
        tensors(lambda weights: {CONSTANTS[1]: weights[CONSTANTS[1]] + 1}),
        f"{CONSTANTS[1]} is [1, 32, 69, 110], the config gives [0, 31, 68, 109]; "
        "config and checkpoint don't belong together",
    ),
    "other-primes": (
        tensors(lambda weights: {CONSTANTS[2]: weights[CONSTANTS[2]].flip(0)}),
        f"{CONSTANTS[2]} is [43, 41, 37, 31], the config gives [31, 37, 41, 43]; "
        "config and checkpoint don't belong together",
    ),
    "a-factor-that-is-no-number": (
        factor(torch.tensor(float("nan"))),
        f"{TABLE}weight_scale is nan, expected a positive finite factor; download the checkpoint again",
    ),
    "a-factor-of-zero": (
        factor(torch.tensor(0.0)),
        f"{TABLE}weight_scale is 0.0, expected a positive finite factor; download the checkpoint again",
    ),
    "two-factors": (
        factor(torch.ones(2)),
        f"{TABLE}weight_scale has shape [2], expected one number for the whole table",
    ),
    "fp8-rows-without-factor": (
        both(fp8_table, without(f"{TABLE}weight_scale")),
        f"the checkpoint lacks {TABLE}weight_scale, the factor of FP8 rows; it is incomplete",
    ),
}
CONFIG_DAMAGE: dict[str, tuple[str, Damage, str]] = {
    "an-unsupported-layer-type": (
        "qwen4_exp",
        config(layer_types=["linear_attention", "sliding_attention"]),
        f"'layer_types' in config.json of checkpoint has 'sliding_attention' at layer 1, {KINDS}",
    ),
    "too-few-layer-types": (
        "qwen4_exp",
        config(layer_types=["linear_attention"]),
        "'layer_types' in config.json of checkpoint has 1 entries for 2 layers",
    ),
    "one-stream": (
        "qwen4_exp",
        config(hc_count=1),
        "'hc_count' in config.json of checkpoint is 1, wanted 2 to 64; correct the config",
    ),
    "streams-beyond-reason": (
        "qwen4_exp",
        config(hc_count=65),
        "'hc_count' in config.json of checkpoint is 65, wanted 2 to 64; correct the config",
    ),
    "query-heads-without-a-key-head": (
        "qwen4_exp",
        config(num_key_value_heads=3),
        "config.json of checkpoint has 4 query heads for 3 key and value heads, wanted a multiple; correct the config",
    ),
    "no-streams": (
        "qwen4_exp",
        without_key("hc_count"),
        "config.json of checkpoint has no 'hc_count'; the checkpoint is incomplete",
    ),
    "two-key-heads-of-the-indexer": (
        "qwen4_exp",
        config(indexer_kv_heads=2),
        "'indexer_kv_heads' in config.json of checkpoint is 2, only 1 is supported",
    ),
    "half-a-block-in-the-budget": (
        "qwen4_exp",
        config(indexer_budget=18),
        "'indexer_budget' in config.json of checkpoint is 18, wanted a multiple of 'indexer_compress_ratio' 4; "
        "correct the config",
    ),
    "no-indexer": (
        "qwen4_exp",
        config(indexer_n_heads=None),
        "'indexer_n_heads' in config.json of checkpoint is None, wanted int; correct the config",
    ),
    "an-indexer-too-narrow-for-the-rotation": (
        "qwen4_exp",
        config(indexer_head_dim=8),
        "'indexer_head_dim' in config.json of checkpoint is 8, fewer than the 16 rotated dimensions of attention; "
        "correct the config",
    ),
    "memory-beyond-the-last-layer": (
        "qwen4_exp",
        config(ple_layer_ids=[3]),
        "'ple_layer_ids' in config.json of checkpoint has 3, wanted 1 to 2",
    ),
    "memory-of-no-layer": (
        "qwen4_exp",
        config(ple_layer_ids=1),
        "'ple_layer_ids' in config.json of checkpoint is 1, wanted list; correct the config",
    ),
    "memory-without-an-end-of-text": (
        "qwen4_exp",
        config(eos_token_id=None),
        "'eos_token_id' in config.json of checkpoint is None, the n-gram memory needs a token id below 300",
    ),
    "rows-that-no-head-gets": (
        "qwen4_exp",
        config(ple_embed_dim=66),
        "'ple_embed_dim' in config.json of checkpoint is 66, wanted a multiple of its 4 hash heads",
    ),
    "n-grams-of-17-tokens": (
        "qwen4_exp",
        config(ngram_size=17),
        "'ngram_size' in config.json of checkpoint is 17, wanted 2 to 16",
    ),
    "an-unknown-gate": (
        "qwen4_exp",
        config(output_gate_type="tanh"),
        "'output_gate_type' in config.json of checkpoint is 'tanh', supported are ['silu', 'sigmoid']",
    ),
    "weights-of-experts-that-do-not-sum-to-one": (
        "qwen4_exp",
        config(norm_topk_prob=False),
        "'norm_topk_prob' in config.json of checkpoint is False, only True is supported",
    ),
    "more-experts-a-token-than-there-are": (
        "qwen4_exp",
        config(num_experts_per_tok=9),
        "'num_experts_per_tok' in config.json of checkpoint is 9, there are 8 experts; correct the config",
    ),
    "experts-beyond-reason": (
        "qwen4_exp",
        config(num_experts=1 << 20),
        "'num_experts' in config.json of checkpoint is 1048576, wanted 1 to 16384; correct the config",
    ),
    "an-expert-missing": (
        "qwen4_exp",
        without(EXPERT),
        f"the checkpoint lacks 1 tensors: {EXPERT}; it is incomplete",
    ),
    "an-expert-of-another-shape": (
        "qwen4_exp",
        tensors(lambda weights: {EXPERT: weights[EXPERT][:-1]}),
        f"the checkpoint has model.layers.1.mlp.experts.0.gate_proj.weight [32, 64] and {EXPERT} [31, 64], "
        "its config wants [8, 64, 64]; they don't belong together",
    ),
    "a-rotation-of-an-odd-width": (
        "qwen4_exp",
        config(rope_parameters=rope(0.3)),
        "'partial_rotary_factor' in config.json of checkpoint is 0.3, wanted a share of 32 dimensions that is "
        "a multiple of 16",
    ),
    "a-rotation-that-is-no-object": (
        "qwen4_exp",
        config(rope_parameters=[1]),
        "the rope scaling in config.json of checkpoint is [1], wanted an object",
    ),
    "value-heads-without-a-key-head": (
        "qwen4_exp",
        config(linear_num_value_heads=3),
        "config.json of checkpoint has 3 linear value heads for 2 key heads, wanted a multiple; correct the config",
    ),
    "a-convolution-of-one-tap": (
        "qwen4_exp",
        config(linear_conv_kernel_dim=1),
        "'linear_conv_kernel_dim' in config.json of checkpoint is 1, wanted 2 to 16777216; correct the config",
    ),
    "a-sliding-window": (
        "mixtral",
        config(sliding_window=128),
        "'sliding_window' in config.json of checkpoint is 128, only None is supported",
    ),
    "another-activation": (
        "mixtral",
        config(hidden_act="gelu"),
        "'hidden_act' in config.json of checkpoint is 'gelu', only 'silu' is supported",
    ),
    "no-experts": (
        "mixtral",
        config(num_local_experts=0),
        "'num_local_experts' in config.json of checkpoint is 0, wanted 1 to 16384; correct the config",
    ),
    "biases-of-attention": (
        "qwen3_moe",
        config(attention_bias=True),
        "'attention_bias' in config.json of checkpoint is True, only False is supported",
    ),
    "dense-layers-that-are-no-list": (
        "qwen3_moe",
        config(mlp_only_layers=0),
        "'mlp_only_layers' in config.json of checkpoint is 0, wanted list; correct the config",
    ),
    "a-switch-that-is-a-word": (
        "qwen3_moe",
        config(norm_topk_prob="no"),
        "'norm_topk_prob' in config.json of checkpoint is 'no', wanted bool; correct the config",
    ),
    "an-empty-text-config": (
        "qwen3_5_moe",
        config(text_config={}),
        "config.json of checkpoint has no 'vocab_size'; the checkpoint is incomplete",
    ),
    "an-unknown-part-of-the-text-model": (
        "qwen3_5_moe",
        tensors(lambda weights: {"model.language_model.layers.0.extra": torch.ones(3)}),
        "the checkpoint has 1 tensors: model.language_model.layers.0.extra that this family doesn't know",
    ),
}


@pytest.mark.parametrize("name", TABLE_DAMAGE)
def test_a_table_that_cant_be_right_is_refused_before_anything_is_written(
    workshop: Workshop, tmp_path: Path, command: Command, name: str
) -> None:
    damage, sentence = TABLE_DAMAGE[name]
    assert_refused(workshop, tmp_path, command, "qwen4_exp", damage, sentence)


@pytest.mark.parametrize("name", CONFIG_DAMAGE)
def test_a_config_that_cant_be_right_is_refused_before_anything_is_written(
    workshop: Workshop, tmp_path: Path, command: Command, name: str
) -> None:
    assert_refused(workshop, tmp_path, command, *CONFIG_DAMAGE[name])


def test_an_engram_site_is_refused_on_several_streams(workshop: Workshop) -> None:
    architecture = read_architecture(open_checkpoint(workshop.family(FAMILIES["qwen4_exp"][0])))
    site: Any = object()
    with pytest.raises(CheckpointError) as caught:
        architecture.build(16, FLOAT, [site])
    assert str(caught.value) == (
        "qwen4_exp has 2 residual streams, an engram site is made for one; export without --engram"
    )


@pytest.mark.parametrize(("family", "engram"), [("qwen4_exp", "yes"), ("mixtral", "no")])
def test_inspection_says_whether_a_family_brings_tables(workshop: Workshop, family: str, engram: str) -> None:
    assert describe_checkpoint(workshop.family(FAMILIES[family][0]))["engram"] == engram


def assert_refused(
    workshop: Workshop, tmp_path: Path, command: Command, family: str, damage: Damage, sentence: str
) -> None:
    """Export a damaged copy of a family's checkpoint; the sentence is all there is, so no plan was made either."""
    checkpoint = copy_folder(workshop.family(FAMILIES[family][0]), tmp_path / "checkpoint")
    damage(checkpoint)
    outcome = command("engram-export", checkpoint, "-o", tmp_path / "out" / "bundle", "--quant", "int8")
    assert (outcome.code, outcome.out, outcome.err) == (3, "", f"engram-export: {sentence}\n")
    assert not (tmp_path / "out").exists()
