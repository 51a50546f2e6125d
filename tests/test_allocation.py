"""The allocation example: equal budgets, a causal model, experts that are dispatched rightly, runs that go on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from examples.allocation.__main__ import EXPERTS
from examples.allocation.experts import MATMUL_DTYPE, Experts
from examples.allocation.model import Decoder
from examples.allocation.report import count_parameters, difference, document_error, report
from examples.allocation.sizes import Division, Sizes
from examples.allocation.text import END, Corpus, tokenise, train_tokenizer
from examples.allocation.training import Outcome, Recipe, Run, cut_windows, finish_run, row_ids, validate

TINY = Sizes(vocab_size=64, hidden=32, heads=2, expert_hidden=16, most_experts=6, row_dim=4)
RECIPE = Recipe(
    steps=24, windows=4, window_tokens=16, learning_rate=2e-2, warm_up_steps=2, checkpoint_steps=4, validation_tokens=64
)
WITH_TABLE = 3
END_ID = 0


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As models of a sweep are trained."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Tokens that repeat: documents of ten, counting up from a random token."""
    rng = np.random.default_rng(0)
    documents = [np.append((np.arange(9) + start) % 63 + 1, END_ID) for start in rng.integers(0, 63, 120)]
    tokens = np.append(END_ID, np.concatenate(documents)).astype(np.int32)
    return Corpus(tokens[:1001], tokens[1000:], np.arange(64), END_ID, 1.0)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(hidden=96, expert_hidden=128, most_experts=17, active_experts=1)])
def test_all_divisions_have_the_same_parameters_in_all_and_per_token(sizes: Sizes) -> None:
    divisions = [Division(sizes, experts) for experts in range(sizes.active_experts, sizes.most_experts + 1)]
    total, active = np.array([count_parameters(division) for division in divisions[:: max(1, len(divisions) // 8)]]).T
    assert np.ptp(total) / total.min() < 0.01
    assert np.ptp(active) / active.min() < 0.01


def test_shares_run_from_nothing_to_all_of_the_sparse_budget() -> None:
    assert [Division(Sizes(), experts).share for experts in EXPERTS] == [0, 0.125, 0.25, 0.5, 0.75, 0.875, 1]


def test_a_division_without_enough_experts_for_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a block has 1 experts, expected 2 to 6$"):
        Division(TINY, 1)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(1, 2), st.integers(0, 2**32))
def test_batched_dispatch_equals_a_loop_over_experts(tokens: int, experts: int, active: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, hidden = Experts(8, 4, experts, active), torch.randn(tokens, 8)
    expected = torch.zeros_like(hidden)
    best, chosen = layer.router(hidden).topk(active)
    for token in range(tokens):
        for weight, expert in zip(best[token].softmax(-1), chosen[token], strict=True):
            gate, up = (hidden[token].to(MATMUL_DTYPE) @ layer.gate_up[expert].to(MATMUL_DTYPE)).chunk(2)
            expected[token] += weight * ((functional.silu(gate) * up) @ layer.down[expert].to(MATMUL_DTYPE))
    torch.testing.assert_close(layer(hidden)[0], expected, rtol=2e-2, atol=2e-2)  # sums in bfloat16


def test_balance_is_one_where_all_experts_get_equal_parts() -> None:
    layer = Experts(4, 4, 4, 1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4) * 1e-3)
    torch.testing.assert_close(layer(torch.eye(4))[1], torch.tensor(1.0))


@pytest.mark.parametrize("experts", [TINY.most_experts, WITH_TABLE])
def test_a_token_does_not_see_those_after_it(experts: int, corpus: Corpus) -> None:
    torch.manual_seed(0)
    division = Division(TINY, experts)
    keyer = division.keyer(corpus.token_map, corpus.end_id) if division.has_table else None
    model = Decoder(division)
    token_ids = np.random.default_rng(0).integers(0, 64, (1, 16))
    changed = np.concatenate([token_ids[:, :9], (token_ids[:, 9:] + 1) % 64], axis=1)
    before, after = (model(torch.from_numpy(ids), row_ids(keyer, ids))[0] for ids in (token_ids, changed))
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_ngrams_do_not_reach_over_the_end_of_a_document(corpus: Corpus) -> None:
    keyer = Division(TINY, WITH_TABLE).keyer(corpus.token_map, corpus.end_id)
    rows = keyer.row_ids((), np.array([5, END_ID, 7, 9, END_ID, 7]))
    np.testing.assert_array_equal(rows[2], rows[5])


class Interrupted(RuntimeError):
    """Raised in place of whatever ends a process."""


def interrupt_after(steps: int) -> Callable[[int], None]:
    """Return what raises when so many steps have been done."""
    done = 0

    def on_steps(number: int) -> None:
        nonlocal done
        done += number
        if done >= steps:
            raise Interrupted

    return on_steps


@pytest.mark.parametrize("experts", [TINY.most_experts, WITH_TABLE])
def test_a_run_learns_and_goes_on_where_it_was_stopped(experts: int, corpus: Corpus, tmp_path: Path) -> None:
    run = Run(TINY, RECIPE, experts, seed=1)
    whole = finish_run(run, corpus, tmp_path / "whole", lambda _: None)
    with pytest.raises(Interrupted):
        finish_run(run, corpus, tmp_path / "stopped", interrupt_after(6))
    told: list[int] = []
    resumed = finish_run(run, corpus, tmp_path / "stopped", told.append)
    assert told == [4, *[1] * 20]
    np.testing.assert_array_equal(resumed.training_losses, whole.training_losses)
    np.testing.assert_array_equal(resumed.document_losses, whole.document_losses)
    assert whole.training_losses[-1] < whole.training_losses[0] - 0.3


def test_a_finished_run_is_not_trained_again(corpus: Corpus, tmp_path: Path) -> None:
    run = Run(TINY, replace(RECIPE, steps=4), WITH_TABLE, seed=0)
    first = finish_run(run, corpus, tmp_path, lambda _: None)
    told: list[int] = []
    again = finish_run(run, corpus, tmp_path, told.append)
    assert told == [4]
    assert (again.cpu_s, again.validation_loss) == (first.cpu_s, first.validation_loss)


def test_runs_of_another_recipe_have_another_place() -> None:
    places = {Run(TINY, replace(RECIPE, steps=steps), 2, 0).place(Path()) for steps in (1, 2)}
    assert len(places) == 2


def test_validation_counts_each_predicted_token_in_its_document(corpus: Corpus) -> None:
    division = Division(TINY, TINY.most_experts)
    model = Decoder(division)
    losses, tokens = validate(model, None, corpus, RECIPE)
    assert tokens.tolist() == [10] * 6 + [4]
    windows = torch.from_numpy(cut_windows(corpus.validation[:65], 16)).long()
    logits = model(windows[:, :-1], None)[0] @ model.embedding.weight.T
    expected = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    np.testing.assert_allclose(losses[0], expected[:10].sum().item(), rtol=1e-5)
    np.testing.assert_allclose(losses.sum(), expected.sum().item(), rtol=1e-5)


def test_documents_are_tokenised_in_one_line() -> None:
    documents = ["a word: a gloss", "another word: another gloss"] * 20
    tokenizer = train_tokenizer(documents, 280)
    end_id = tokenizer.token_to_id(END)
    tokens = tokenise(tokenizer, documents[:2])
    ends = np.flatnonzero(tokens == end_id)
    assert [ends[0], ends[-1], len(ends)] == [0, len(tokens) - 1, 3]
    assert tokenizer.decode(tokens[1 : ends[1]].tolist()) == documents[0]


def outcome(*document_losses: float) -> Outcome:
    """Return an outcome of documents with ten tokens each."""
    return Outcome(
        np.array(document_losses), np.full(len(document_losses), 10), np.linspace(9, 5, 20), np.ones(20), 1.0
    )


def test_differences_are_per_token_with_the_errors_of_documents_and_of_seeds() -> None:
    outcomes = {6: [outcome(50, 60), outcome(52, 62)], 2: [outcome(48, 58), outcome(50, 60)]}
    against = difference(outcomes, 2, 6)
    np.testing.assert_allclose([against.mean, against.document_error], [-0.2, 0], atol=1e-12)  # in both documents
    np.testing.assert_allclose(against.seed_error, np.sqrt(0.02))  # each deviates by sqrt(0.02), of two seeds each
    assert against.seed_degrees == 2
    np.testing.assert_allclose(against.interval, (-0.2 - 4.302653 * 0.02**0.5, -0.2 + 4.302653 * 0.02**0.5), rtol=1e-6)


def test_of_one_seed_the_interval_is_that_of_documents() -> None:
    against = difference({6: [outcome(50, 60)], 2: [outcome(47, 59)]}, 2, 6)
    assert against.interval == pytest.approx(
        (-0.2 - 1.959964 * against.document_error, -0.2 + 1.959964 * against.document_error)
    )


def test_the_error_of_documents_is_that_of_their_mean() -> None:
    losses = np.random.default_rng(0).normal(50, 5, 400)
    np.testing.assert_allclose(document_error(losses, np.full(400, 10)), 0.5 / np.sqrt(400), rtol=0.1)


@pytest.mark.parametrize(("between", "is_u"), [(40.0, True), (49.9, True), (55.0, False)])
def test_a_u_is_a_middle_below_both_ends(between: float, is_u: bool) -> None:
    runs = [Run(TINY, RECIPE, experts, 0) for experts in (6, 4, 2)]
    results = report(runs, [outcome(50, 50), outcome(between, between), outcome(51, 51)], 3.0)
    assert results["best"]["is_u"] is is_u
    assert json.loads(json.dumps(results))["divisions"][1]["against_no_table"]["seed_error"] is None
