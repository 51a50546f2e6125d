"""The draft head of the retrofit example on tiny random models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from engram_runtime.errors import RequestError
from examples.retrofit import acceptance
from examples.retrofit.generation import generate
from examples.retrofit.mtp_artefact import float_tensors, load_head, quantise_rows, save_head, ship_head
from examples.retrofit.mtp_commands import claim, digest_of_batches, digest_of_training
from examples.retrofit.mtp_data import Batch, Example, draft_vocabulary, pad, soft_labels
from examples.retrofit.mtp_head import MAX_STEPS, Chain, DraftHead, Frozen
from examples.retrofit.mtp_loss import draft_loss, narrowed
from examples.retrofit.mtp_training import Recipe, Training, learning_rate, train
from examples.retrofit.prompts import DOMAINS, read_prompts, training_prompts

VOCABULARY, WIDTH = 120, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def tiny_model(family: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def written(model: PreTrainedModel, count: int = 6, limit: int = 20) -> list[Example]:
    prompts = [[7 + index, 3, 40 + index, 2][: 2 + index % 3] for index in range(count)]
    found = generate(model, prompts, limit, end_id=-1)
    return [
        Example(torch.tensor(text.prompt_ids + text.generated_ids), text.hidden, len(text.prompt_ids), "chat")
        for text in found
    ]


def head_of(model: PreTrainedModel, vocabulary: torch.Tensor | None = None) -> DraftHead:
    torch.manual_seed(1)
    return DraftHead(model, torch.arange(VOCABULARY) if vocabulary is None else vocabulary)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_batch_says_what_each_prompt_gets_alone_and_what_transformers_says(family: str) -> None:
    model = tiny_model(family)
    prompts = [[5], [9, 8, 7, 6, 5], [11, 12, 13]]
    together = generate(model, prompts, 12, end_id=-1)
    for prompt, text in zip(prompts, together, strict=True):
        (alone,) = generate(model, [prompt], 12, end_id=-1)
        assert text.generated_ids == alone.generated_ids
        tokens = torch.tensor(prompt + text.generated_ids)[None]
        states = model.model(tokens).last_hidden_state[0]
        assert model.lm_head(states)[len(prompt) - 1 : -1].argmax(-1).tolist() == text.generated_ids
        torch.testing.assert_close(text.hidden, states[:-1], rtol=1e-4, atol=1e-4)


def test_an_answer_stops_at_its_end_and_the_others_go_on() -> None:
    model = tiny_model()
    prompts = [[index, index + 1] for index in range(10, 26)]
    free = generate(model, prompts, 16, end_id=-1)
    end = free[3].generated_ids[4]
    for text, whole in zip(generate(model, prompts, 16, end), free, strict=True):
        ids = whole.generated_ids
        expected = ids[: ids.index(end) + 1] if end in ids else ids
        assert text.generated_ids == expected
        assert len(text.hidden) == len(text.prompt_ids) + len(expected) - 1


def drafted_alone(head: DraftHead, model: PreTrainedModel, example: Example, root: int) -> list[int]:
    """Draft from one root as a runtime does: keys of the true states up to the root, then of the chain's own."""
    tokens = example.tokens[: root + 2].tolist()
    states = [example.hidden[None, : root + 1]]
    found = []
    for _ in range(MAX_STEPS):
        state = torch.cat(states, dim=1)
        embedding = model.model.embed_tokens(torch.tensor(tokens[1 : 1 + state.shape[1]]))[None]
        frozen = Frozen.of(model, head.draft_vocab, torch.float32)
        after = head(embedding, state, frozen.rotary(0, state.shape[1]), Chain([], []))[:, -1:]
        states.append(after)
        found.append(int(head.draft_vocab[(after[0, 0] @ frozen.rows.T).argmax()]))
        tokens.append(found[-1])
    return found


@torch.inference_mode()
def test_drafting_from_all_roots_at_once_is_drafting_from_each_alone() -> None:
    model = tiny_model()
    head = head_of(model)
    frozen = Frozen.of(model, head.draft_vocab, torch.float32)
    for example in written(model, 3):
        # the tokens become the head's own drafts, so that every draft of the chain is right
        for root in (example.start - 1, example.start + 4):
            drafts = drafted_alone(head, model, example, root)
            tokens = torch.cat((example.tokens[: root + 2], torch.tensor(drafts), torch.tensor([1])))
            hidden = torch.cat((example.hidden[: root + 1], torch.zeros(len(drafts) + 1, WIDTH)))
            longer = Example(tokens, hidden, example.start, "chat")
            assert acceptance.head_drafts(head, frozen, longer)[root - example.start + 1] == MAX_STEPS


class Oracle(DraftHead):
    """A head that knows a model's text, or says another token."""

    def __init__(self, example: Example, frozen: Frozen, shift: int) -> None:
        torch.nn.Module.__init__(self)
        self.draft_vocab = torch.arange(VOCABULARY)
        self.tokens = (torch.cat((example.tokens, torch.zeros(MAX_STEPS + 1, dtype=torch.long))) + shift) % VOCABULARY
        self.step = 0

    def forward(self, _embedding: object, hidden: torch.Tensor, _rotary: object, _chain: object) -> torch.Tensor:
        self.step += 1
        wanted = self.tokens[self.step + 1 : self.step + 1 + hidden.shape[1]]
        return torch.nn.functional.one_hot(wanted, VOCABULARY).float()[None]


@pytest.mark.parametrize(("shift", "share", "per_step"), [(0, 1.0, 2.0), (1, 0.0, 1.0)])
def test_a_head_that_is_always_right_is_accepted_always_and_one_that_is_wrong_never(
    shift: int, share: float, per_step: float
) -> None:
    model = tiny_model()
    examples = written(model, 4, limit=21)
    frozen = Frozen(model, torch.eye(VOCABULARY))
    found = acceptance.report(
        examples, lambda example: acceptance.head_drafts(Oracle(example, frozen, shift), frozen, example)
    )
    figures = found["all"]
    assert figures["every_position"]["k1"] == {"value": share, "low": share, "high": share}
    assert figures["tokens_per_step"]["k1"]["value"] == per_step
    assert figures == found["chat"]


def test_the_loop_goes_on_after_the_right_drafts_and_one_token_more() -> None:
    lengths = np.array([2, 0, 3, 1, 0, 0])
    counts = acceptance.count(lengths)
    assert counts.positions == 6
    assert counts.right.tolist() == [3, 2, 1]
    assert counts.said.tolist() == [6, 6, 6]
    assert counts.steps.tolist() == [4, 3, 3]


def test_prompt_look_up_drafts_what_followed_last_time() -> None:
    example = Example(torch.tensor([1, 2, 3, 4, 9, 1, 2, 3, 4, 9]), torch.zeros(9, WIDTH), 5, "chat")
    assert acceptance.lookup_drafts(example).tolist() == [0, 3, 2, 1]


def test_what_repeats_is_told_from_what_is_new() -> None:
    run = list(range(acceptance.LOOP_TOKENS))
    example = Example(torch.tensor([50, *run, 60, *run, 70]), torch.zeros(2 * len(run) + 2, WIDTH), 1, "chat")
    repeated = acceptance.in_loops(example)
    assert repeated.sum() == 1
    assert repeated[-2]


def test_int8_rows_are_within_half_a_scale() -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    rows, scales = quantise_rows(weight)
    assert rows.dtype == torch.int8
    assert scales.dtype == torch.float16
    errors = (rows.float() * scales.float()[:, None] - weight).abs()
    assert (errors <= 0.51 * scales.float()[:, None]).all()


def test_a_shipped_head_reads_as_its_own_rounding(tmp_path: Path) -> None:
    model = tiny_model()
    head = head_of(model, torch.arange(0, VOCABULARY, 2))
    save_head(head, tmp_path / "head.safetensors")
    ship_head(tmp_path, model, torch.arange(0, VOCABULARY, 6))
    shipped = load_file(tmp_path / "mtp.safetensors")
    assert shipped["mtp.fc.weight"].dtype == torch.int8
    assert shipped["mtp.norm.weight"].dtype == torch.float16
    assert shipped["mtp.draft_vocab"].dtype == torch.int32
    assert shipped["mtp.draft_vocab"].tolist() == list(range(0, VOCABULARY, 6))
    assert json.loads((tmp_path / "mtp-config.json").read_text())["draft_vocab_size"] == VOCABULARY // 6
    loaded = load_head(model, tmp_path / "mtp.safetensors")
    torch.testing.assert_close(loaded.fc.weight, float_tensors(shipped)["mtp.fc.weight"])
    trained = load_head(model, tmp_path / "head.safetensors")
    torch.testing.assert_close(trained.fc.weight, head.fc.weight)
    assert trained.draft_vocab.tolist() == list(range(0, VOCABULARY, 2))


def test_the_shipped_weights_do_not_depend_on_how_many_ids_are_shipped(tmp_path: Path) -> None:
    model = tiny_model()
    save_head(head_of(model), tmp_path / "head.safetensors")
    found = []
    for size in (VOCABULARY, VOCABULARY // 2):
        ship_head(tmp_path, model, torch.arange(size))
        found.append(load_file(tmp_path / "mtp.safetensors"))
    whole, few = found
    assert len(whole.pop("mtp.draft_vocab")) == 2 * len(few.pop("mtp.draft_vocab"))
    assert whole.keys() == few.keys()
    assert all(torch.equal(whole[name], few[name]) for name in whole)


def test_ids_that_the_head_was_not_trained_to_draft_are_not_shipped(tmp_path: Path) -> None:
    model = tiny_model()
    save_head(head_of(model, torch.arange(0, VOCABULARY, 2)), tmp_path / "head.safetensors")
    with pytest.raises(RequestError) as caught:
        ship_head(tmp_path, model, torch.tensor([2, 5, 7]))
    assert str(caught.value) == (
        f"{tmp_path / 'head.safetensors'} was not trained to draft token 5, one of 2; train it on this generated text"
    )
    assert not (tmp_path / "mtp.safetensors").exists()


def test_the_draft_vocabulary_is_the_most_frequent_ids_and_those_that_must_be() -> None:
    example = Example(torch.tensor([4, 4, 4, 9, 9, 30]), torch.zeros(5, WIDTH), 1, "chat")
    assert draft_vocabulary([example], [77], VOCABULARY, 3).tolist() == [4, 9, 77]
    assert draft_vocabulary([example], [77], VOCABULARY, 5).tolist() == [0, 4, 9, 30, 77]


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1), st.integers(1, VOCABULARY), st.integers(1, VOCABULARY))
def test_a_smaller_draft_vocabulary_is_part_of_a_larger_one(tokens: list[int], size: int, other: int) -> None:
    example = Example(torch.tensor(tokens), torch.zeros(len(tokens) - 1, WIDTH), 1, "chat")
    few, many = (draft_vocabulary([example], [5], VOCABULARY, count).tolist() for count in sorted((size, other)))
    assert set(few) <= set(many)


def test_the_loss_and_its_gradient_are_those_of_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    states, rows = torch.randn(7, 16, generator=generator), torch.randn(40, 16, generator=generator).bfloat16()
    labels = soft_labels(torch.randn(7, 16, generator=generator).bfloat16(), rows, 1.0)
    places, weights = labels.rows.long(), labels.weights.float()
    states.requires_grad_()
    loss, hits = draft_loss(states, rows, places, weights)
    loss.backward()  # type: ignore[no-untyped-call]
    exact = states.detach().clone().requires_grad_()
    logits = exact @ rows.float().T
    expected = -(weights * torch.log_softmax(logits, dim=-1).gather(1, places)).sum()
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(states.grad, exact.grad, rtol=5e-2, atol=5e-2)
    assert hits.tolist() == (logits.argmax(-1) == places[:, 0]).tolist()


def test_narrowing_keeps_the_rows_of_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.retrofit.mtp_loss.SAMPLED", 1)
    model = tiny_model()
    whole = Frozen.of(model, torch.arange(VOCABULARY), torch.float32)
    labelled = [(example, soft_labels(example.hidden, whole.rows, 1.0)) for example in written(model, 1, 4)]
    batch = pad(labelled, torch.ones(VOCABULARY, dtype=torch.bool))
    few, narrow = narrowed(whole, batch, torch.Generator())
    assert len(few.rows) < len(whole.rows)
    named = batch.weights > 0
    torch.testing.assert_close(few.rows[narrow.rows[named]], whole.rows[batch.rows[named]])


def test_only_drafts_of_written_tokens_in_the_vocabulary_count() -> None:
    example = Example(torch.tensor([5, 6, 7, 8, 9, 10]), torch.zeros(5, WIDTH), 2, "chat")
    rows = torch.randn(VOCABULARY, WIDTH)
    held = torch.ones(VOCABULARY, dtype=torch.bool)
    held[9] = False
    batch = pad([(example, soft_labels(example.hidden, rows, 1.0))], held)
    assert batch.counted[0, 0].tolist() == [False, True, False, True]  # tokens 7 .. 10, drafted from roots 0 .. 3
    assert batch.counted[1, 0].tolist() == [False, False, True, False]
    assert batch.counted[2, 0].tolist() == [False, True, False, False]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DEVELOPMENT", 4), ("CHECKPOINT_STEPS", 10), ("WARM_UP", 2)):
        monkeypatch.setattr(f"examples.retrofit.mtp_training.{name}", value)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("small_steps")
def test_training_lowers_the_loss_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.retrofit.mtp_loss.SAMPLED", 8)  # of 120, so that it matters which
    model = tiny_model().requires_grad_(False)
    examples, recipe = written(model, 24), Recipe(epochs=8, batch=4, learning_rate=3e-3)
    whole = train(model, head_of(model), examples, tmp_path / "whole", recipe, made_of="this")
    assert whole.log[-1]["loss"] < whole.log[0]["loss"] - 0.1

    update = Training.update

    def stopping(self: Training, frozen: Frozen, batch: Batch, total: int) -> float:
        if self.step == 25:
            raise KeyboardInterrupt
        return update(self, frozen, batch, total)

    monkeypatch.setattr(Training, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(model, head_of(model), examples, tmp_path / "halves", recipe, made_of="this")
    monkeypatch.setattr(Training, "update", update)
    resumed = train(model, head_of(model), examples, tmp_path / "halves", recipe, made_of="this")
    assert resumed.step == whole.step
    assert torch.equal(resumed.head.fc.weight, whole.head.fc.weight)


@pytest.mark.usefixtures("small_steps")
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    model, recipe = tiny_model().requires_grad_(False), Recipe(epochs=1, batch=4)
    examples = written(model, 12)
    train(model, head_of(model), examples, tmp_path, recipe, made_of="this")
    with pytest.raises(RequestError) as caught:
        train(model, head_of(model), examples, tmp_path, recipe, made_of="that")
    assert str(caught.value) == (
        f"{tmp_path / 'checkpoint.pt'} is the state of another training; remove it, or choose another --work"
    )


def test_trainings_differ_by_model_recipe_and_shards(tmp_path: Path) -> None:
    (tmp_path / "shard-0000.jsonl").write_text("one")
    first = digest_of_training("model", tmp_path, Recipe())
    assert digest_of_training("model", tmp_path, Recipe()) == first
    assert digest_of_training("other", tmp_path, Recipe()) != first
    assert digest_of_training("model", tmp_path, Recipe(seed=1)) != first
    (tmp_path / "shard-0001.jsonl").write_text("another")
    assert digest_of_training("model", tmp_path, Recipe()) != first


def test_shards_of_other_prompts_or_of_another_model_are_refused(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "generated", read_prompts()
    digest = digest_of_batches("model", [prompts[:3], prompts[3:]])
    claim(folder, digest_of_batches("model", [prompts]))  # without shards nothing is lost
    claim(folder, digest)
    (folder / "shard-0000.safetensors").touch()
    claim(folder, digest)
    for other in (digest_of_batches("other", [prompts[:3], prompts[3:]]), digest_of_batches("model", [prompts[:3]])):
        with pytest.raises(RequestError) as caught:
            claim(folder, other)
        assert str(caught.value) == (
            f"{folder} is of other prompts or of another model; remove it, or choose another --work"
        )


def test_the_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, 1000, 1e-3) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(2e-5, rel=0.05)


def test_prompts_are_many_distinct_and_none_is_tested() -> None:
    tested = read_prompts()
    nouns, sentences = [f"noun {index}" for index in range(300)], [f"Sentence {index} is here." for index in range(300)]
    prompts = training_prompts(nouns, sentences, 1000)
    assert len(prompts) == len(set(prompts)) == 1000
    assert {prompt.domain for prompt in prompts} == set(DOMAINS)
    assert all(sum(prompt.domain == domain for prompt in tested) >= 25 for domain in DOMAINS)
    assert not {prompt.text for prompt in prompts} & {prompt.text for prompt in tested}
