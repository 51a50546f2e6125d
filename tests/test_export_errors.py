"""A checkpoint that can't be exported leaves one sentence, an exit code and no file, through the real command."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from gguf import GGMLQuantizationType as Kind
from tests.conftest import Command
from tests.tiny import CONTEXT, VOCAB, TinyModel, TinySite, edit_config
from tests.workshop import SilentReporter, Workshop, copy_folder, export_options, files_of
from tokenizers import Tokenizer
from tokenizers.models import BPE

from engram_export.checkpoint import open_checkpoint
from engram_export.engram_source import engram_sources
from engram_export.families import FAMILIES
from engram_export.pipeline import Progress, export_bundle
from engram_export.rope import STATIC_SCALINGS
from engram_export.source import open_source
from engram_export.verify import verify_tokens
from engram_runtime.bundle import Bundle
from engram_runtime.errors import CheckpointError

PLAIN = TinyModel()
UNTIED = TinyModel(tied=False)
SITE = TinySite()

CUT_BYTES = 10
Damage = Callable[[Path], None]


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Make a change to the tensors of a checkpoint."""

    def damage(checkpoint: Path) -> None:
        tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, checkpoint / "model.safetensors")

    return damage


def set_config(**values: object) -> Damage:
    return lambda checkpoint: edit_config(checkpoint, **values)


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    os.truncate(path, path.stat().st_size - CUT_BYTES)


def shrink_vocabulary(checkpoint: Path) -> None:
    name = "model.embed_tokens.weight"
    edit_weights(lambda tensors: tensors.update({name: tensors[name][:250].clone()}))(checkpoint)
    edit_config(checkpoint, vocab_size=250)


def empty_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")


def spoil_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


QKV = "model.layers.0.self_attn.q_proj.weight [64, 64] and model.layers.0.self_attn.k_proj.weight [32, 64]"
REFUSED: dict[str, tuple[Damage, int, str]] = {
    "truncated-safetensors": (
        truncate,
        3,
        "{checkpoint}/model.safetensors holds {held} bytes, its header says {whole}; copy or download the file again",
    ),
    "wrong-dtype": (
        edit_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)})),
        3,
        "tensor 'model.norm.weight' of {checkpoint}/model.safetensors has dtype I32, wanted F32, F16 or BF16; "
        "convert the checkpoint",
    ),
    "missing-tensor": (
        edit_weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        3,
        "the checkpoint lacks 1 tensors: model.layers.1.mlp.up_proj.weight; it is incomplete",
    ),
    "unused-tensor": (
        edit_weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
        3,
        "the checkpoint has 1 tensors: model.layers.0.self_attn.q_proj.bias that this family doesn't know",
    ),
    "wrong-shape": (
        edit_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
        3,
        "the checkpoint has model.norm.weight [63], its config wants [64]; they don't belong together",
    ),
    "another-config": (
        set_config(num_key_value_heads=1),
        3,
        f"the checkpoint has {QKV} and model.layers.0.self_attn.v_proj.weight [32, 64], its config wants [96, 64]; "
        "they don't belong together",
    ),
    "not-a-number": (
        edit_weights(spoil_norm),
        3,
        "norm.weight is nan at [3], expected finite numbers; download the checkpoint again",
    ),
    "unknown-architecture": (
        set_config(model_type="mamba2"),
        3,
        f"architecture 'mamba2' is not supported; supported are {sorted(FAMILIES)}",
    ),
    "unknown-rope": (
        set_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
        3,
        f"rope scaling 'dynamic' is not supported; supported are {list(STATIC_SCALINGS)}",
    ),
    "incomplete-rope": (
        set_config(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0}),
        3,
        "rope scaling {{'rope_type': 'linear', 'rope_theta': 10000.0}} with theta 10000.0 is malformed: "
        "KeyError('factor')",
    ),
    "no-heads": (
        set_config(num_attention_heads=0),
        3,
        "'num_attention_heads' in config.json of checkpoint is 0, wanted 1 to 4096; correct the config",
    ),
    "heads-without-a-share": (
        set_config(num_key_value_heads=3),
        3,
        "config.json of checkpoint has 4 query heads for 3 key and value heads, wanted a multiple; correct the config",
    ),
    "rope-scaling-is-a-word": (
        set_config(rope_parameters=None, rope_scaling="linear"),
        3,
        "the rope scaling in config.json of checkpoint is 'linear', wanted an object",
    ),
    "theta-is-negative": (
        set_config(rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        3,
        "'rope_theta' in config.json of checkpoint is -1.0, wanted a positive finite number; correct the config",
    ),
    "theta-is-a-word": (
        set_config(rope_parameters={"rope_type": "default", "rope_theta": "10000"}),
        3,
        "'rope_theta' in config.json of checkpoint is '10000', wanted a positive finite number; correct the config",
    ),
    "tied-is-a-word": (
        set_config(tie_word_embeddings="false"),
        3,
        "'tie_word_embeddings' in config.json of checkpoint is 'false', wanted bool; correct the config",
    ),
    "quantisation-is-a-word": (
        set_config(quantization_config="fp8"),
        3,
        "'quantization_config' is 'fp8', wanted an object; correct the config",
    ),
    "quantisation-is-a-list": (
        set_config(quantization_config=["fp8"]),
        3,
        "'quantization_config' is ['fp8'], wanted an object; correct the config",
    ),
    "one-block-size": (
        set_config(quantization_config={"weight_block_size": 5}),
        3,
        "'weight_block_size' is 5, wanted two sizes; correct the config",
    ),
    "tokenizer-of-another-model": (shrink_vocabulary, 3, "the tokenizer gives id 294, the model has 250 tokens"),
    "damaged-tokenizer": (
        empty_tokenizer,
        3,
        "the tokenizer of checkpoint can't be used: Cannot instantiate Tokenizer from buffer: Model missing. "
        "at line 1 column 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_cant_be_exported_leaves_one_sentence_and_no_file(
    workshop: Workshop, tmp_path: Path, command: Command, name: str
) -> None:
    damage, code, sentence = REFUSED[name]
    checkpoint = copy_folder(workshop.checkpoint(PLAIN), tmp_path / "checkpoint")
    damage(checkpoint)
    outcome = command("engram-export", checkpoint, "-o", tmp_path / "out" / "bundle", "--quant", "int8")
    held = (checkpoint / "model.safetensors").stat().st_size
    expected = sentence.format(checkpoint=checkpoint, held=held, whole=held + CUT_BYTES)
    assert error_line(outcome.err) == f"engram-export: {expected}"
    assert (outcome.code, outcome.out) == (code, "")
    assert left_in(tmp_path / "out") == []


def error_line(stderr: str) -> str:
    """Return the last line: the plan and progress bars come before it."""
    return stderr.splitlines()[-1]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


GGUF_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "magic": (
        lambda data: b"GGML" + data[4:],
        "{path} starts with b'GGML', wanted b'GGUF'; give a .gguf file",
    ),
    "version": (
        lambda data: data[:4] + b"\x09" + data[5:],
        "{path} has gguf version 9, wanted 2 or 3 in little-endian order; convert it again",
    ),
    "truncated": (
        lambda data: data[:-64],
        "{path} holds {held} bytes, tensor 'output_norm.weight' wants bytes up to {whole}; "
        "copy or download the file again",
    ),
    "half-a-header": (
        lambda data: data[:100],
        "{path} holds 100 bytes, its header wants 4 more at byte 97; copy or download the file again",
    ),
}


@pytest.mark.parametrize("name", GGUF_DAMAGE)
def test_a_damaged_gguf_file_leaves_one_sentence_and_no_file(
    workshop: Workshop, tmp_path: Path, command: Command, name: str
) -> None:
    damage, sentence = GGUF_DAMAGE[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(workshop.gguf(Kind.Q8_0, UNTIED).read_bytes()))
    outcome = command("engram-export", path, "-o", tmp_path / "out" / "bundle")
    held = path.stat().st_size
    assert outcome.err == f"engram-export: {sentence.format(path=path, held=held, whole=held + 64)}\n"
    assert (outcome.code, left_in(tmp_path / "out")) == (3, [])


LARGER_HASH = {"primes": [61, 67, 97, 106], "offsets": [0, 61, 128, 225]}
SITE_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another-seed": (
        lambda block: block["hash"].update(seed=1, multipliers=[3, 5, 7]),
        "engram multipliers are [3, 5, 7], seed 1 and a vocabulary of 264 give "
        "[20137453794456173, 15786201372548695, 22206234739942963]; config and checkpoint don't belong together",
    ),
    "layer-beyond-the-last": (
        lambda block: block.update(layer_ids=[2], hash={**block["hash"], "seed_layer": 1}),
        "engram site is at layer 2, the model has layers 0 to 1",
    ),
    "rows-and-primes-disagree": (
        lambda block: block.update(num_rows=327),
        "the engram block has 327 rows, its primes sum to 326",
    ),
    "rows-of-another-width": (
        lambda block: block.update(row_dim=18),
        "engram.table.rows has shape [326, 16], expected [rows, 18]",
    ),
    "rows-of-bytes-that-are-none": (
        lambda block: block.update(row_payload="int4"),
        "engram.table.rows is I8 [326, 16], expected rows in U8",
    ),
    "unknown-payload": (
        lambda block: block.update(row_payload="int8"),
        "the engram block has row_payload 'int8', expected 'int4'; other rows are known by their dtype, leave it out",
    ),
    "fewer-rows-than-the-hash-reaches": (
        lambda block: block.update(num_rows=331, hash={**block["hash"], **LARGER_HASH}),
        "engram.table.rows has 326 rows, the hash of table layer_1 wants 331",
    ),
    "another-hash": (
        lambda block: block["hash"].update(kind="polynomial"),
        "the engram block has hash kind 'polynomial', supported is 'xor_prime'",
    ),
    "barriers-out-of-order": (
        lambda block: block["hash"].update(barrier_ids=[5, 3]),
        "keyer has barrier_ids [5, 3], expected ascending ids from 0; correct the checkpoint's config",
    ),
    "no-gate": (
        lambda block: block.pop("gate"),
        "the engram block has no key 'gate'; correct the checkpoint's config",
    ),
    "gate-is-no-object": (
        lambda block: block.update(gate=1),
        "the engram block.gate is 1, expected an object; correct the checkpoint's config",
    ),
    "unknown-key": (
        lambda block: block.update(hyper_connections=4),
        "the engram block has unknown keys ['hyper_connections']; it may need a newer engram-edge; "
        "correct the checkpoint's config",
    ),
}


@pytest.mark.parametrize("name", SITE_DAMAGE)
def test_a_site_that_cant_be_exported_leaves_one_sentence_and_no_file(
    workshop: Workshop, tmp_path: Path, command: Command, name: str
) -> None:
    damage, sentence = SITE_DAMAGE[name]
    site = copy_folder(workshop.site_folder(PLAIN, SITE), tmp_path / "site")
    config = json.loads((site / "config.json").read_text())
    damage(config["engram"])
    (site / "config.json").write_text(json.dumps(config))
    outcome = command("engram-export", workshop.checkpoint(PLAIN), "-o", tmp_path / "out" / "bundle", "--engram", site)
    assert error_line(outcome.err) == f"engram-export: {sentence}"
    assert (outcome.code, left_in(tmp_path / "out")) == (3, [])


@pytest.mark.parametrize("name", ["engram.map[", "engram.(map", "engram.map+"])
def test_the_name_of_a_token_map_may_hold_any_character(workshop: Workshop, tmp_path: Path, name: str) -> None:
    site = copy_folder(workshop.site_folder(PLAIN, SITE), tmp_path / "site")
    tensors = safetensors.torch.load_file(site / "engram.safetensors")
    tensors[name] = tensors.pop("engram.token_map")
    safetensors.torch.save_file(tensors, site / "engram.safetensors")
    config = json.loads((site / "config.json").read_text())
    config["engram"]["hash"]["token_map"] = name
    (site / "config.json").write_text(json.dumps(config))
    (table,) = open_source(workshop.checkpoint(PLAIN), engram=site, context=None).tables
    assert table.token_map is not None
    assert table.token_map.tolist() == tensors[name].tolist()


def test_a_site_with_the_map_of_another_tokenizer_is_refused(
    workshop: Workshop, tmp_path: Path, command: Command
) -> None:
    site = copy_folder(workshop.site_folder(PLAIN, SITE), tmp_path / "site")
    tensors = safetensors.torch.load_file(site / "engram.safetensors")
    ids = int(tensors["engram.token_map"].max()) + 1
    tensors["engram.token_map"][0] = ids
    safetensors.torch.save_file(tensors, site / "engram.safetensors")
    outcome = command("engram-export", workshop.checkpoint(PLAIN), "-o", tmp_path / "bundle", "--engram", site)
    assert error_line(outcome.err) == (
        f"engram-export: the engram token map leads to {ids + 1} ids, the config says {ids}; this is another tokenizer"
    )
    assert (outcome.code, left_in(tmp_path)) == (3, ["site"])


def test_a_token_map_can_not_be_derived_from_a_tokenizer_that_can_not_be_read(workshop: Workshop) -> None:
    folder = workshop.site_folder(PLAIN, TinySite(token_map="tokenizer"))
    (site,) = engram_sources(open_checkpoint(workshop.checkpoint(PLAIN)), folder)
    with pytest.raises(CheckpointError) as raised:
        site.token_map(VOCAB, b"{")
    assert str(raised.value) == (
        "the engram token map can't be derived, the tokenizer can't be used: Cannot instantiate Tokenizer from "
        "buffer: EOF while parsing an object at line 1 column 1"
    )


def test_a_tokenizer_that_gives_no_tokens_is_refused(workshop: Workshop) -> None:
    checkpoint = open_checkpoint(workshop.checkpoint(PLAIN))
    silent = dataclasses.replace(checkpoint, tokenizer_json=Tokenizer(BPE()).to_str().encode())
    with pytest.raises(CheckpointError) as raised:
        verify_tokens(silent, VOCAB, CONTEXT)
    assert str(raised.value) == (
        f"the tokenizer of {checkpoint.source} gives no tokens for the text that bundles are verified on; give the "
        f"model's own tokenizer.json"
    )


def test_a_scale_that_is_no_number_is_named_before_anything_is_written(
    workshop: Workshop, tmp_path: Path, command: Command
) -> None:
    site = copy_folder(workshop.site_folder(PLAIN, SITE), tmp_path / "site")
    tensors = safetensors.torch.load_file(site / "engram.safetensors")
    tensors["engram.table.scales"][321] = float("nan")
    safetensors.torch.save_file(tensors, site / "engram.safetensors")
    outcome = command("engram-export", workshop.checkpoint(PLAIN), "-o", tmp_path / "bundle", "--engram", site)
    assert error_line(outcome.err) == (
        "engram-export: engram.table.scales has scale nan in row 321, expected finite scales; "
        "download the checkpoint again"
    )
    assert "tracing" not in outcome.err
    assert (outcome.code, left_in(tmp_path)) == (3, ["site"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tables", "repack"], "--tables repack needs --table-dtype, one of int8, int4, fp8"),
        (["--table-dtype", "int8"], "--table-dtype int8 has no effect with --tables copy; use --tables repack"),
        (
            ["--tables", "reference", "--table-dtype", "fp8"],
            "--table-dtype fp8 has no effect with --tables reference; use --tables repack",
        ),
    ],
)
def test_a_table_dtype_goes_with_repacking_alone(
    workshop: Workshop, tmp_path: Path, command: Command, options: list[str], expected: str
) -> None:
    outcome = command("engram-export", workshop.checkpoint(PLAIN, SITE), "-o", tmp_path / "bundle", *options)
    assert outcome.err == f"engram-export: {expected}\n"
    assert (outcome.code, left_in(tmp_path)) == (2, [])


def test_a_bundle_is_not_replaced_without_force(
    workshop: Workshop, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is said before torch is imported."""
    out = copy_folder(workshop.bundle(workshop.checkpoint(PLAIN)).path, tmp_path / "bundle")
    before = files_of(out)
    checkpoint = workshop.checkpoint(PLAIN)
    monkeypatch.setitem(sys.modules, "engram_export.pipeline", None)
    outcome = command("engram-export", checkpoint, "-o", out)
    assert outcome.err == (
        f"engram-export: {out} is a bundle already; replace it with --force or choose another place\n"
    )
    assert (outcome.code, left_in(tmp_path), files_of(out) == before) == (2, ["bundle"], True)


def test_a_bundle_is_replaced_with_force(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    out = copy_folder(workshop.bundle(workshop.checkpoint(PLAIN)).path, tmp_path / "bundle")
    outcome = command("engram-export", workshop.checkpoint(PLAIN), "-o", out, "--force", "--json")
    assert (outcome.code, outcome.json["bundle"], left_in(tmp_path)) == (0, str(out), ["bundle"])
    assert Bundle.open(out).manifest.model.quantisation == "int8"


def test_a_failed_replacement_keeps_the_bundle(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    out = copy_folder(workshop.bundle(workshop.checkpoint(PLAIN)).path, tmp_path / "bundle")
    before = files_of(out)
    checkpoint = copy_folder(workshop.checkpoint(PLAIN), tmp_path / "checkpoint")
    edit_weights(spoil_norm)(checkpoint)
    assert command("engram-export", checkpoint, "-o", out, "--force").code == 3
    assert (left_in(tmp_path), files_of(out) == before) == (["bundle", "checkpoint"], True)


def test_a_folder_that_is_no_bundle_is_never_replaced(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    outcome = command("engram-export", workshop.checkpoint(PLAIN), "-o", tmp_path / "home", "--force")
    assert outcome.err == (f"engram-export: {tmp_path / 'home'} exists and is not a bundle; choose another place\n")
    assert (outcome.code, left_in(tmp_path / "home")) == (2, ["letter.txt"])


def test_keeping_what_is_not_quantised_is_refused(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    outcome = command("engram-export", workshop.checkpoint(PLAIN), "-o", tmp_path / "bundle", "--quant", "keep")
    assert outcome.err == ("engram-export: checkpoint has no linear layer in Q4_0 or Q8_0 to keep; use --quant int8\n")
    assert (outcome.code, left_in(tmp_path)) == (3, [])


def test_a_context_beyond_the_models_is_refused(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    outcome = command("engram-export", workshop.checkpoint(PLAIN), "-o", tmp_path / "bundle", "--context", CONTEXT + 1)
    assert outcome.err == f"engram-export: context is {CONTEXT + 1}, this model takes 1 to {CONTEXT} tokens\n"
    assert (outcome.code, left_in(tmp_path)) == (2, [])


def test_a_checkpoint_that_isnt_there_is_named(tmp_path: Path, command: Command) -> None:
    outcome = command("engram-export", tmp_path / "nowhere", "-o", tmp_path / "bundle")
    assert outcome.err == (
        f"engram-export: {tmp_path / 'nowhere'} does not exist; give a folder with config.json or a .gguf file\n"
    )
    assert (outcome.code, left_in(tmp_path)) == (3, [])


class Interrupted(SilentReporter):
    """Presses Ctrl-C when a stage begins."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    @contextlib.contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Progress]:
        if title == self._title:
            raise KeyboardInterrupt
        with super().stage(title, total_bytes) as progress:
            yield progress


@pytest.mark.parametrize(
    ("stage", "left"),
    [("weights", []), *((stage, [".bundle.partial"]) for stage in ("table layer_1", "verify", "digests"))],
)
def test_an_interrupted_export_leaves_no_bundle(
    workshop: Workshop, tmp_path: Path, stage: str, left: list[str]
) -> None:
    options = export_options(workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle")
    with pytest.raises(KeyboardInterrupt):
        export_bundle(options, Interrupted(stage))
    assert left_in(tmp_path) == left
