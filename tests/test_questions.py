"""Questions and what may follow them: one computed prompt for all, and lines that are no questions."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import save_tokenizer
from tests.toy_model import CONTEXT, VOCAB, ToyModel, ToySession, toy_logits

from engram_runtime.errors import RequestError
from engram_runtime.evaluation.answers import Answer, figures
from engram_runtime.evaluation.continuations import Likelihood, Prompt, likelihoods
from engram_runtime.evaluation.questions import Question, read_questions
from engram_runtime.tokenizer import TextTokenizer

IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT // 2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return TextTokenizer.load(folder)


def alone(prompt: list[int], continuation: list[int]) -> tuple[float, int, bool]:
    """Run the model anew for each token; returns log-probability, tokens, and whether each is the likeliest."""
    text, logprob, greedy = list(prompt), 0.0, True
    for token_id in continuation:
        logits = toy_logits(text).astype(np.float64)
        logprob += float(logits[token_id] - np.log(np.exp(logits).sum()))
        greedy = greedy and int(logits.argmax()) == token_id
        text.append(token_id)
    return logprob, len(continuation), greedy


@given(IDS, st.lists(IDS, min_size=1, max_size=4), IDS)
def test_continuations_of_a_shared_prompt_are_as_likely_as_each_alone(
    prompt: list[int], continuations: list[list[int]], before: list[int]
) -> None:
    session = ToySession(ToyModel(), before)
    found = likelihoods(session, Prompt(token_ids=prompt, continuations=continuations))
    for each, continuation in zip(found, continuations, strict=True):
        assert (each.logprob, each.tokens, each.greedy) == pytest.approx(alone(prompt, continuation))
    assert list(session.token_ids) == prompt


def test_the_likeliest_tokens_are_said_greedily() -> None:
    prompt, said = [3, 4], [3, 4]
    for _ in range(3):
        said.append(int(toy_logits(said).argmax()))
    (found,) = likelihoods(ToySession(ToyModel(), [1]), Prompt(token_ids=prompt, continuations=[said[2:]]))
    assert found.greedy


def test_a_prompt_is_computed_once(tokenizer: TextTokenizer) -> None:
    model = ToyModel(largest=1)
    session = ToySession(model, [7])
    model.passes.clear()
    likelihoods(session, Prompt(token_ids=[1, 2, 3, 4], continuations=[[5], [6], [8, 9]]))
    assert sum(model.passes) == 4 + 1
    likelihoods(session, Prompt(token_ids=[1, 2, 3, 4, 10], continuations=[[5], [6]]))
    assert sum(model.passes) == 4 + 1 + 1


TEXTS = st.text("abc tide the,", min_size=1, max_size=12)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_a_prompt_and_its_continuations_are_read_as_one_text(
    tokenizer: TextTokenizer, prompt: str, continuations: list[str]
) -> None:
    found = Prompt.of(tokenizer, prompt, continuations)
    whole = [[*found.token_ids, *ids] for ids in found.continuations]
    assert whole == [tokenizer.encode(prompt + continuation) for continuation in continuations]
    assert min(map(len, found.continuations)) > 0
    assert list(found.token_ids) == tokenizer.encode(prompt)[: len(found.token_ids)]
    assert found.longest == max(map(len, whole))


def test_a_token_that_holds_both_ends_is_scored(tokenizer: TextTokenizer) -> None:
    found = Prompt.of(tokenizer, "The ti", ["de", "n"])
    assert tokenizer.decode(found.token_ids) == "The"
    assert [tokenizer.decode(ids) for ids in found.continuations] == [" tide", " tin"]


EMPTY = "a choice or target of it is empty, expected text to score"
LINES = {
    '{"prompt": "P", "choices": [" a", " b"], "answer": 1, "id": 7}': Question(
        line=1, prompt="P", choices=(" a", " b"), answer=1
    ),
    '{"question": "Why?", "choices": ["a", "b"], "answer": "b"}': Question(
        line=1, prompt="Question: Why?\nAnswer:", choices=("a", "b"), answer=1, space=" "
    ),
    '{"text": "T", "target": " t"}': Question(line=1, prompt="T", choices=[" t"], answer=None),
}


@pytest.mark.parametrize("line", LINES)
def test_questions_are_read(tmp_path: Path, line: str) -> None:
    (path := tmp_path / "q.jsonl").write_text(line)
    assert read_questions(path) == [LINES[line]]


def test_empty_lines_are_no_questions_and_a_limit_keeps_the_first(tmp_path: Path) -> None:
    (path := tmp_path / "q.jsonl").write_text("\n" + "\n\n".join(LINES) + "\n")
    assert [question.line for question in read_questions(path)] == [2, 4, 6]
    assert [question.line for question in read_questions(path, limit=2)] == [2, 4]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("P", "it is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[1]", "it holds a JSON list, expected an object"),
        ("{}", "it has no key 'choices'"),
        ('{"choices": ["a", "b"], "answer": 0}', "it has no key 'prompt'"),
        ('{"target": "a"}', "it has no key 'text'"),
        ('{"text": "P", "target": ""}', "a choice or target of it is empty, expected text to score"),
        (
            '{"prompt": "P", "choices": ["a", ""], "answer": 0}',
            "a choice or target of it is empty, expected text to score",
        ),
        ('{"prompt": "P", "choices": ["a"], "answer": 0}', "it has 1 choices, expected at least 2"),
        ('{"prompt": "P", "choices": "ab", "answer": 0}', "it.choices is 'ab', expected a list"),
        *(
            (
                json.dumps({"prompt": "P", "choices": ["a", "b", "b"], "answer": answer}),
                f"its answer is {answer!r}, expected one of its choices or a place from 0",
            )
            for answer in (3, -1, True, None, "c", "b")
        ),
    ],
)
def test_what_is_no_question_is_named_by_its_line(tmp_path: Path, line: str, said: str) -> None:
    (path := tmp_path / "q.jsonl").write_text("\n" + line)
    with pytest.raises(RequestError) as caught:
        read_questions(path)
    assert str(caught.value) == f"line 2 of {path} is no question: {said}"


def test_files_without_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    said = [f"{path} can't be read: No such file or directory"]
    path.write_bytes(b"")
    said += [f"{path} has no questions; it takes one JSON object a line", f"{path} is not UTF-8 at byte 1; convert it"]
    path.unlink()
    for content, message in zip((None, b"\n \n", b"a\xff"), said, strict=True):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RequestError) as caught:
            read_questions(path)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("prompt", "context_length", "said"),
    [
        ("", 9, "line 4 has no token before its choices; give it a longer prompt"),
        ("The tide", 3, "line 4 has 6 tokens, the context holds 3; shorten it"),
    ],
)
def test_questions_that_cant_be_asked_are_named(
    tokenizer: TextTokenizer, prompt: str, context_length: int, said: str
) -> None:
    with pytest.raises(RequestError) as caught:
        Question(line=4, prompt=prompt, choices=["x", "xyzw"], answer=0).encode(tokenizer, context_length)
    assert str(caught.value) == said


def answer(choices: list[tuple[str, float, int]], right: int | None, *, greedy: bool = False) -> Answer:
    """Return an answer to a question whose choices have these log-probabilities and numbers of tokens."""
    question = Question(line=1, prompt="P", choices=[choice for choice, _, _ in choices], answer=right)
    return Answer(
        question=question,
        likelihoods=[Likelihood(logprob=logprob, tokens=tokens, greedy=greedy) for _, logprob, tokens in choices],
    )


def test_a_choice_is_the_likeliest_by_sum_by_token_or_by_byte() -> None:
    found = answer([("a", -3.0, 1), ("bbbb", -4.0, 2), ("cccccccc", -5.0, 2)], 1)
    assert [found.chosen(score) for score in ("accuracy", "accuracy_per_token", "accuracy_per_byte")] == [0, 1, 2]


def test_figures_count_both_kinds_apart() -> None:
    right, wrong = answer([("a", -1.0, 1), ("b", -2.0, 1)], 0), answer([("a", -1.0, 1), ("b", -2.0, 1)] * 2, 3)
    said, unsaid = answer([("t", -1.0, 1)], None, greedy=True), answer([("t", -5.0, 2)], None)
    found = figures([right, said, wrong, unsaid])
    assert (found["choices"]["questions"], found["choices"]["accuracy"].value) == (2, 0.5)
    assert found["choices"]["chance"] == (1 / 2 + 1 / 4) / 2
    assert (found["cloze"]["questions"], found["cloze"]["exact"].value) == (2, 0.5)
    assert found["cloze"]["perplexity"].value == pytest.approx(math.exp(6 / 3))
    assert figures([said]).keys() == {"cloze"}
