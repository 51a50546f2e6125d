"""A memory added to a model that is trained: the site as it is trained, what it learns, and what is written of it."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import TURN_END, TinyModel, save_checkpoint

from engram_export.decoder import Step
from engram_export.engram_config import EngramConfig
from engram_export.engram_site import EngramSite
from engram_runtime.errors import RequestError
from engram_runtime.keyers import NgramKeyer
from engram_runtime.records import RecordFormat
from engram_runtime.tables.overlay_file import ZERO, read_overlay
from examples.retrofit.artefacts import engram_block, int4_rows, read_site, token_map_of, write_cartridge, write_site
from examples.retrofit.backbone import Backbone, batches_by_length, load_backbone, pad
from examples.retrofit.documents import CachedDocument, Document, fact_chats, own_answers, row_ids
from examples.retrofit.engram_site import ROW_DIM, RowTable, TrainableSite, make_keyer
from examples.retrofit.facts import OPENING, TRAINED_QUESTIONS, Fact
from examples.retrofit.losses import cross_entropy, divergence
from examples.retrofit.manual_text import distinct, facts_of, facts_of_text, stated_in
from examples.retrofit.site_check import Check, SiteCheck
from examples.retrofit.site_command import TrainingLog, digest_of, has_settled, run
from examples.retrofit.site_text import unknown_terms
from examples.retrofit.site_training import QuietText, Schedule, SiteTraining, TrainingText
from examples.retrofit.stream_cache import StreamCache

BLOCK, ORDERS, HEADS, ROWS = 1, (2, 3), 2, 500
FACTS = (
    Fact("tide", "it comes in"),
    Fact("table", "rows of it are read"),
    Fact("day", "twice"),
    Fact("stream", "rows are added"),
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A random llama of two blocks, the site before the second."""
    return load_backbone(chat_model(tmp_path_factory.mktemp("tiny") / "model"), block=BLOCK)


def chat_model(folder: Path) -> Path:
    save_checkpoint(folder, TinyModel())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": TURN_END}))
    return folder


def chat(backbone: Backbone, fact: Fact) -> Document:
    question, answer = backbone.encode(f"{fact.subject}?"), backbone.encode(f"{fact.subject}: {fact.statement}.")
    token_ids = [*question, *answer, 2]
    return Document(token_ids, len(question), len(token_ids))


def cached(backbone: Backbone, documents: list[Document]) -> list[CachedDocument]:
    keyer = keyer_of(backbone)
    streams = dict(backbone.hidden_at_site([document.token_ids for document in documents]))
    return [
        CachedDocument(document, streams[index], row_ids(keyer, document.token_ids))
        for index, document in enumerate(documents)
    ]


def keyer_of(backbone: Backbone) -> NgramKeyer:
    token_map = token_map_of(backbone.tokenizer)
    return make_keyer(token_map, block=BLOCK, orders=ORDERS, heads=HEADS, rows_per_head=ROWS, pad_id=0, seed=0)


def new_site(backbone: Backbone, **options: float) -> TrainableSite:
    torch.manual_seed(0)
    width = len(ORDERS) * HEADS * ROW_DIM
    return TrainableSite(hidden_size=backbone.hidden_size, width=width, output_scale=1.0, **options)


def block_of(backbone: Backbone, site: TrainableSite) -> dict[str, Any]:
    keyer = keyer_of(backbone)
    return engram_block(keyer, block=BLOCK, row_dim=ROW_DIM, output_scale=site.output_scale, seed=0)


def new_table(backbone: Backbone) -> RowTable:
    return RowTable(int(keyer_of(backbone).primes.sum()), seed=0)


def text_of(backbone: Backbone, chats: list[Document]) -> TrainingText:
    other = other_text(backbone)
    return TrainingText([cached(backbone, chats)], [], [own_answers(backbone, other)], [QuietText.of(other)])


def other_text(backbone: Backbone) -> list[CachedDocument]:
    return cached(backbone, [Document(backbone.encode("Über den Wolken muss die Freiheit sein"), 4, 4)])


def training_of(backbone: Backbone, schedule: Schedule, site: TrainableSite) -> SiteTraining:
    text = text_of(backbone, [chat(backbone, fact) for fact in FACTS])
    return SiteTraining(backbone, site, new_table(backbone), text, schedule)


def test_lower_and_upper_blocks_are_the_whole_model(backbone: Backbone) -> None:
    documents = [[5, 6, 7, 8, 9], [10, 11, 12]]
    states = backbone.upper(backbone.lower(pad(documents)))
    for state, document in zip(states, documents, strict=True):
        with torch.no_grad():
            expected = backbone.model(torch.tensor([document])).logits[0]
        found = state[: len(document)] @ backbone.output_weight.T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_the_block_is_refused(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "model")
    with pytest.raises(RequestError) as caught:
        load_backbone(folder, block=2)
    assert str(caught.value) == f"{folder} has 2 blocks, so a site can't stand before block 2; choose 1 to 1"


def test_a_model_that_is_not_chatted_with_in_chatml_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", TinyModel())
    with pytest.raises(RequestError) as caught:
        load_backbone(folder, block=1)
    assert str(caught.value) == (
        f"the tokenizer of {folder} ends a turn with '<|endoftext|>', expected '<|im_end|>'; "
        "choose a model that is chatted with in ChatML"
    )


def test_streams_of_a_batch_are_those_of_each_document_alone(backbone: Backbone) -> None:
    documents = [[5, 6, 7, 8, 9], [10, 11, 12], [13]]
    for index, stream in backbone.hidden_at_site(documents):
        alone = backbone.lower(torch.tensor([documents[index]]))[0]
        torch.testing.assert_close(stream, alone, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_each_document_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(batches_by_length(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)


def test_trainable_site_is_the_exported_one(backbone: Backbone, tmp_path: Path) -> None:
    site, keyer = new_site(backbone, gate_bias=-0.5), keyer_of(backbone)
    rows = np.random.default_rng(0).normal(size=(int(keyer.primes.sum()), ROW_DIM)).astype(np.float32)
    write_site(tmp_path, block_of(backbone, site), site, keyer, rows)
    config, read, read_keyer = read_site(tmp_path)
    hidden = torch.randn(7, backbone.hidden_size)
    token_ids = np.arange(20, 27)
    ids = torch.from_numpy(read_keyer.row_ids([], token_ids))
    assert torch.equal(ids, row_ids(keyer, token_ids.tolist()))
    gathered = torch.from_numpy(rows)[ids]
    exported = exported_site(config, read, backbone.hidden_size)
    step = Step(
        token_ids=torch.from_numpy(token_ids),
        position=torch.zeros(1, dtype=torch.int64),
        rows={config.site: gathered},
        states={},
        rotations={},
        activity={},
    )
    expected = exported(hidden, step) - hidden
    torch.testing.assert_close(read(hidden, gathered.flatten(1)), expected, rtol=1e-4, atol=1e-5)


def exported_site(config: EngramConfig, site: TrainableSite, hidden_size: int) -> EngramSite:
    exported = EngramSite(
        config, hidden_size, lambda name, inputs, outputs: torch.nn.Linear(inputs, outputs, bias=False)
    )
    assert exported.gate_bias is not None
    with torch.no_grad():
        for linear, weight in ((exported.key_proj, site.key_proj), (exported.value_proj, site.value_proj)):
            linear.load_state_dict({"weight": weight})
        exported.query_norm.weight.copy_(site.query_norm)
        exported.key_norm.weight.fill_(1)
        exported.gate_bias.copy_(site.gate_bias)
    return exported.requires_grad_(False)


def test_a_site_learns_facts_and_leaves_other_text_alone(backbone: Backbone) -> None:
    schedule = Schedule(passes=150, batch=4, learning_rate=5e-3, row_learning_rate=0.05, own_answers=1, quiet_tokens=8)
    training = training_of(backbone, schedule, new_site(backbone))
    facts, other = cached(backbone, [chat(backbone, fact) for fact in FACTS]), other_text(backbone)
    check = SiteCheck(backbone, facts, other, other)
    assert check(training.site, training.table).recall == 0
    losses = [training.step() for _ in range(training.num_steps)]
    training.finish()
    found = check(training.site, training.table)
    assert found.recall == 1
    assert abs(found.cost) < 0.02
    assert losses[-1].answers < losses[0].answers / 10


def test_a_cartridge_trains_rows_alone(backbone: Backbone) -> None:
    site = new_site(backbone)
    before = {name: value.clone() for name, value in site.state_dict().items()}
    training = training_of(backbone, Schedule(passes=3, batch=2, train_projections=False), site)
    rows = training.table.values.clone()
    for _ in range(training.num_steps):
        training.step()
    assert all(torch.equal(value, before[name]) for name, value in site.state_dict().items())
    assert not torch.equal(training.table.values, rows)


def test_rows_that_no_answer_reads_are_zero_in_the_end(backbone: Backbone) -> None:
    training = training_of(backbone, Schedule(passes=1, batch=4), new_site(backbone))
    training.step()
    training.finish()
    read = torch.zeros(len(training.table.values), dtype=torch.bool)
    for document in cached(backbone, [chat(backbone, fact) for fact in FACTS]):
        read[document.row_ids[document.document.answer_start - 1 :].flatten()] = True
    assert not training.table.values[~read].any()
    assert training.table.values[read].any(dim=1).all()


def test_a_restored_training_goes_on_where_it_was(backbone: Backbone) -> None:
    schedule = Schedule(passes=4, batch=2)
    first, second = (training_of(backbone, schedule, new_site(backbone)) for _ in range(2))
    first.step()
    second.restore(copy.deepcopy(first.state()))
    assert second.step_count == 1
    assert second.step() == first.step()
    assert torch.equal(second.table.values, first.table.values)


SHORT = Schedule(passes=6, batch=2, own_answers=1, quiet_tokens=8, wind_down=2)


class Stopped(RuntimeError):
    """Raised in place of whatever ends a process."""


def trained(
    backbone: Backbone, folder: Path, *, facts: Sequence[Fact] = FACTS, checks: float = math.inf
) -> SiteTraining:
    """Run a training in a folder, which is stopped when it is checked once more than ``checks``."""
    site = new_site(backbone)
    training = training_of(backbone, SHORT, site)
    made = 0

    def check(_site: TrainableSite, _table: RowTable) -> Check:
        nonlocal made
        made += 1
        if made > checks:
            raise Stopped
        return Check(recall=0.5, unchanged=1.0, cost=0.0)

    cache = StreamCache(folder, "tiny", backbone, keyer_of(backbone))
    made_of = digest_of(facts, cache, SHORT, site)
    log = TrainingLog(folder / "training.json")
    run(training, check, log, folder / "state.pt", made_of=made_of)
    return training


@pytest.fixture
def kept_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("KEPT_EVERY", 2), ("REPORTED_EVERY", 1)):
        monkeypatch.setattr(f"examples.retrofit.site_command.{name}", value)


@pytest.mark.usefixtures("kept_often")
def test_a_run_that_was_stopped_goes_on_to_the_same_rows(backbone: Backbone, tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = trained(backbone, tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(backbone, tmp_path / "stopped", checks=2)
    resumed = trained(backbone, tmp_path / "stopped")
    assert (resumed.step_count, resumed.num_steps) == (whole.step_count, whole.num_steps) == (8, 8)  # of 12: it settled
    assert torch.equal(resumed.table.values, whole.table.values)
    assert all(torch.equal(value, whole.site.state_dict()[name]) for name, value in resumed.site.state_dict().items())
    logs = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "stopped")]
    whole_log, resumed_log = ([{**entry, "seconds": 0} for entry in log] for log in logs)
    assert resumed_log == whole_log


@pytest.mark.usefixtures("kept_often")
def test_the_state_of_other_facts_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        trained(backbone, tmp_path, checks=1)
    with pytest.raises(RequestError) as caught:
        trained(backbone, tmp_path, facts=FACTS[:3])
    assert str(caught.value) == (
        f"{tmp_path / 'state.pt'} is the state of another training; remove it, or choose another --work"
    )


def test_rows_with_which_answers_open_stay_as_they_are(backbone: Backbone) -> None:
    text = text_of(backbone, fact_chats(backbone, FACTS, TRAINED_QUESTIONS, 0))
    openings = text.opening_rows(len(backbone.encode(OPENING)))
    predicting = torch.cat([fact.row_ids[fact.document.answer_start - 1 : -1] for fact in text.wordings[0]])
    table = new_table(backbone)
    before = table.values.clone()
    schedule = Schedule(passes=3, batch=2, train_projections=False)
    training = SiteTraining(backbone, new_site(backbone), table, text, schedule, fixed_rows=openings)
    for _ in range(training.num_steps):
        training.step()
    training.finish()
    changed = (table.values != before).any(dim=1)
    assert not changed[openings].any()
    assert changed[list(set(predicting.flatten().tolist()) - set(openings))].all()


def test_a_training_ends_a_while_after_recall_has_settled(backbone: Backbone) -> None:
    assert not has_settled([])
    assert not has_settled([0.5, 0.5])
    assert not has_settled([0.5, 0.6, 0.5])
    assert has_settled([0.5, 0.6, 0.6, 0.605])
    assert not has_settled([0.0, 0.0, 0.0])
    training = training_of(backbone, Schedule(passes=30, batch=2, wind_down=3), new_site(backbone))
    training.step()
    training.wind_down()
    assert training.num_steps == 4
    training.step()
    training.wind_down()
    assert training.num_steps == 4


def test_the_runtime_reads_a_cartridge(backbone: Backbone, tmp_path: Path) -> None:
    site, keyer = new_site(backbone), keyer_of(backbone)
    rows = np.zeros((int(keyer.primes.sum()), ROW_DIM), dtype=np.float32)
    rows[[3, 40, 77]] = np.random.default_rng(1).normal(size=(3, ROW_DIM))
    write_site(tmp_path, block_of(backbone, site), site, keyer, rows)
    config, _, _ = read_site(tmp_path)
    assert write_cartridge(tmp_path / "manual.overlay", config, keyer, rows, replace=False) == 3
    overlay = read_overlay(tmp_path / "manual.overlay")
    assert overlay.row_ids.tolist() == [3, 40, 77]
    assert overlay.spec.others == ZERO
    read = overlay.spec.record.decode(overlay.records)
    assert np.abs(read - rows[[3, 40, 77]]).max() <= np.abs(rows).max() / 7 * 0.51


@given(st.lists(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), min_size=1, max_size=9))
def test_int4_rows_are_within_half_a_step(values: list[list[float]]) -> None:
    rows = np.array(values, dtype=np.float32)
    packed, scales = int4_rows(rows)
    record = RecordFormat(payload="int4", columns=4, scale="float16", scale_columns=4)
    read = record.decode(np.hstack([packed, scales[:, None].view(np.uint8)]))
    coarse = 1e-6  # scales below what float16 has
    assert (np.abs(read - rows) <= 0.51 * scales.astype(np.float32)[:, None] + np.abs(rows) / 500 + coarse).all()
    assert not read[~rows.any(axis=1)].any()


def test_cross_entropy_is_torchs() -> None:
    torch.manual_seed(0)
    states, weight, labels = torch.randn(600, 8, requires_grad=True), torch.randn(30, 8), torch.randint(30, (600,))
    expected = torch.nn.functional.cross_entropy(states @ weight.T, labels)
    (wanted,) = torch.autograd.grad(expected, states)
    loss = cross_entropy(states, weight, labels)
    (found,) = torch.autograd.grad(loss, states)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)


def test_divergence_of_a_model_from_itself_is_zero() -> None:
    states, weight = torch.randn(5, 8), torch.randn(30, 8)
    assert divergence(states, states, weight).abs() < 1e-6
    assert divergence(states + 1, states, weight) > 0


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("The brine valve: a bronze tap.", [Fact("The brine valve", "a bronze tap")]),
        ("- **the brine valve**: a bronze tap.", [Fact("the brine valve", "a bronze tap")]),
        ("3. the brine valve - a bronze tap", [Fact("the brine valve", "a bronze tap")]),
        ("the brine valve \u2013 a bronze tap", [Fact("the brine valve", "a bronze tap")]),
        ("# Parts", []),
        ("| a | b |", []),
        ("---", []),
        ("Too short to learn.", []),
        (
            "Empty the sand trap whenever it rattles. Then close it.",
            [Fact("Empty the sand", "trap whenever it rattles")],
        ),
        ("```\nthe code: is left out\n```", []),
    ],
)
def test_lines_of_a_manual_become_facts(line: str, facts: list[Fact]) -> None:
    assert list(facts_of_text(line)) == facts


def test_of_a_subject_the_first_statement_counts() -> None:
    facts = [Fact("The valve", "a tap"), Fact("the valve", "another"), Fact("the hose", "rubber")]
    assert distinct(facts) == [facts[0], facts[2]]


def test_one_file_is_read_by_what_it_is(tmp_path: Path) -> None:
    notes, lines = tmp_path / "notes.md", tmp_path / "facts.jsonl"
    notes.write_text("- **the valve**: a tap.\n- The valve: another.\n")
    lines.write_text('{"subject": "the valve", "statement": "a tap"}\n\n')
    assert stated_in(notes) == [Fact("the valve", "a tap"), Fact("The valve", "another")]
    assert facts_of(notes) == facts_of(lines) == [Fact("the valve", "a tap")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("the valve: a tap", "is not JSON (Expecting value: line 1 column 1 (char 0))"),
        ('{"term": "the valve", "statement": "a tap"}', "has ['statement', 'term']"),
        ('["the valve", "a tap"]', "has ['the valve', 'a tap']"),
        ('{"subject": "the valve", "statement": 7}', "has the statement 7"),
        ('{"subject": " ", "statement": "a tap"}', "has the subject ' '"),
    ],
)
def test_a_line_that_is_no_fact_is_refused(line: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"subject": "the hose", "statement": "rubber"}\n' + line)
    with pytest.raises(RequestError) as caught:
        facts_of(path)
    assert str(caught.value) == f'{path}, line 2 {found}; expected {{"subject": "...", "statement": "..."}}'


def test_a_file_without_facts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manual.pdf"
    path.write_bytes(b"%PDF")
    with pytest.raises(RequestError) as caught:
        facts_of(path)
    assert str(caught.value) == (
        f"{path} holds no facts; give a .jsonl file, or text with lines like 'Subject: statement'"
    )


@given(st.text())
def test_any_text_gives_facts_with_subject_and_statement(text: str) -> None:
    assert all(fact.subject.strip() and fact.statement.strip() for fact in facts_of_text(text))


def test_a_work_folder_without_words_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        unknown_terms(tmp_path)
    assert str(caught.value) == f"there is no {tmp_path / 'quiet_terms.txt'}; run: python -m examples.retrofit words"
