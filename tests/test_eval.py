"""``engram eval`` on tiny bundles: figures that must equal one another, and how it ends where something is missing."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Command
from tests.rows import gathered
from tests.tiny import TinyModel, TinySite
from tests.workshop import Workshop
from transformers import AutoModelForCausalLM

from engram_runtime.bundle import Bundle
from engram_runtime.evaluation.parity import distances
from engram_runtime.evaluation.texts import BLOCK_TOKENS, Windows, block_sums
from engram_runtime.lens.repack_errors import REPACKING
from engram_runtime.session import open_sites
from engram_runtime.tables.changed import PermutedTable
from engram_runtime.tokenizer import TextTokenizer

TEXT = "The hash of the last two tokens is read by the table; 日本語. " * 12
ORT = ("--executor", "onnxruntime")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (path := tmp_path / "text").write_text(TEXT)
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [
        {"prompt": "The tide comes", "choices": [" in", " out", " twice a day"], "answer": place % 3}
        for place in range(3)
    ]
    lines.append({"text": "A table of", "target": " rows"})
    (path := tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return path


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=300))
def test_blocks_hold_every_token_once_and_none_is_short(values: list[float]) -> None:
    each = np.array(values)
    assert block_sums(each).sum() == pytest.approx(each.sum(), abs=1e-9)
    assert block_sums(np.ones(len(each))).min() >= min(len(each), BLOCK_TOKENS)


def test_a_text_in_windows_is_scored_but_for_first_tokens(workshop: Workshop) -> None:
    tokenizer, text = TextTokenizer.load(workshop.uncompiled().path), "The tide comes in twice a day. " * 5
    found = Windows.of(tokenizer, text, tokens=10**6, window=7)
    whole = [token_id for token_ids in found.token_ids for token_id in token_ids]
    assert whole == tokenizer.encode(text)
    firsts = [token_ids[0] for token_ids in found.token_ids]
    unscored = sum(len(tokenizer.decode([first])) for first in firsts)
    assert found.num_bytes.sum() == len(text) - unscored
    assert len(found.num_bytes) == found.tokens - len(found.token_ids)


def score(command: Command, bundle: Bundle, text: Path, *options: object) -> dict[str, Any]:
    found: dict[str, Any] = command("engram", "eval", "ppl", bundle.path, "--text", text, *ORT, *options, "--json").json
    return found


def test_bits_per_byte_are_those_of_the_perplexity(workshop: Workshop, command: Command, text: Path) -> None:
    found = score(command, workshop.uncompiled(), text)
    bits = math.log2(found["perplexity"]["value"]) * found["scored_tokens"] / found["bytes"]
    assert found["bits_per_byte"]["value"] == pytest.approx(bits)
    for figure in (found["perplexity"], found["bits_per_byte"]):
        assert figure["low"] < figure["value"] < figure["high"]


def test_short_texts_have_no_interval_and_say_so(workshop: Workshop, command: Command, text: Path) -> None:
    line = ("engram", "eval", "ppl", workshop.uncompiled().path, "--text", text, *ORT, "--tokens", 20)
    assert command(*line).out.count(" (too little for an interval), ") == 2
    assert command(*line, "--json").json["perplexity"]["low"] is None


def test_tables_off_in_an_ablation_is_tables_off(workshop: Workshop, command: Command, text: Path) -> None:
    bundle = workshop.uncompiled()
    report = command("engram", "eval", "ablate", bundle.path, "--text", text, *ORT, "--json").json
    found = {condition.pop("condition"): condition for condition in report["conditions"]}
    assert list(found) == ["as it is", "tables off", "rows shuffled", "rows as int8", "rows as fp8", "rows as int4"]
    on, off = (score(command, bundle, text, "--tables", tables)["perplexity"] for tables in ("on", "off"))
    assert found["as it is"]["perplexity"] == on
    assert found["tables off"]["perplexity"] == off
    assert found["tables off"]["ratio"]["value"] == pytest.approx(off["value"] / on["value"])
    assert found["as it is"]["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["rows shuffled"]["perplexity"]["value"] not in (on["value"], off["value"])
    assert found["rows as int8"] == {"not_measured": "not measured: rows have as few bytes already"}
    repacked = workshop.bundle(
        workshop.checkpoint(TinyModel(), TinySite()), quant="int8", tables="repack", table_dtype="int4"
    )
    assert found["rows as int4"]["perplexity"] == score(command, repacked, text)["perplexity"]


def test_each_of_several_sites_is_switched_off_alone(workshop: Workshop, command: Command, text: Path) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel(), TinySite(layer_id=0), TinySite(layer_id=1)))
    line = ("engram", "eval", "ablate", bundle.path, "--text", text, *ORT)
    found = command(*line, "--json").json["conditions"]
    assert [condition["condition"] for condition in found[:4]] == [
        "as it is",
        "tables off",
        "layer_0 off",
        "layer_1 off",
    ]
    assert len({condition["perplexity"]["value"] for condition in found[:4]}) == 4
    assert command(*line).out.splitlines()[-1].startswith("on this text tables ")


def test_questions_are_answered_under_each_condition(workshop: Workshop, command: Command, questions: Path) -> None:
    bundle = workshop.uncompiled().path
    line = ("engram", "eval", "ablate", bundle, "--choices", questions, *ORT)
    found = command(*line, "--json").json["conditions"]
    for condition, tables in zip(found[:2], ("on", "off"), strict=True):
        alone = command("engram", "eval", "choices", bundle, questions, *ORT, "--tables", tables, "--json").json
        assert condition["choices"]["right"] == alone["choices"]["accuracy"]
        assert condition["cloze"]["right"] == alone["cloze"]["exact"]
        difference = condition["choices"]["right"]["value"] - found[0]["choices"]["right"]["value"]
        assert condition["choices"]["difference"]["value"] == difference
    lines = command(*line).out.splitlines()
    assert lines[0].startswith("as it is: choices 33.3% (6.1% to 79.2%) right; cloze ")
    assert lines[-1].startswith("by choices tables may help or harm: ")


def test_quantising_needs_the_export_package(
    workshop: Workshop, command: Command, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, REPACKING, None)
    outcome = command("engram", "eval", "ablate", workshop.uncompiled().path, "--text", text, *ORT)
    said = f"rows as int4: not measured: quantising needs {REPACKING}: pip install 'engram-edge[export]'"
    assert said in outcome.out.splitlines()


def test_items_tell_of_each_question(workshop: Workshop, command: Command, questions: Path, tmp_path: Path) -> None:
    line = ("engram", "eval", "choices", workshop.uncompiled().path, questions, *ORT, "--items", tmp_path / "items")
    report = command(*line, "--json").json
    items = [json.loads(item) for item in (tmp_path / "items").read_text().splitlines()]
    assert [item["line"] for item in items] == [1, 2, 3, 4]
    assert [item["kind"] for item in items] == ["choices"] * 3 + ["cloze"]
    for score in ("accuracy", "accuracy_per_token", "accuracy_per_byte"):
        right = sum(item["chosen"][score] == item["answer"] for item in items[:3])
        assert report["choices"][score]["value"] == right / 3
    assert report["choices"]["chance"] == pytest.approx(1 / 3)
    again = command(*line, "--limit", 1)
    assert (again.code, again.err.splitlines()[-1]) == (
        2,
        f"engram: {tmp_path / 'items'} exists; replace it with --force or choose another place",
    )
    assert command(*line, "--limit", 1, "--force").out.splitlines()[0] == (
        "1 questions with choices, by chance 33.3% right"
    )


def test_an_executor_is_nowhere_from_itself(workshop: Workshop, command: Command, text: Path) -> None:
    line = ("engram", "eval", "parity", workshop.uncompiled().path, "--text", text, "--executors")
    report = command(*line, "onnxruntime,onnxruntime", "--json").json
    assert (report["reference"], list(report["compared"])) == ("onnxruntime", ["onnxruntime"])
    found = report["compared"]["onnxruntime"]
    zero, one = ({"value": value, "low": value, "high": value} for value in (0.0, 1.0))
    assert (found["divergence"], found["perplexity_ratio"]) == (zero, one)
    assert (found["max_divergence"], found["max_abs"], found["median_abs"]) == (0, 0, 0)
    assert (found["top1_agreement"]["value"], found["top1_agreement"]["high"]) == (1, 1)
    assert found["perplexity"] == found["reference_perplexity"]


def test_a_float_bundle_is_nowhere_from_its_checkpoint(workshop: Workshop, command: Command, text: Path) -> None:
    checkpoint = workshop.checkpoint(TinyModel())
    bundle = workshop.bundle(checkpoint).path
    line = ("engram", "eval", "parity", bundle, "--text", text, "--against", checkpoint, "--executors", "onnxruntime")
    found = command(*line, "--json").json["compared"]["onnxruntime"]
    assert found["max_abs"] < 1e-3
    assert found["perplexity_ratio"]["value"] == pytest.approx(1, abs=1e-4)
    lines = command(*line).out.splitlines()
    assert lines[0] == f"onnxruntime against checkpoint, {found['tokens']} tokens"
    assert lines[2].startswith("  same likeliest token 100.00% (")


@pytest.mark.parametrize("line", [("eval", "parity", "--executors", "onnxruntime"), ("verify", *ORT)])
def test_a_checkpoint_of_another_vocabulary_is_refused(
    workshop: Workshop, command: Command, text: Path, tmp_path: Path, line: tuple[str, ...]
) -> None:
    bundle, other = workshop.uncompiled(), tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(workshop.checkpoint(TinyModel()))
    model.resize_token_embeddings(8)
    model.save_pretrained(other)
    outcome = command("engram", *line, bundle.path, "--text", text, "--against", other)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        3,
        f"engram: checkpoint {other} has a vocabulary of 8 tokens, the bundle one of "
        f"{bundle.manifest.model.vocab_size}; give the one that it was made from",
    )


def test_distances_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    logits = {name: rng.standard_normal((5, 7)).astype(np.float32) for name in ("reference", "other")}
    windows = Windows(size=5, token_ids=[[0, 1, 2, 3, 4]], num_bytes=np.ones(4, dtype=np.int64))
    found = distances(
        lambda ids: logits["reference"], {"other": lambda ids: logits["other"]}, windows, lambda count: None
    )["other"]
    p, q = (np.exp(each[:4]) / np.exp(each[:4]).sum(axis=1, keepdims=True) for each in logits.values())
    np.testing.assert_allclose(found.divergence, (p * np.log(p / q)).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.losses, -np.log(q[np.arange(4), [1, 2, 3, 4]]), rtol=1e-5)
    np.testing.assert_array_equal(found.agrees, p.argmax(axis=1) == q.argmax(axis=1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--executors", "tvm"), "--executors is tvm alone; give another one to compare, or --against CHECKPOINT"),
        (("--executors", "tvm,gpu"), "--executors names 'gpu', expected of tvm, onnxruntime"),
    ],
)
def test_parity_takes_executors_that_there_are(
    workshop: Workshop, command: Command, text: Path, options: tuple[str, ...], said: str
) -> None:
    outcome = command("engram", "eval", "parity", workshop.uncompiled().path, "--text", text, *options)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"engram: {said}\n")


def test_parity_without_the_export_package_says_how_to_install_it(
    workshop: Workshop, command: Command, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "engram_export.parity", None)
    outcome = command("engram", "eval", "parity", workshop.uncompiled().path, "--text", text, "--against", "c")
    assert (outcome.code, outcome.err) == (
        4,
        "engram: --against needs engram_export.parity: pip install 'engram-edge[export]' transformers\n",
    )


def test_an_ablation_is_of_a_text_or_of_questions(workshop: Workshop, command: Command, text: Path) -> None:
    outcome = command("engram", "eval", "ablate", workshop.uncompiled().path)
    said = "engram: what are its tables to be worth something for? give either --text FILE or --choices FILE.jsonl\n"
    assert (outcome.code, outcome.err) == (2, said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--text", "t", "--limit", 3), "--limit is for --choices, which isn't given; leave it out"),
        (("--choices", "q", "--window", 64), "--window is for --text, which isn't given; leave it out"),
    ],
)
def test_an_ablation_takes_no_options_of_the_other_kind(
    workshop: Workshop, command: Command, options: tuple[object, ...], said: str
) -> None:
    outcome = command("engram", "eval", "ablate", workshop.uncompiled().path, *options)
    assert (outcome.code, outcome.err) == (2, f"engram: {said}\n")


def test_a_bundle_without_tables_has_none_to_do_without(workshop: Workshop, command: Command, text: Path) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel())).path
    outcome = command("engram", "eval", "ablate", bundle, "--text", text, *ORT)
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: bundle {bundle} has no tables to do without; score it with: engram eval ppl\n",
    )


def test_permuted_rows_are_those_of_the_others(workshop: Workshop) -> None:
    (site,) = open_sites(workshop.uncompiled())
    rows = np.arange(site.spec.num_rows)
    columns = site.spec.record.columns
    before = gathered(site.table, columns, rows)
    moved = PermutedTable(site.table, np.array([3, 5, 8]), np.array([8, 3, 5]))
    expected = before.copy()
    expected[[3, 5, 8]] = before[[8, 3, 5]]
    np.testing.assert_array_equal(gathered(moved, columns, rows), expected)
    site.table.close()
