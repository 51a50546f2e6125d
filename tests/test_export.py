"""Exported bundles compute what transformers and the paper's equations say, whatever the checkpoint is made of."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from numpy.typing import NDArray
from tests.conftest import Command
from tests.reference import dequantised_weights, reference_logits, site_blocks, transformers_logits
from tests.tiny import CONTEXT, TinyModel, TinySite, gguf_weights, site_files
from tests.workshop import (
    SilentReporter,
    Workshop,
    bundle_logits,
    copy_folder,
    export,
    export_options,
    files_of,
    open_session,
    random_ids,
    stepwise_logits,
)

from engram_export.pipeline import export_bundle
from engram_export.source import open_source
from engram_export.verify import reference_logits as module_logits
from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError, TableError

# Logits are about 1 in size; float32 sums in another order over two or three layers differ by 5e-6.
FLOAT_TOLERANCE = 1e-4
# onnxruntime rounds activations to 8 bits per block of 32 (accuracy level 4): up to 0.4 % of the block's largest each.
ACTIVATION_MAX, ACTIVATION_MEAN = 0.2, 0.03

ROPES: dict[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 3.0, "original_max_position_embeddings": 64},
}
PLAIN = TinyModel()
MODELS = {
    "llama": PLAIN,
    "llama-untied": TinyModel(tied=False),
    "qwen3": TinyModel(family="qwen3", head_dim=32, tied=False),
    "float16": TinyModel(dtype="float16"),
    "bfloat16-sharded": TinyModel(dtype="bfloat16", shard_size="20KB", layers=3),
    **{name: TinyModel(rope=rope) for name, rope in ROPES.items()},
}
FULL_SITE = TinySite()
BARE_SITE = TinySite(
    convolution=False, gate_bias=False, gains=False, output_scale=None, token_map=None, payload="float32"
)
SITES = {
    "every-option-int8-rows": (FULL_SITE,),
    "no-option-float32-rows": (BARE_SITE,),
    "derived-map-bfloat16-rows": (TinySite(gains=False, token_map="tokenizer", payload="bfloat16"),),
    "int4-rows": (TinySite(payload="int4"),),
    "two-sites": (
        TinySite(layer_id=0, gate_bias=False, payload="float16"),
        TinySite(layer_id=1, gains=False, output_scale=0.5),
    ),
}


def assert_close(found: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(found, expected, atol=FLOAT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("name", MODELS)
def test_the_float_graph_gives_the_logits_of_transformers(workshop: Workshop, name: str, length: int) -> None:
    checkpoint, token_ids = workshop.checkpoint(MODELS[name]), random_ids(length)
    assert_close(bundle_logits(workshop.bundle(checkpoint), token_ids), transformers_logits(checkpoint, token_ids))


@pytest.mark.parametrize("name", SITES)
def test_graph_and_tables_give_the_logits_of_the_papers_equations(workshop: Workshop, name: str) -> None:
    plain, checkpoint, token_ids = workshop.checkpoint(PLAIN), workshop.checkpoint(PLAIN, *SITES[name]), random_ids(40)
    _, tensors = site_files(plain, *SITES[name])
    if SITES[name][0].token_map == "tokenizer":
        tensors["engram.token_map"] = site_files(plain, FULL_SITE)[1]["engram.token_map"]
    expected = reference_logits(plain, token_ids, blocks=site_blocks(checkpoint), site_tensors=tensors)
    assert_close(bundle_logits(workshop.bundle(checkpoint), token_ids), expected)


@pytest.mark.parametrize("name", SITES)
def test_graph_and_tables_give_the_logits_of_the_torch_module(workshop: Workshop, name: str) -> None:
    checkpoint, token_ids = workshop.checkpoint(PLAIN, *SITES[name]), random_ids(40)
    expected = module_logits(open_source(checkpoint, engram=None, context=None), np.array(token_ids))
    assert_close(bundle_logits(workshop.bundle(checkpoint), token_ids), expected)


@pytest.mark.parametrize("name", SITES)
def test_without_tables_a_model_is_what_it_was_before_its_site(workshop: Workshop, name: str) -> None:
    checkpoint, token_ids = workshop.checkpoint(PLAIN, *SITES[name]), random_ids(40)
    found = bundle_logits(workshop.bundle(checkpoint), token_ids, tables_on=False)
    assert_close(found, transformers_logits(workshop.checkpoint(PLAIN), token_ids))


@pytest.mark.parametrize("name", SITES)
def test_tables_change_the_logits(workshop: Workshop, name: str) -> None:
    bundle = workshop.bundle(workshop.checkpoint(PLAIN, *SITES[name]))
    on, off = (bundle_logits(bundle, random_ids(40), tables_on=tables_on) for tables_on in (True, False))
    assert np.abs(on - off).mean() > 0.1  # against a tolerance of 1e-4 above


def test_a_site_of_a_folder_is_the_same_as_one_of_the_checkpoint(workshop: Workshop) -> None:
    added = workshop.bundle(workshop.checkpoint(PLAIN), engram=workshop.site_folder(PLAIN, FULL_SITE))
    own = workshop.bundle(workshop.checkpoint(PLAIN, FULL_SITE))
    np.testing.assert_array_equal(bundle_logits(added, random_ids(40)), bundle_logits(own, random_ids(40)))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_one_token_at_a_time_gives_the_logits_of_all_at_once(workshop: Workshop, name: str) -> None:
    bundle = workshop.bundle(workshop.checkpoint(MODELS[name]))
    assert_close(stepwise_logits(bundle, random_ids(20), "onnxruntime"), bundle_logits(bundle, random_ids(20)))


def test_one_token_at_a_time_carries_the_window_of_the_convolution(workshop: Workshop) -> None:
    bundle = workshop.bundle(workshop.checkpoint(PLAIN, *SITES["two-sites"]))
    assert_close(stepwise_logits(bundle, random_ids(20), "onnxruntime"), bundle_logits(bundle, random_ids(20)))


QUANTISED = {
    "int8": ("int8", TinyModel(tied=False)),
    "int8-tied": ("int8", PLAIN),
    "int4": ("int4", TinyModel(tied=False)),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_run_in_float_give_the_logits_of_the_decoded_weights(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    quant, model = QUANTISED[name]
    checkpoint = workshop.checkpoint(model, FULL_SITE)
    bundle = workshop.bundle(checkpoint, quant=quant)
    exact = with_float_activations(bundle, tmp_path / "exact")
    assert_close(bundle_logits(exact, random_ids(40)), logits_of_decoded_weights(workshop, model, bundle))


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_run_as_exported_differ_by_the_rounding_of_activations(workshop: Workshop, name: str) -> None:
    quant, model = QUANTISED[name]
    bundle = workshop.bundle(workshop.checkpoint(model, FULL_SITE), quant=quant)
    error = np.abs(bundle_logits(bundle, random_ids(40)) - logits_of_decoded_weights(workshop, model, bundle))
    assert error.max() < ACTIVATION_MAX
    assert error.mean() < ACTIVATION_MEAN


DOWN = "model.layers.0.mlp.down_proj.weight"


def test_an_int8_weight_is_off_by_half_a_step_at_most(workshop: Workshop) -> None:
    checkpoint = workshop.checkpoint(TinyModel(tied=False), FULL_SITE)
    stored = dequantised_weights(workshop.bundle(checkpoint, quant="int8").path)[DOWN]
    original = safetensors.torch.load_file(checkpoint / "model.safetensors")[DOWN].double().numpy()
    half_step = np.abs(original).max(axis=1, keepdims=True) / 127 / 2
    assert (np.abs(stored - original) <= half_step * 1.0001).all()  # the scale is rounded to float32


def test_int4_weights_are_nearer_than_those_of_q4_0(workshop: Workshop) -> None:
    """Both have 4 bits and blocks of 32; ours has a zero point besides, so rounding with it can't be worse."""
    checkpoint = workshop.checkpoint(TinyModel(tied=False), FULL_SITE)
    stored = dequantised_weights(workshop.bundle(checkpoint, quant="int4").path)[DOWN]
    original = safetensors.torch.load_file(checkpoint / "model.safetensors")[DOWN].numpy()
    q4_0 = decode_blocks(quantize(original, Kind.Q4_0), Kind.Q4_0)
    assert np.square(stored - original).sum() < np.square(q4_0 - original).sum()


def logits_of_decoded_weights(workshop: Workshop, model: TinyModel, bundle: Bundle) -> NDArray[np.float64]:
    """Return what a bundle's weights, decoded by the formats' definitions, give in float64."""
    plain = workshop.checkpoint(model)
    block, tensors = site_files(plain, FULL_SITE)
    weights = dequantised_weights(bundle.path)
    return reference_logits(plain, random_ids(40), blocks=[block], site_tensors=tensors, weights=weights)


def with_float_activations(bundle: Bundle, folder: Path) -> Bundle:
    """Copy a bundle and have onnxruntime compute its quantised layers in float32."""
    graph = copy_folder(bundle.path, folder) / bundle.manifest.decoder.file
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(model, graph)
    return Bundle(folder, bundle.manifest)


@pytest.mark.parametrize(("kind", "zero"), [(Kind.Q4_0, 8), (Kind.Q8_0, 128)])
def test_kept_weights_have_the_very_codes_and_scales_of_the_file(workshop: Workshop, kind: Kind, zero: int) -> None:
    path = workshop.gguf(kind, TinyModel(tied=False))
    bundle = workshop.bundle(path, quant="keep")
    stored = safetensors.torch.load_file(bundle.file(bundle.manifest.decoder.weights))
    blocks = gguf_weights(workshop.checkpoint(TinyModel(tied=False)), kind)
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    codes, scales = read_blocks(np.concatenate([blocks[name] for name in names]), kind)
    np.testing.assert_array_equal(stored["layers.1.mixer.qkv.block_scale"].numpy(), scales)
    np.testing.assert_array_equal(stored["layers.1.mixer.qkv.codes"].numpy(), packed_in_pairs(codes, zero))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_kept_weights_give_the_logits_of_the_file(workshop: Workshop, tmp_path: Path, kind: Kind) -> None:
    model = TinyModel(tied=False)
    bundle = with_float_activations(workshop.bundle(workshop.gguf(kind, model), quant="keep"), tmp_path / "exact")
    weights = {
        name: np.asarray(decode_blocks(values, kind) if values.dtype == np.uint8 else values, dtype=np.float64)
        for name, values in gguf_weights(workshop.checkpoint(model), kind).items()
    }
    weights["model.embed_tokens.weight"] = dequantised_weights(bundle.path)["model.embed_tokens.weight"]
    expected = reference_logits(workshop.checkpoint(model), random_ids(40), weights=weights)
    assert_close(bundle_logits(bundle, random_ids(40)), expected)


def read_blocks(stored: NDArray[np.uint8], kind: Kind) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return ``[N, K / 32, 32]`` codes with the zero point added and ``[N, K / 32]`` scales, by ggml's definition."""
    blocks = stored.reshape(len(stored), -1, 34 if kind == Kind.Q8_0 else 18)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
    values = blocks[:, :, 2:]
    if kind == Kind.Q8_0:
        return (values.view(np.int8).astype(np.int16) + 128).astype(np.uint8), scales
    return np.concatenate([values % 16, values // 16], axis=2), scales


def decode_blocks(stored: NDArray[np.uint8], kind: Kind) -> NDArray[np.float64]:
    codes, scales = read_blocks(stored, kind)
    values = (codes.astype(np.float64) - (128 if kind == Kind.Q8_0 else 8)) * scales[:, :, None]
    return values.reshape(len(stored), -1)


def packed_in_pairs(codes: NDArray[np.uint8], zero: int) -> NDArray[np.uint8]:
    """Return codes as MatMulNBits takes them: 4-bit neighbours share a byte, the even one in the low half."""
    return codes if zero == 128 else codes[:, :, ::2] + 16 * codes[:, :, 1::2]


def test_referred_tables_are_not_copied(workshop: Workshop) -> None:
    bundle = workshop.bundle(workshop.checkpoint(PLAIN, FULL_SITE), tables="reference")
    assert [path.name for path in bundle.file("tables").iterdir()] == ["layer_1.token_map.int32"]


def test_referred_tables_give_the_logits_of_copied_ones(workshop: Workshop) -> None:
    checkpoint = workshop.checkpoint(PLAIN, FULL_SITE)
    copied, referred = (workshop.bundle(checkpoint, tables=tables) for tables in ("copy", "reference"))
    np.testing.assert_array_equal(bundle_logits(copied, random_ids(40)), bundle_logits(referred, random_ids(40)))


def test_a_table_that_is_gone_is_named(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = copy_folder(workshop.checkpoint(PLAIN, FULL_SITE), tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "bundle", tables="reference")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(TableError) as caught, open_session(Bundle.open(tmp_path / "bundle")):
        pass
    assert str(caught.value) == (
        f"table file {checkpoint / 'model.safetensors'} can't be opened: No such file or directory; "
        f"export the bundle again"
    )


@pytest.mark.exhaustive
def test_two_exports_of_a_checkpoint_are_the_same_to_the_byte(workshop: Workshop, tmp_path: Path) -> None:
    """The second one is the installed command in a process with other string hashes, so no set's order may show."""
    checkpoint = workshop.checkpoint(PLAIN, *SITES["two-sites"])
    script = Path(sys.executable).with_name("engram-export")
    line: list[str | Path] = [script, checkpoint, "-o", tmp_path / "again", "--quant", "none", "--json"]
    done = subprocess.run(line, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    keys = {"bundle", "seconds", "plan", "graph_parity", "draft_parity", "parity", "row_errors", "calibration"}
    assert json.loads(done.stdout).keys() == keys
    assert files_of(tmp_path / "again") == files_of(workshop.bundle(checkpoint).path)


def test_every_file_of_a_bundle_is_listed_with_size_and_digest(workshop: Workshop) -> None:
    bundle = workshop.bundle(workshop.checkpoint(PLAIN, FULL_SITE))
    bundle.verify_digests()
    assert {entry.path for entry in bundle.manifest.files} == files_of(bundle.path).keys() - {"engram.json"}


def test_the_context_can_be_shorter_than_the_models(workshop: Workshop) -> None:
    bundle = workshop.bundle(workshop.checkpoint(PLAIN), context=24)
    assert bundle.manifest.model.context_length == 24
    assert {state.shape[2] for state in bundle.manifest.decoder.states} == {24}
    full = workshop.bundle(workshop.checkpoint(PLAIN))
    assert_close(bundle_logits(bundle, random_ids(24)), bundle_logits(full, random_ids(24)))


def test_a_shorter_context_takes_no_longer_text(workshop: Workshop) -> None:
    with pytest.raises(RequestError) as caught:
        bundle_logits(workshop.bundle(workshop.checkpoint(PLAIN), context=24), random_ids(25))
    assert str(caught.value) == "25 tokens exceed the context of 24; shorten the prompt"


def test_the_plan_states_the_sizes_of_what_is_written(workshop: Workshop, tmp_path: Path) -> None:
    reporter = SilentReporter()
    export_bundle(export_options(workshop.checkpoint(PLAIN, FULL_SITE), tmp_path / "bundle", quant="int8"), reporter)
    bundle = Bundle.open(tmp_path / "bundle")
    (plan,), (table,) = reporter.plans, bundle.manifest.tables
    stored = safetensors.torch.load_file(bundle.file(bundle.manifest.decoder.weights))
    assert plan.weights_bytes == sum(values.nbytes for values in stored.values())
    assert plan.tables_bytes == table.num_rows * (16 + 2)
    assert plan.context_length == CONTEXT


def test_the_verification_is_printed_as_a_table(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    outcome = command("engram-export", workshop.checkpoint(PLAIN), "-o", tmp_path / "bundle", "--quant", "none")
    rows = re.findall(r"^  (\w.*?)  +(\S+)  +(\S+)  +(\S+)$", outcome.out, re.MULTILINE)
    assert [title for title, *_ in rows] == ["graph, torch, same weights", "bundle, float32 checkpoint"]
    assert max(float(largest) for _, largest, _, _ in rows) < FLOAT_TOLERANCE
    assert {agreement for *_, agreement in rows} == {"100.0%"}
