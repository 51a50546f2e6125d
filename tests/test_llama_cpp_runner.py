"""What llama.cpp is asked by its runner, shown by a fake of its module."""

import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engram_runtime.bench import llama_cpp_runner
from engram_runtime.bench.llama_cpp_runner import LlamaCppRunner
from engram_runtime.errors import RequestError, TargetError

VOCAB, BATCH = 8, 4


class FakeLlamaCpp:
    """One sequence; the logits after a token are 1 at its id, and there are rows only of those asked for."""

    def __init__(self) -> None:
        self.say: Callable[..., None] | None = None
        self.batches: list[list[tuple[int, int, int]]] = []  # token, position, whether logits are wanted
        self.removed: list[tuple[int, int, int]] = []
        self.loads, self.makes_context, self.forgets, self.code = True, True, True, 0
        self.parameters = SimpleNamespace()
        self.batch = SimpleNamespace(
            **{name: [0] * BATCH for name in ("token", "pos", "n_seq_id", "logits")}, seq_id=[[7] for _ in range(BATCH)]
        )
        self.llama_log_callback = lambda function: function
        self.llama_backend_init = self.llama_model_default_params = lambda: None
        self.llama_context_default_params = lambda: self.parameters
        self.llama_get_memory = self.llama_model_get_vocab = lambda context: context
        self.llama_n_batch = lambda context: BATCH
        self.llama_batch_init = lambda tokens, embedding, sequences: self.batch
        self.llama_n_threads = lambda context: self.parameters.n_threads
        self.llama_vocab_n_tokens = lambda vocab: VOCAB

    def llama_log_set(self, say: Callable[..., None], data: object) -> None:
        self.say = say

    def llama_model_load_from_file(self, path: bytes, parameters: object) -> object:
        assert self.say is not None
        self.say(2, b"it is no model\n", None)
        return path if self.loads else None

    def llama_init_from_model(self, model: object, parameters: object) -> object:
        return model if self.makes_context else None

    def llama_decode(self, context: object, batch: Any) -> int:
        count = batch.n_tokens
        assert (batch.n_seq_id[:count], batch.seq_id[:count]) == ([1] * count, [[0]] * count)
        self.batches.append(list(zip(batch.token[:count], batch.pos, batch.logits, strict=False)))
        return self.code

    def llama_get_logits(self, context: object) -> Any:
        rows = [np.arange(VOCAB) == token for token, _, wanted in self.batches[-1] if wanted]
        self.logits = np.concatenate(rows).astype(np.float32)
        return self.logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_memory_seq_rm(self, memory: object, sequence: int, start: int, end: int) -> bool:
        self.removed.append((sequence, start, end))
        return self.forgets


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLlamaCpp:
    found = FakeLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", found)
    return found


def load() -> LlamaCppRunner:
    return llama_cpp_runner.load(
        "llama.cpp", "model.gguf", threads=3, tables_on=True, table_io="auto", table_ram=None, positions=32
    )


def test_a_context_has_the_threads_and_positions_that_were_asked_for(fake: FakeLlamaCpp) -> None:
    assert load().threads == 3
    assert vars(fake.parameters) == {"n_ctx": 32, "n_threads": 3, "n_threads_batch": 3}


def test_a_prompt_runs_in_batches_and_gives_the_logits_after_its_last_token(fake: FakeLlamaCpp) -> None:
    runner = load()
    assert runner.prefill([5, 1, 2, 3, 4, 6]).tolist() == [0, 0, 0, 0, 0, 0, 1, 0]
    assert fake.batches == [[(5, 0, False), (1, 1, False), (2, 2, False), (3, 3, True)], [(4, 4, False), (6, 5, True)]]
    assert len(runner) == 6


def test_tokens_at_once_give_logits_after_each(fake: FakeLlamaCpp) -> None:
    runner = load()
    runner.prefill([5])
    assert runner.decode([2, 7]).argmax(axis=1).tolist() == [2, 7]
    assert fake.batches[-1] == [(2, 1, True), (7, 2, True)]


def test_tokens_that_were_forgotten_are_followed_where_they_stood(fake: FakeLlamaCpp) -> None:
    runner = load()
    runner.prefill([5, 1, 2])
    runner.trim(2)
    runner.decode([4])
    assert fake.removed == [(0, 1, -1)]
    assert fake.batches[-1] == [(4, 1, True)]


def test_a_model_that_can_not_forget_is_refused(fake: FakeLlamaCpp) -> None:
    runner = load()
    runner.prefill([5, 1, 2])
    fake.forgets = False
    with pytest.raises(RequestError) as caught:
        runner.trim(2)
    assert (str(caught.value), len(runner)) == ("llama.cpp can't forget the last 2 tokens of this model", 3)


def test_a_batch_that_fails_is_told(fake: FakeLlamaCpp) -> None:
    runner = load()
    runner.prefill([5])
    fake.code = 1
    with pytest.raises(TargetError) as caught:
        runner.decode([1, 2])
    assert (str(caught.value), len(runner)) == ("llama_decode of 2 tokens after 1 returned 1", 1)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loads", "llama.cpp can't load model.gguf: it is no model"),
        ("makes_context", "llama.cpp can't make a context of 32 tokens for model.gguf: it is no model"),
    ],
)
def test_what_llama_cpp_refuses_is_told_in_its_words(fake: FakeLlamaCpp, what: str, message: str) -> None:
    setattr(fake, what, False)
    with pytest.raises(TargetError) as caught:
        load()
    assert str(caught.value) == message


def test_kernels_can_not_be_told_apart(fake: FakeLlamaCpp) -> None:
    with pytest.raises(RequestError) as caught:
        load().profile(lambda: None, lambda: None, 1)
    assert str(caught.value) == "llama.cpp can't tell kernels apart; --profile is for the bundle"
