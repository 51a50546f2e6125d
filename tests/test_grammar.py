"""Texts that follow a grammar: whatever the model wants to say, all of it is in the grammar."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import END_ID, VOCAB, save_tokenizer

from engram_runtime.errors import RequestError, TargetError
from engram_runtime.sampling import SamplingOptions
from engram_runtime.serving import grammar as grammars
from engram_runtime.serving.choosing import Chooser
from engram_runtime.serving.grammar import Grammars
from engram_runtime.serving.request import TextRequest
from engram_runtime.tokenizer import TextTokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "of": {"enum": ["sea", "land"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "of", "tags"],
    "additionalProperties": False,
}
WIDTH = VOCAB + 20  # logits of a model can be wider than its tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Grammars:
    return Grammars(folder / "tokenizer.json", {END_ID})


def of_schema(schema: Mapping[str, Any]) -> str:
    return f"start: %json {json.dumps(schema)}"


def chooser(tokens: Grammars, grammar: str, **sampling: Any) -> Chooser:
    request = TextRequest(
        prompt_ids=(5,), max_tokens=1, sampling=SamplingOptions(**sampling), grammar=grammar, top_logprobs=0
    )
    return Chooser(request, WIDTH, tokens.guide(grammar))


def generate(folder: Path, choose: Chooser, seed: int, most: int = 2000) -> str:
    """Return the text of tokens chosen by random logits until it must end."""
    rng, token_ids = np.random.default_rng(seed), [5]
    while not choose.ended and len(token_ids) < most:
        token_ids.append(choose(rng.standard_normal(WIDTH, dtype=np.float32), token_ids))
    return TextTokenizer.load(folder).decode(token_ids[1:])


def assert_person(value: Mapping[str, Any]) -> None:
    assert list(value) == ["name", "age", "of", "tags"]
    assert len(value["name"]) <= 5
    assert value["age"] in range(121)
    assert value["of"] in {"sea", "land"}
    assert all(isinstance(tag, bool) for tag in value["tags"])
    assert len(value["tags"]) <= 2


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    options=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.5, 1.0, 3.0]),
            "top_k": st.sampled_from([0, 1, 40]),
            "top_p": st.sampled_from([0.3, 1.0]),
            "min_p": st.sampled_from([0.0, 0.2]),
            "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3]),
            "seed": st.just(1),
        }
    ),
)
def test_every_text_follows_its_schema(folder: Path, tokens: Grammars, seed: int, options: dict[str, Any]) -> None:
    choose = chooser(tokens, of_schema(PERSON), **options)
    assert_person(json.loads(generate(folder, choose, seed)))


@pytest.mark.parametrize(
    ("source", "pattern"),
    [("start: /[a-c]{3}/", "[a-c]{3}"), ('start: "yes" | "no"', "yes|no"), ('start: ("ab" | "c") ~ 2', "(ab|c){2}")],
)
def test_every_text_follows_its_lark_grammar(folder: Path, tokens: Grammars, source: str, pattern: str) -> None:
    texts = {generate(folder, chooser(tokens, source, temperature=1.0, seed=i), i) for i in range(8)}
    assert all(re.fullmatch(pattern, text) for text in texts)
    assert len(texts) > 1


def test_any_json_object_may_come(tokens: Grammars, folder: Path) -> None:
    choose = chooser(tokens, of_schema({"type": "object"}))
    wanted = TextTokenizer.load(folder).encode('{"tide": [1, {"a": null}], "ß": "out"}')
    for token_id in wanted:
        assert choose(_preferring(token_id), []) == token_id
    assert choose.ended


def test_a_text_may_end_where_the_grammar_accepts_it_and_only_there(tokens: Grammars, folder: Path) -> None:
    choose = chooser(tokens, "start: /xz+/")
    x, z = TextTokenizer.load(folder).encode("xz")
    assert choose(_preferring(END_ID, x), []) == x
    assert choose(_preferring(END_ID, z), []) == z
    assert not choose.ended
    assert choose(_preferring(END_ID, z), []) == END_ID


def test_the_model_s_own_log_probabilities_are_told_whatever_the_grammar_forbids(tokens: Grammars) -> None:
    choose = chooser(tokens, 'start: "a"')
    logits = np.zeros(WIDTH, dtype=np.float32)
    choose(logits, [])
    assert choose.choices[0].logprob == pytest.approx(-np.log(WIDTH))


def _preferring(*token_ids: int) -> Any:
    """Return logits of which these are the largest, the first one most."""
    logits = np.zeros(WIDTH, dtype=np.float32)
    logits[list(token_ids)] = range(len(token_ids) + 1, 1, -1)
    return logits


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("start: tide", 'the grammar has an error: at 1(8): unknown name: "tide"'),
        ("", "the grammar has an error: Empty grammar"),
        (
            of_schema({"type": "tide"}),
            "the grammar has an error: at 1(8): failed to compile JSON schema: Invalid type: tide",
        ),
        ('{"grammars"', "the grammar has an error: EOF while parsing an object at line 1 column 11"),
        ("#" * (1 + (64 << 10)), "the grammar has 65537 characters, wanted at most 65536; simplify it"),
        (
            f"start: {'x' * 1000}",
            f"the grammar has an error: {('at 1(8): unknown name: ' + chr(34) + 'x' * 1000)[:300]}...",
        ),
    ],
)
def test_grammars_with_errors_are_refused(tokens: Grammars, grammar: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        tokens.guide(grammar)
    assert str(caught.value) == message


def test_a_grammar_of_too_many_symbols_is_refused(tokens: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_SYMBOLS", 10)
    with pytest.raises(RequestError, match=r"^the grammar has an error: "):
        tokens.guide(of_schema(PERSON))


def test_a_text_that_left_its_grammar_is_an_error(tokens: Grammars) -> None:
    with pytest.raises(RequestError, match=r"^the grammar can't be followed: "):
        tokens.guide('start: "x"').push(END_ID)


def test_a_tokenizer_that_grammars_cant_be_used_with_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(RequestError, match=r"^grammars can't be used with this bundle's tokenizer: "):
        Grammars(tmp_path / "tokenizer.json", {0}).guide('start: "a"')


def test_without_llguidance_a_grammar_says_what_to_install(tokens: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(TargetError) as caught:
        tokens.guide("start: /x/")
    assert str(caught.value) == "a grammar needs llguidance: pip install 'engram-edge[serve]'"
