"""Toy models that run several sequences at once, a tokenizer for them, and what a text of theirs is alone."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.test_manifest import sound_manifest
from tests.toy_model import CONTEXT, LOGITS, MODULUS, VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engram_runtime.bundle import Bundle
from engram_runtime.errors import EngramError
from engram_runtime.executor import BatchInputs, State, Step, StepInputs
from engram_runtime.generation import Generation, GrowingText, decode_tokens
from engram_runtime.manifest import DECODER, Manifest
from engram_runtime.serving.choosing import Chooser
from engram_runtime.serving.events import Event, Failed, Finished, Token
from engram_runtime.serving.request import TextRequest
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer

END = 7
POSITIONAL, RECURRENT = "positional", "recurrent"
SHAPES = {POSITIONAL: [1, 1, CONTEXT, 1], RECURRENT: [1, 1, 1, 1]}
Logits = NDArray[np.float32]


def toy_bundle(kind: str) -> Bundle:
    """Return the bundle of a model with one state of that kind, which has no files."""
    raw: dict[str, Any] = sound_manifest()
    raw["tables"] = []
    decoder = raw["graphs"]["decoder"]
    decoder["inputs"] = decoder["inputs"][:3]
    decoder["states"] = [{"name": "state", "dtype": "float32", "shape": SHAPES[kind], "kind": kind}]
    return Bundle(Path("toy.engram"), Manifest.from_dict(raw))


def toy_tokenizer() -> TextTokenizer:
    """Return a tokenizer whose token i is the word ``wi``."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Metaspace()
    return TextTokenizer(words, config={}, generation_config={"eos_token_id": END}, template_source=None)


class TakingTurns:
    """An executor of that model that runs one sequence at a time; logits follow from a hash of all tokens.

    Attributes:
        passes: how many tokens each pass had.
        turns: lets passes begin, one for each release; None lets all begin.
        error: raised by passes over the token `broken`.
    """

    name, threads, expert_bytes_read, experts_read, float16_states = "toy", 1, None, None, ()

    def __init__(self, *, largest: int = 4) -> None:
        self.passes: list[int] = []
        self.turns: threading.Semaphore | None = None
        self.error: BaseException | None = None
        self.broken = -1
        self._largest = largest

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [self._largest] * (count // self._largest) + [1] * (count % self._largest)

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        def step(inputs: StepInputs) -> Logits:
            tokens = enumerate(inputs.token_ids.tolist(), start=inputs.position)
            logits = self._pass([(states, token_id, position) for position, token_id in tokens])
            return logits[inputs.logit_rows]

        return FunctionStep(step)

    def _pass(self, tokens: Sequence[tuple[Mapping[str, State], int, int]]) -> Logits:
        if self.turns is not None:
            assert self.turns.acquire(timeout=10)
        self.passes.append(len(tokens))
        hashes = [_advance(states["state"], token_id, position) for states, token_id, position in tokens]
        if self.error is not None and self.broken in [token_id for _, token_id, _ in tokens]:
            raise self.error
        logits: Logits = LOGITS[hashes]
        return logits


@dataclass(frozen=True, slots=True)
class FunctionBatchStep:
    """A function as a batch step."""

    run: Any
    told: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __call__(self, inputs: BatchInputs) -> Logits:
        logits: Logits = self.run(inputs)
        return logits


class Together(TakingTurns):
    """One that runs up to three rows of several sequences at once."""

    def batches(self, count: int) -> Sequence[int]:
        return [3] * (count // 3) + [count % 3] * (count % 3 > 0)

    def spare_rows(self, count: int) -> int:
        return 0

    def bind_batch(self, states: Sequence[Mapping[str, State]]) -> FunctionBatchStep:
        def step(inputs: BatchInputs) -> Logits:
            rows = zip(inputs.sequences, inputs.token_ids.tolist(), inputs.positions.tolist(), strict=True)
            return self._pass([(states[place], token_id, position) for place, token_id, position in rows])

        return FunctionBatchStep(step)


def _advance(state: State, token_id: int, position: int) -> int:
    """Add a token to a state and return the hash of all tokens, which the state must hold."""
    if state.size == 1:
        state[...] = (31 * state + token_id + 1) % MODULUS
        return int(state.flat[0])
    state[0, 0, position, 0] = token_id + 1
    hashed = 0
    for number in state[0, 0, : position + 1, 0].tolist():
        hashed = (31 * hashed + int(number)) % MODULUS
    return hashed


@dataclass(slots=True)
class Told:
    """What an engine tells of the texts of a job, by their places."""

    tokens: dict[int, list[Token]] = field(default_factory=dict)
    ends: dict[int, Finished | Failed] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, index: int, event: Event) -> None:
        with self._changed:
            assert index not in self.ends
            self.order.append(index)
            if isinstance(event, Token):
                self.tokens.setdefault(index, []).append(event)
            else:
                self.ends[index] = event
            self._changed.notify_all()

    def wait_for_tokens(self, count: int, index: int = 0) -> None:
        """Wait until a text has so many tokens."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.tokens.get(index, [])) >= count, 10)

    def generation(self, index: int = 0) -> Generation:
        """Wait for the end of a text and return it, after checking that it is what was told token by token."""
        with self._changed:
            assert self._changed.wait_for(lambda: index in self.ends, 10)
        end = self.ends[index]
        assert isinstance(end, Finished), end
        said = self.tokens.get(index, [])
        assert tuple(token.token_id for token in said) == end.generation.token_ids
        assert "".join(token.piece for token in said) + end.piece == end.generation.text
        return end.generation

    def error(self, index: int = 0) -> EngramError:
        """Wait for a text to fail and return why."""
        with self._changed:
            assert self._changed.wait_for(lambda: index in self.ends, 10)
        end = self.ends[index]
        assert isinstance(end, Failed)
        return end.error


@dataclass(frozen=True, slots=True)
class Said:
    """What a text is, however it was generated."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


def said(generation: Generation) -> Said:
    """Return what was generated."""
    return Said(generation.text, generation.token_ids, generation.finish_reason)


def said_alone(session: Session, tokenizer: TextTokenizer, request: TextRequest) -> Said:
    """Generate a text in a session that has nothing else to do, from its beginning."""
    session.trim(len(session))
    text = GrowingText(tokenizer, request.stop, request.max_tokens)
    logits = session.prefill(request.prompt_ids)
    choose = Chooser(request, session.model.vocab_size, None)
    ends = tokenizer.eos_token_ids
    for token_id in decode_tokens(session, logits, choose, max_tokens=request.max_tokens, end_ids=ends):
        text.push(token_id)
        if text.stopped:
            break
    text.finish()
    return Said(text.text, tuple(text.token_ids), text.finish_reason or "context")
