"""Gemma 3n and Gemma 4 compute what transformers does: as a module, as a graph, compiled."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from tests.reference import transformers_logits
from tests.test_compile import NATIVE, assert_same_bits
from tests.tiny_gemma import CONFIGS, CONTEXT, TABLE_VOCAB, VOCAB, save_gemma
from tests.workshop import Workshop, bundle_logits, copy_folder, stepwise_logits

from engram_export.checkpoint import open_checkpoint
from engram_export.families import read_architecture
from engram_export.families.reading import text_part
from engram_export.formats import FLOAT, weight_format
from engram_export.source import ModelSource, load_own_parameters, open_source
from engram_export.table_writer import checkpoint_site, open_rows
from engram_export.verify import reference_logits
from engram_runtime.errors import CheckpointError

LENGTH = 300  # beyond the sliding window
FLOAT_TOLERANCE, GRAPH_TOLERANCE = 1e-4, 1e-3
SIXTEEN_BIT_TOLERANCE = 6e-3  # tvm's activations; over six layers it came to 3e-3
TOKENS = 37  # 4 * 8 + 4 + 1: several compiled numbers of tokens take part

Logits = NDArray[np.float32]
Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Tiny checkpoints by name, each made once."""
    root = tmp_path_factory.mktemp("gemma")
    return cache(lambda name: save_gemma(root / name, name))


@pytest.fixture(scope="session")
def expected(checkpoint: Checkpoints) -> Callable[[str], Logits]:
    """What transformers computes for `random_ids` of `LENGTH`; earlier tokens don't see later ones."""
    return cache(lambda name: transformers_logits(checkpoint(name), random_ids(LENGTH)))


def random_ids(count: int) -> list[int]:
    ids: list[int] = np.random.default_rng(5).integers(0, VOCAB, size=LENGTH)[:count].tolist()
    return ids


def module_logits(source: ModelSource, token_ids: Sequence[int], *, step: int) -> Logits:
    """Run the float module over a text, ``step`` tokens at a time."""
    module = source.build(FLOAT)
    load_own_parameters(module, source)
    states = [torch.zeros(spec.shape) for spec in module.state_specs()]
    found = []
    for start in range(0, len(token_ids), step):
        part = np.array(token_ids[start : start + step])
        rows = [torch.from_numpy(values) for values in table_rows(source, part)]
        with torch.no_grad():
            logits, *states = module(
                torch.from_numpy(part), torch.tensor([start]), torch.arange(len(part)), rows, states
            )
        found.append(logits.numpy())
    return np.concatenate(found)


def table_rows(source: ModelSource, token_ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Return the rows ``[T, 1, d]`` of every table."""
    found = []
    for table in source.tables:
        with open_rows(table) as rows:
            found.append(checkpoint_site(table, VOCAB, rows).rows([], token_ids))
    return found


@pytest.mark.parametrize("length", [1, 7, 64, LENGTH])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_gives_the_logits_of_transformers(
    checkpoint: Checkpoints, expected: Callable[[str], Logits], name: str, length: int
) -> None:
    source = open_source(checkpoint(name), engram=None, context=None)
    found = module_logits(source, random_ids(length), step=length)
    np.testing.assert_allclose(found, expected(name)[:length], atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize(("length", "step"), [pytest.param(64, 1, marks=pytest.mark.exhaustive), (LENGTH, 7)])
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_give_the_logits_of_transformers(
    checkpoint: Checkpoints, expected: Callable[[str], Logits], name: str, length: int, step: int
) -> None:
    source = open_source(checkpoint(name), engram=None, context=None)
    found = module_logits(source, random_ids(length), step=step)
    np.testing.assert_allclose(found, expected(name)[:length], atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_a_bundle_gives_the_logits_of_transformers(
    workshop: Workshop, checkpoint: Checkpoints, expected: Callable[[str], Logits], name: str
) -> None:
    bundle = workshop.bundle(checkpoint(name))
    np.testing.assert_allclose(bundle_logits(bundle, random_ids(LENGTH)), expected(name), atol=GRAPH_TOLERANCE)


@pytest.mark.parametrize("name", ["gemma3n", pytest.param("gemma4", marks=pytest.mark.exhaustive)])
def test_a_compiled_bundle_gives_the_logits_of_transformers_in_any_steps(
    workshop: Workshop, checkpoint: Checkpoints, expected: Callable[[str], Logits], name: str
) -> None:
    compiled = workshop.compiled(workshop.bundle(checkpoint(name)), always_parallel=True)
    found = bundle_logits(compiled, random_ids(TOKENS), "tvm")
    np.testing.assert_allclose(found, expected(name)[:TOKENS], atol=GRAPH_TOLERANCE)
    assert_same_bits(stepwise_logits(compiled, random_ids(TOKENS), "tvm"), found)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("gemma3n", "int8"),
        ("gemma3n-second-stream", "int4"),
        ("gemma4", "int4"),
        ("gemma4-keys-are-values", "int8"),
        ("gemma4-without-table", "int8"),
    ],
)
def test_a_quantised_bundle_computes_with_its_integer_weights_in_any_steps(
    workshop: Workshop, checkpoint: Checkpoints, name: str, quant: str
) -> None:
    compiled = workshop.compiled(workshop.bundle(checkpoint(name), quant=quant), NATIVE)
    source, token_ids = open_source(checkpoint(name), engram=None, context=None), random_ids(TOKENS)
    wanted = reference_logits(source, np.array(token_ids), weight_format(quant, source.kept_type))
    found = bundle_logits(compiled, token_ids, "tvm")
    np.testing.assert_allclose(found, wanted, atol=SIXTEEN_BIT_TOLERANCE)
    assert_same_bits(stepwise_logits(compiled, token_ids, "tvm"), found)


def test_the_per_layer_embeddings_are_a_table_of_one_wide_row_a_token(checkpoint: Checkpoints) -> None:
    path = checkpoint("gemma3n")
    source = open_source(path, engram=None, context=None)
    (table,) = source.tables
    assert table.tensors == ["model.embed_tokens_per_layer.weight"]
    assert not any("embed_tokens_per_layer" in str(recipe) for recipe in source.architecture.name_map().values())
    values = safetensors.torch.load_file(path / "model.safetensors")["model.embed_tokens_per_layer.weight"].numpy()
    known = [5, 0, TABLE_VOCAB - 1]
    (rows,) = table_rows(source, np.array([*known, TABLE_VOCAB, VOCAB - 1]))
    np.testing.assert_array_equal(rows[:, 0], values[[*known, 0, 0]])


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_the_text_model_of_a_multimodal_checkpoint_is_read(checkpoint: Checkpoints, tmp_path: Path, name: str) -> None:
    text = checkpoint(name)
    whole = save_multimodal(copy_folder(text, tmp_path / name))
    logits = [
        module_logits(open_source(path, engram=None, context=None), random_ids(40), step=40) for path in (text, whole)
    ]
    np.testing.assert_array_equal(logits[1], logits[0])


def save_multimodal(folder: Path) -> Path:
    """Rename a text model as part of a published one, with towers, and keys of layers that use others' caches."""
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"].removesuffix("_text")
    (folder / "config.json").write_text(json.dumps({"model_type": family, "text_config": config}))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    last = config["num_hidden_layers"] - 1
    for unused in ("k_proj", "v_proj", "k_norm"):
        renamed[f"model.language_model.layers.{last}.self_attn.{unused}.weight"] = torch.zeros(3)
    for tower in ("vision_tower.encoder.weight", "audio_tower.conv.bias", "embed_vision.norm.weight"):
        renamed[f"model.{tower}"] = torch.zeros(3)
    safetensors.torch.save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_sizes_of_full_attention_may_stand_in_two_keys(checkpoint: Checkpoints, tmp_path: Path) -> None:
    saved = checkpoint("gemma4-keys-are-values")
    published = copy_folder(saved, tmp_path / "published")
    change_config(published, per_layer_config=None, global_head_dim=48, num_global_key_value_heads=1)
    found, wanted = (read_architecture(open_checkpoint(path)) for path in (published, saved))
    assert found.attention == wanted.attention  # type: ignore[attr-defined]


def test_two_thetas_of_older_checkpoints_are_rope_parameters(checkpoint: Checkpoints, tmp_path: Path) -> None:
    saved = checkpoint("gemma3n")
    older = copy_folder(saved, tmp_path / "older")
    change_config(older, rope_parameters=None, rope_theta=1_000_000.0, rope_local_base_freq=10_000.0)
    tables = [read_architecture(open_checkpoint(path)).build(CONTEXT, FLOAT, ()).computed() for path in (older, saved)]
    for name, values in tables[1].items():
        np.testing.assert_array_equal(tables[0][name](0, CONTEXT), values(0, CONTEXT))


def test_the_last_layer_of_gemma4_has_full_attention_whatever_its_config_says(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    saved = checkpoint("gemma4")
    sliding = copy_folder(saved, tmp_path / "sliding")
    kinds = json.loads((saved / "config.json").read_text())["layer_types"]
    change_config(sliding, layer_types=[*kinds[:-1], "sliding_attention"])
    found, wanted = (read_architecture(open_checkpoint(path)) for path in (sliding, saved))
    assert found.attention == wanted.attention  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("outer", "text", "expected"),
    [
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"eos_token_id": 7}, {"eos_token_id": 3}, {"eos_token_id": 3}),
        ({"eos_token_id": 7}, {"eos_token_id": None}, {"eos_token_id": 7}),
        ({"eos_token_id": [7, 8]}, {}, {"eos_token_id": [7, 8]}),
    ],
)
def test_the_whole_model_says_whether_it_is_tied_and_may_say_where_texts_end(
    checkpoint: Checkpoints, outer: dict[str, Any], text: dict[str, Any], expected: dict[str, Any]
) -> None:
    plain = open_checkpoint(checkpoint("gemma4"))
    whole = dataclasses.replace(plain, config={"model_type": "gemma4", "text_config": text, **outer})
    assert text_part(whole).config == {"model_type": "gemma4", **expected}


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


REFUSED: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "experts": (
        "gemma4",
        {"enable_moe_block": True},
        "config.json of {folder} has experts ('enable_moe_block'), of Gemma 4 only dense models are supported",
    ),
    "both-directions": (
        "gemma4",
        {"use_bidirectional_attention": "all"},
        "config.json of {folder} lets tokens see later ones; only causal models are supported",
    ),
    "override": (
        "gemma4",
        {"per_layer_config": {"2": {"sliding_window": 4}}},
        "config.json of {folder} overrides 'sliding_window' for layer 2, only ['head_dim', 'num_key_value_heads'] are "
        "supported",
    ),
    "sizes-of-a-kind": (
        "gemma4",
        {"per_layer_config": {"2": {"head_dim": 32}}},
        "layers with full_attention in config.json of {folder} have key and value heads of [(2, 16), (2, 32)], wanted "
        "one number and size",
    ),
    "no-cache-to-share": (
        "gemma4",
        {"num_kv_shared_layers": 4},
        "'num_kv_shared_layers' in config.json of {folder} leaves no layer with full_attention of its own; correct "
        "the config",
    ),
    "heads-without-a-share": (
        "gemma3n",
        {"num_key_value_heads": 3},
        "config.json of {folder} has 4 query heads for 3 key and value heads, wanted a multiple; correct the config",
    ),
    "heads-of-a-layer-without-a-share": (
        "gemma4",
        {"per_layer_config": {"2": {"num_key_value_heads": 3}}},
        "config.json of {folder} has 4 query heads for 3 key and value heads, wanted a multiple; correct the config",
    ),
    "narrow-heads": (
        "gemma3n",
        {"head_dim": 24},
        "config.json of {folder} has heads of 24 dimensions, supported are multiples of 16",
    ),
    "flat-rope-parameters": (
        "gemma4",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "'rope_parameters' in config.json of {folder} has 'default' at 'rope_type', wanted an object; correct the "
        "config",
    ),
    "rope-parameters-of-one-kind": (
        "gemma4",
        {"rope_parameters": {"sliding_attention": {"rope_theta": 10000.0}}},
        "'rope_parameters' in config.json of {folder} has no 'full_attention'; correct the config",
    ),
    "rope-parameters-of-a-kind-are-a-list": (
        "gemma3n",
        {"rope_parameters": {"full_attention": [1]}},
        "'rope_parameters' in config.json of {folder} has [1] at 'full_attention', wanted an object; correct the "
        "config",
    ),
    "rope-scaling-is-a-word": (
        "gemma3n",
        {"rope_scaling": "linear"},
        "'rope_scaling' in config.json of {folder} is 'linear', wanted dict; correct the config",
    ),
    "sizes-of-a-layer-are-a-list": (
        "gemma4",
        {"per_layer_config": {"2": [32]}},
        "'per_layer_config' in config.json of {folder} has [32] at '2', wanted an object; correct the config",
    ),
    "a-switch-that-is-a-word": (
        "gemma4",
        {"attention_k_eq_v": "false"},
        "'attention_k_eq_v' in config.json of {folder} is 'false', wanted bool; correct the config",
    ),
    "activation": (
        "gemma3n",
        {"hidden_activation": "relu"},
        "'hidden_activation' in config.json of {folder} is 'relu', only 'gelu_pytorch_tanh' is supported",
    ),
    "softcap": (
        "gemma3n",
        {"final_logit_softcapping": -1.0},
        "'final_logit_softcapping' in config.json of {folder} is -1.0, wanted a positive number or null",
    ),
    "streams": (
        "gemma3n",
        {"altup_num_inputs": 65},
        "'altup_num_inputs' in config.json of {folder} is 65, wanted 2 to 64; correct the config",
    ),
    "active-stream": (
        "gemma3n",
        {"altup_active_idx": 4},
        "'altup_active_idx' in config.json of {folder} is 4, there are 4 streams",
    ),
    "sparsity": (
        "gemma3n",
        {"activation_sparsity_pattern": [0.5, 1.0, 0.0, 0.0, 0.0]},
        "'activation_sparsity_pattern' in config.json of {folder} is [0.5, 1.0, 0.0, 0.0, 0.0], wanted 5 shares from 0 "
        "to below 1",
    ),
    "sizes": (
        "gemma3n",
        {"intermediate_size": [96, 96]},
        "'intermediate_size' in config.json of {folder} is [96, 96], wanted 5 positive whole numbers",
    ),
    "no-table": (
        "gemma3n",
        {"hidden_size_per_layer_input": 0},
        "config.json of {folder} has no per-layer embeddings; no gemma3n is without them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_not_supported_are_refused(checkpoint: Checkpoints, tmp_path: Path, case: str) -> None:
    name, values, message = REFUSED[case]
    folder = copy_folder(checkpoint(name), tmp_path / name)
    change_config(folder, **values)
    with pytest.raises(CheckpointError) as caught:
        read_architecture(open_checkpoint(folder))
    assert str(caught.value) == message.format(folder=name)


def test_an_engram_site_is_refused_on_several_streams(checkpoint: Checkpoints) -> None:
    architecture = read_architecture(open_checkpoint(checkpoint("gemma3n")))
    site: Any = object()
    with pytest.raises(CheckpointError) as caught:
        architecture.build(CONTEXT, FLOAT, [site])
    assert str(caught.value) == (
        "gemma3n has 4 residual streams, an engram site is made for one; export without --engram"
    )
