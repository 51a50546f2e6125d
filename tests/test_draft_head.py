"""A draft head's graph is the head of transformers' layers, whatever runs it and however its entries come."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from tests.conftest import Command
from tests.test_export_errors import error_line, left_in
from tests.tiny import HIDDEN, TinyModel, TinySite, save_site_folder
from tests.tiny_draft import BLOCK, DRAFT_VOCAB, draft_tensors, reference_drafts, reference_hidden, save_draft_folder
from tests.workshop import THREADS, Workshop, bundle_logits, copy_folder, export, open_session, random_ids

from engram_runtime.bundle import Bundle, sealed
from engram_runtime.draft_head import DraftHead
from engram_runtime.errors import BundleError, RequestError
from engram_runtime.executor import load_executor
from engram_runtime.golden import MAX_REGRET, mean_regret
from engram_runtime.manifest import Manifest
from examples.retrofit.exported_acceptance import exported_drafts
from examples.retrofit.mtp_data import Example

LLAMA = TinyModel()
MODELS = {
    "llama": LLAMA,
    "llama-untied": TinyModel(tied=False),
    "qwen3": TinyModel(family="qwen3", head_dim=32, tied=False),
}
FLOAT_TOLERANCE = 1e-4  # as for the decoder's float graphs
EXECUTORS = ("onnxruntime", "tvm")


def draft_folder(workshop: Workshop, model: TinyModel = LLAMA, *, int8: bool = False) -> Path:
    plain = workshop.checkpoint(model)
    return workshop._once(f"draft {model} {int8}", "draft", lambda out: save_draft_folder(out, plain, int8=int8))


def with_head(workshop: Workshop, model: TinyModel = LLAMA, *, quant: str = "none", int8: bool = False) -> Bundle:
    return workshop.bundle(workshop.checkpoint(model), engram=draft_folder(workshop, model, int8=int8), quant=quant)


def hidden_states(bundle: Bundle, token_ids: Sequence[int], executor: str = "onnxruntime") -> NDArray[np.float32]:
    with open_session(bundle, executor) as session:
        session.prefill(token_ids)
        return session.hidden


def opened_head(bundle: Bundle, executor: str = "onnxruntime") -> DraftHead:
    return DraftHead(bundle, load_executor(executor, bundle, threads=THREADS))


@pytest.mark.parametrize("name", MODELS)
def test_the_float_graphs_give_hidden_states_and_drafts_of_transformers(workshop: Workshop, name: str) -> None:
    checkpoint, folder = workshop.checkpoint(MODELS[name]), draft_folder(workshop, MODELS[name])
    bundle, token_ids = with_head(workshop, MODELS[name]), random_ids(40)
    hidden = hidden_states(bundle, token_ids)
    np.testing.assert_allclose(hidden, reference_hidden(checkpoint, token_ids), atol=FLOAT_TOLERANCE, rtol=0)
    head = opened_head(bundle)
    drafted = head.extend(token_ids[1:], hidden[:-1], every_row=True)
    logits, following = reference_drafts(checkpoint, folder, token_ids[1:], hidden[:-1])
    np.testing.assert_allclose(drafted.logits, logits, atol=FLOAT_TOLERANCE, rtol=0)
    np.testing.assert_allclose(drafted.hidden, following, atol=FLOAT_TOLERANCE, rtol=0)
    assert head.vocabulary.tolist() == draft_tensors(checkpoint)["mtp.draft_vocab"].tolist()


def test_a_head_changes_nothing_of_the_decoder(workshop: Workshop) -> None:
    plain, token_ids = workshop.bundle(workshop.checkpoint(LLAMA), quant="int8"), random_ids(40)
    np.testing.assert_array_equal(
        bundle_logits(with_head(workshop, quant="int8"), token_ids), bundle_logits(plain, token_ids)
    )


def test_hidden_states_are_those_of_all_tokens_of_a_call(workshop: Workshop) -> None:
    bundle, token_ids = with_head(workshop), random_ids(12)
    whole = hidden_states(bundle, token_ids)
    with open_session(bundle) as session:
        assert session.hidden.shape == (0, whole.shape[1])
        session.prefill(token_ids[:7])
        session.decode(token_ids[7:])
        np.testing.assert_allclose(session.hidden, whole[7:], atol=FLOAT_TOLERANCE, rtol=0)


def test_integers_of_the_folder_are_taken_over(workshop: Workshop) -> None:
    stored = safetensors.numpy.load_file(draft_folder(workshop, int8=True) / "mtp.safetensors")
    bundle = with_head(workshop, quant="int8", int8=True)
    found = safetensors.numpy.load_file(bundle.file(bundle.manifest.graphs["mtp"].weights))
    parts = {
        "mtp.fc": ["mtp.fc"],
        "mtp.layers.0.mixer.qkv": [f"mtp.layers.0.self_attn.{part}_proj" for part in "qkv"],
        "mtp.layers.0.mixer.output": ["mtp.layers.0.self_attn.o_proj"],
        "mtp.layers.0.feed_forward.gate_up": [f"mtp.layers.0.mlp.{part}_proj" for part in ("gate", "up")],
        "mtp.layers.0.feed_forward.down": ["mtp.layers.0.mlp.down_proj"],
    }
    for name, tensors in parts.items():
        codes = np.concatenate([stored[f"{tensor}.weight"] for tensor in tensors]).astype(np.int64)
        scales = np.concatenate([stored[f"{tensor}.weight_scale"] for tensor in tensors]).astype(np.float32)
        full = np.abs(codes).max(axis=1) == 127  # rows on the grid that quantising anew leads to
        assert full.mean() > 0.9
        np.testing.assert_array_equal((found[f"{name}.codes"].reshape(codes.shape) - 128.0)[full], codes[full])
        np.testing.assert_array_equal(found[f"{name}.scale"][:, 0][full], scales[full])


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("llama", "none"),
        ("llama", "int8"),
        ("llama-untied", "int4"),
        pytest.param("llama", "int4", marks=pytest.mark.exhaustive),
        pytest.param("llama-untied", "none", marks=pytest.mark.exhaustive),
        pytest.param("llama-untied", "int8", marks=pytest.mark.exhaustive),
    ],
)
def test_weights_of_the_model_are_not_stored_twice(workshop: Workshop, name: str, quant: str) -> None:
    bundle = with_head(workshop, MODELS[name], quant=quant)
    graphs = bundle.manifest.graphs
    places = [external_places(bundle.file(graphs[graph].file)) for graph in ("decoder", "mtp")]
    shared = places[0].keys() & places[1].keys()
    assert {weight.split(".")[0] for weight in shared} == {"rotations", "embedding"} | {"lm_head"} - (
        {"lm_head"} if MODELS[name].tied else set()
    )
    assert all(places[0][weight] == places[1][weight] for weight in shared)
    assert all(weight.startswith("mtp.") for weight in places[1].keys() - shared)
    assert not any("multiplier" in weight for weight in places[1])  # int4's


def external_places(graph: Path) -> dict[str, dict[str, str]]:
    model = onnx.load(graph, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    }


def chained(head: DraftHead, token_ids: Sequence[int], hidden: NDArray[np.float32], count: int) -> list[int]:
    """Draft by running everything anew for each draft."""
    drafts: list[int] = []
    ids, states = list(token_ids), hidden
    for _ in range(count):
        drafted = head.extend(ids, states)
        head.trim(len(ids))
        drafts.append(int(head.vocabulary[drafted.logits[-1].argmax()]))
        ids, states = [*ids, drafts[-1]], np.concatenate([states, drafted.hidden[-1:]])
    return drafts


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_chain_of_drafts_is_that_of_everything_computed_anew(workshop: Workshop, executor: str) -> None:
    bundle, token_ids = workshop.compiled(with_head(workshop, quant="int8")), random_ids(30)
    hidden = hidden_states(bundle, token_ids, executor)
    anew, head = opened_head(bundle, executor), opened_head(bundle, executor)
    head.extend(token_ids[1:9], hidden[:8])
    for length in range(10, 30, 5):
        found = head.draft(token_ids[len(head) + 1 : length], hidden[len(head) : length - 1], 4)
        assert len(head) == length - 1
        assert found == chained(anew, token_ids[1:length], hidden[: length - 1], 4)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_entries_that_were_trimmed_leave_no_trace(workshop: Workshop, executor: str) -> None:
    bundle, token_ids = workshop.compiled(with_head(workshop, quant="int8")), random_ids(30)
    hidden = hidden_states(bundle, token_ids, executor)
    never, trimmed = opened_head(bundle, executor), opened_head(bundle, executor)
    trimmed.extend(token_ids[1:20], hidden[:19])
    trimmed.extend(random_ids(5, seed=1), hidden[20:25])
    trimmed.trim(12)
    never.extend(token_ids[1:13], hidden[:12])
    expected, found = (head.extend(token_ids[13:], hidden[12:-1], every_row=True) for head in (never, trimmed))
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.hidden, expected.hidden)


@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in [*MODELS][:2])])
def test_compiled_float_heads_give_the_drafts_of_onnxruntime(workshop: Workshop, name: str) -> None:
    bundle, token_ids = workshop.compiled(with_head(workshop, MODELS[name])), random_ids(40)
    hidden = hidden_states(bundle, token_ids)
    np.testing.assert_allclose(hidden_states(bundle, token_ids, "tvm"), hidden, atol=FLOAT_TOLERANCE, rtol=0)
    expected, found = (
        opened_head(bundle, executor).extend(token_ids[1:], hidden[:-1], every_row=True) for executor in EXECUTORS
    )
    np.testing.assert_allclose(found.logits, expected.logits, atol=FLOAT_TOLERANCE, rtol=0)
    np.testing.assert_allclose(found.hidden, expected.hidden, atol=FLOAT_TOLERANCE, rtol=0)


def test_compiled_bits_dont_depend_on_how_many_entries_come_at_once(workshop: Workshop) -> None:
    plain, token_ids = with_head(workshop, quant="int8", int8=True), random_ids(30)
    bundle = workshop.compiled(plain, decode_tokens=(1, 4))
    hidden = hidden_states(bundle, token_ids, "tvm")
    with open_session(bundle, "tvm") as session:
        steps = []
        for token_id in token_ids:
            session.decode([token_id])
            steps.append(session.hidden)
    np.testing.assert_array_equal(np.concatenate(steps), hidden)
    whole = opened_head(bundle, "tvm").extend(token_ids[1:], hidden[:-1], every_row=True)
    head = opened_head(bundle, "tvm")
    for places in itertools.pairwise([0, 1, 4, 11, 19, 29]):
        part = slice(*places)
        found = head.extend(token_ids[1:][part], hidden[:-1][part], every_row=True)
        np.testing.assert_array_equal(found.logits, whole.logits[part])
        np.testing.assert_array_equal(found.hidden, whole.hidden[part])


def test_the_drafts_in_a_row_that_a_text_confirms_are_counted(workshop: Workshop) -> None:
    bundle, prompt = with_head(workshop), random_ids(7)
    hidden = np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)
    head = opened_head(bundle)
    head.extend(prompt[1:6], hidden[:5])
    first, second, third = head.draft(prompt[6:], hidden[5:6], 3)
    other = (third + 1) % 64
    tokens = torch.tensor([*prompt, first, second, other])
    counted = exported_drafts(opened_head(bundle), Example(tokens, torch.from_numpy(hidden), 6, "prose"))
    assert len(counted) == 3
    assert counted[0] == 2


def test_compiled_embeddings_stand_once_in_the_packed_weights(workshop: Workshop) -> None:
    bundle = workshop.compiled(with_head(workshop, quant="int8"))
    info = json.loads(next(bundle.path.glob("lib/*/compile.json")).read_text())
    names = [tensor["name"] for tensor in info["tensors"]]
    used = {graph: {names[place] for place in places} for graph, places in info["graph_tensors"].items()}
    assert any(name.startswith("embedding.codes:") for name in used["decoder"] & used["mtp"])
    assert any(name.startswith("embedding.codes.rows.mtp.vocabulary:") for name in used["mtp"] - used["decoder"])


def test_entries_that_cant_be_are_refused(workshop: Workshop) -> None:
    head, hidden = opened_head(with_head(workshop)), np.zeros((3, 64), dtype=np.float32)
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: head.extend([], hidden[:0]), "0 tokens and 0 hidden states were given; expected as many of both"),
        (lambda: head.extend([1, 2], hidden), "2 tokens and 3 hidden states were given; expected as many of both"),
        (lambda: head.extend([1] * 193, np.zeros((193, 64), np.float32)), "193 entries exceed the context of 192"),
        (lambda: head.trim(1), "can't trim 1 entries of a draft head of 0"),
    ]
    for call, sentence in wrong:
        with pytest.raises(RequestError) as caught:
            call()
        assert str(caught.value) == sentence


def test_a_bundle_without_a_head_has_none_to_open(workshop: Workshop) -> None:
    with pytest.raises(BundleError) as caught:
        opened_head(workshop.uncompiled())
    assert str(caught.value) == "this bundle has no graph 'mtp', only ['decoder']"


def test_a_folder_may_add_a_site_and_a_head(workshop: Workshop, tmp_path: Path) -> None:
    plain, token_ids = workshop.checkpoint(LLAMA), random_ids(20)
    both = save_site_folder(tmp_path / "both", plain, TinySite())
    config = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps(config | {"mtp": BLOCK}))
    (both / "mtp.safetensors").write_bytes((draft_folder(workshop) / "mtp.safetensors").read_bytes())
    bundle = workshop.bundle(plain, engram=both)
    assert (list(bundle.manifest.graphs), len(bundle.manifest.tables)) == (["decoder", "mtp"], 1)
    site_alone = workshop.bundle(plain, engram=workshop.site_folder(LLAMA, TinySite()))
    np.testing.assert_array_equal(bundle_logits(bundle, token_ids), bundle_logits(site_alone, token_ids))


# What commands say of it.


def test_verify_and_inspect_know_the_head(workshop: Workshop, command: Command) -> None:
    bundle = workshop.compiled(with_head(workshop, quant="int8"))
    for executor in EXECUTORS:
        drafts = command("engram", "verify", bundle.path, "--executor", executor, "--json").json["golden drafts"]
        assert drafts["tokens"] == len(json.loads(bundle.file("golden/golden.json").read_text())["token_ids"]) - 1
        assert drafts["mean_regret"] < 0.02
    shown = command("engram", "inspect", bundle.path, "--json").json
    assert (shown["graphs"], shown["drafts"]) == ("decoder, mtp", f"of {DRAFT_VOCAB} tokens")


def test_drafts_of_another_head_are_found_out(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    folder = copy_folder(with_head(workshop, quant="int8").path, tmp_path / "b")
    path = folder / "golden" / "golden.json"
    golden = json.loads(path.read_text())
    golden["draft_argmax"] = [(place + 1) % DRAFT_VOCAB for place in golden["draft_argmax"]]
    path.write_text(json.dumps(golden))
    manifest = json.loads((folder / "engram.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == "golden/golden.json":
            entry["bytes"] = path.stat().st_size
            entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "engram.json").write_bytes(sealed(manifest))
    outcome = command("engram", "verify", folder, "--executor", "onnxruntime")
    assert error_line(outcome.err).startswith("engram: drafts differ from those at export: they are ")


MANIFEST_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no-vocabulary": (
        lambda raw: raw.pop("draft_vocabulary"),
        "the draft head lacks draft_vocabulary; export the bundle again",
    ),
    "no-graph": (
        lambda raw: raw["graphs"].pop("mtp"),
        "the draft head lacks graph 'mtp'; export the bundle again",
    ),
    "no-hidden": (
        lambda raw: raw["graphs"]["decoder"]["outputs"].pop(),
        "the draft head lacks output 'hidden' of the decoder; export the bundle again",
    ),
    "unlisted-vocabulary": (
        lambda raw: raw.update(draft_vocabulary="graph/ids"),
        "manifest refers to 'graph/ids', which is not among its files",
    ),
    "other-inputs": (
        lambda raw: raw["graphs"]["mtp"]["inputs"].pop(2),
        "the draft head's inputs are [('token_ids', 'int64', ('T',)), ('position', 'int64', (1,)), "
        "('hidden', 'float32', ('T', 64))], expected [('token_ids', 'int64', ('T',)), ('position', 'int64', (1,)), "
        "('logit_rows', 'int64', ('R',)), ('hidden', 'float32', ('T', 64))]",
    ),
    "more-tokens-than-there-are": (
        lambda raw: raw["graphs"]["mtp"]["outputs"][0].update(shape=["R", 301]),
        "the draft head's outputs are [('logits', 'float32', ('R', 301)), ('next.hidden', 'float32', ('T', 64))], "
        "expected logits of at most 300 tokens and ('next.hidden', 'float32', ('T', 64))",
    ),
}


@pytest.mark.parametrize("name", MANIFEST_DAMAGE)
def test_a_manifest_that_contradicts_itself_is_refused(workshop: Workshop, name: str) -> None:
    damage, sentence = MANIFEST_DAMAGE[name]
    raw = json.loads((with_head(workshop).path / "engram.json").read_text())
    del raw["sha256"]  # the file's seal, which is no part of what it says
    damage(raw)
    with pytest.raises(BundleError) as caught:
        Manifest.from_dict(raw)
    assert str(caught.value) == sentence


def test_ids_that_are_no_tokens_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_folder(with_head(workshop).path, tmp_path / "b"))
    path = bundle.file("graph/mtp.vocabulary.int32")
    raw = json.loads((bundle.path / "engram.json").read_text())
    (entry,) = [entry for entry in raw["files"] if entry["path"] == "graph/mtp.vocabulary.int32"]
    ids = np.fromfile(path, dtype="<i4")
    for wrong, sentence in (
        (ids[1:], f"holds {DRAFT_VOCAB - 1} ids, the draft head has {DRAFT_VOCAB} logits; export again"),
        (np.where(ids == ids[3], 300, ids), f"holds ids {ids.min()} to 300, expected 0 to 299; export again"),
    ):
        content = wrong.astype("<i4").tobytes()
        path.write_bytes(content)
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        (bundle.path / "engram.json").write_bytes(sealed(raw))
        with pytest.raises(BundleError) as caught:
            Bundle.open(bundle.path).draft_vocabulary()
        assert str(caught.value) == f"graph/mtp.vocabulary.int32 {sentence}"


# Folders that can't be exported.

FOLDER_DAMAGE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "layers": ({"num_layers": 2}, {}, "the mtp block has num_layers 2, supported is 1"),
    "words": (
        {"hidden": "before the final norm"},
        {},
        "the mtp block has hidden 'before the final norm', supported is 'after the final norm'",
    ),
    "inputs": (
        {"fc_input": ["norm(hidden t)"]},
        {},
        "the mtp block has fc_input ['norm(hidden t)'], "
        "supported is ['norm(embedding of token t+1)', 'norm(hidden t)']",
    ),
    "unknown-key": (
        {"trees": 2},
        {},
        "the mtp block has unknown keys ['trees']; it may need a newer engram-edge; correct the folder's config",
    ),
    "ids": (
        {"draft_vocab_size": 3},
        {"mtp.draft_vocab": np.array([1, 2, 300], dtype=np.int32)},
        "mtp.draft_vocab has ids 1 to 300, expected distinct ones within [0, 300)",
    ),
    "fewer-ids": (
        {"draft_vocab_size": 4},
        {},
        f"mtp.draft_vocab has shape [{DRAFT_VOCAB}], the config says [4]",
    ),
    "no-scales": (
        {},
        {"mtp.fc.weight_scale": None},
        "mtp.fc.weight is I8 without scales, expected mtp.fc.weight_scale",
    ),
    "other-scales": (
        {},
        {"mtp.fc.weight_scale": np.ones(3, dtype=np.float16)},
        "mtp.fc.weight_scale has shape [3], mtp.fc.weight [64, 128] wants one scale for each row",
    ),
    "bad-scale": (
        {},
        {"mtp.fc.weight_scale": np.full(64, np.nan, dtype=np.float16)},
        "mtp.fc.weight_scale has scale nan in row 0, expected finite scales",
    ),
    "no-norm": ({}, {"mtp.norm.weight": None}, "the checkpoint lacks 1 tensors: mtp.norm.weight; it is incomplete"),
}


@pytest.mark.parametrize("name", FOLDER_DAMAGE)
def test_a_head_that_cant_be_exported_leaves_one_sentence_and_no_file(
    workshop: Workshop, tmp_path: Path, command: Command, name: str
) -> None:
    keys, tensors, sentence = FOLDER_DAMAGE[name]
    folder = copy_folder(draft_folder(workshop, int8=True), tmp_path / "draft")
    (folder / "config.json").write_text(json.dumps({"mtp": BLOCK | keys}))
    stored = safetensors.numpy.load_file(folder / "mtp.safetensors") | tensors
    safetensors.numpy.save_file(
        {part: values for part, values in stored.items() if values is not None}, folder / "mtp.safetensors"
    )
    checkpoint = workshop.checkpoint(LLAMA)
    outcome = command("engram-export", checkpoint, "-o", tmp_path / "out" / "bundle", "--engram", folder)
    assert error_line(outcome.err) == f"engram-export: {sentence}"
    assert (outcome.code, left_in(tmp_path / "out")) == (3, [])


DEEPSEEK_NAMES = {
    "mtp.layers.0.": "model.layers.2.",
    "mtp.pre_fc_norm_embedding.": "model.layers.2.enorm.",
    "mtp.pre_fc_norm_hidden.": "model.layers.2.hnorm.",
    "mtp.fc.": "model.layers.2.eh_proj.",
    "mtp.norm.": "model.layers.2.shared_head.norm.",
}


@pytest.mark.parametrize("int8", [False, True])
def test_a_head_with_the_names_of_deepseek_is_that_head(workshop: Workshop, tmp_path: Path, int8: bool) -> None:
    folder = copy_folder(draft_folder(workshop, int8=int8), tmp_path / "folder")
    tensors = safetensors.numpy.load_file(folder / "mtp.safetensors")
    renamed = {}
    for name, values in tensors.items():
        theirs = [name.replace(ours, other) for ours, other in DEEPSEEK_NAMES.items() if name.startswith(ours)]
        renamed[theirs[0] if theirs else name] = values
    assert "model.layers.2.eh_proj.weight" in renamed
    safetensors.numpy.save_file(renamed, folder / "mtp.safetensors")
    bundle = workshop.bundle(workshop.checkpoint(LLAMA), engram=folder)
    ids, hidden = random_ids(5), np.ones((5, HIDDEN), dtype=np.float32)
    drafted = opened_head(bundle).extend(ids, hidden, every_row=True)
    expected = opened_head(with_head(workshop, int8=int8)).extend(ids, hidden, every_row=True)
    np.testing.assert_array_equal(drafted.logits, expected.logits, strict=True)


def test_a_folder_that_adds_nothing_is_refused(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    (tmp_path / "config.json").write_text("{}")
    checkpoint = workshop.checkpoint(LLAMA)
    outcome = command("engram-export", checkpoint, "-o", tmp_path / "out" / "bundle", "--engram", tmp_path)
    path = tmp_path / "config.json"
    assert error_line(outcome.err) == f"engram-export: {path} has neither an 'engram' nor an 'mtp' block"


def test_drafts_are_verified_at_export(workshop: Workshop, tmp_path: Path) -> None:
    found = export(
        workshop.checkpoint(LLAMA), tmp_path / "b", engram=draft_folder(workshop, int8=True), quant="int8"
    ).draft
    assert found is not None
    assert found.max_abs < FLOAT_TOLERANCE


def test_a_calibrated_model_has_its_head_in_int8(workshop: Workshop, tmp_path: Path) -> None:
    folder = draft_folder(workshop, int8=True)
    found = export(workshop.checkpoint(LLAMA), tmp_path / "b", engram=folder, quant="int4", calibration="built-in")
    assert found.calibration is not None
    assert found.draft is not None
    assert found.draft.max_abs < FLOAT_TOLERANCE


def test_a_head_takes_rows_of_an_output_layer_that_is_kept_in_blocks(workshop: Workshop) -> None:
    model = MODELS["llama-untied"]
    gguf = workshop.gguf(GGMLQuantizationType.Q8_0, model)
    bundle = workshop.compiled(workshop.bundle(gguf, engram=draft_folder(workshop, model, int8=True), quant="keep"))
    token_ids = random_ids(20)
    hidden = hidden_states(bundle, token_ids)
    expected, found = (
        opened_head(bundle, executor).extend(token_ids[1:], hidden[:-1], every_row=True) for executor in EXECUTORS
    )
    assert mean_regret(found.logits, expected.logits.argmax(axis=1).tolist()) < MAX_REGRET
