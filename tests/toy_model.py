"""A model of a few lines whose every logit depends on all tokens before, and drafters of all kinds of conduct."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.test_manifest import sound_manifest

from engram_runtime.bundle import Bundle
from engram_runtime.drafting.drafter import Draft, Groups, Proposal
from engram_runtime.errors import TableError
from engram_runtime.executor import State, Step, StepInputs
from engram_runtime.manifest import DECODER, HIDDEN, Manifest
from engram_runtime.session import Session

VOCAB, CONTEXT, WIDTH = 50, 32, 8
MODULUS = 8191  # its multiples by 31 are exact in float32
LOGITS = 2 * np.random.default_rng(11).standard_normal((MODULUS, VOCAB), dtype=np.float32)
UNREADABLE = 49  # a token whose rows can't be read, if so told


class ToyModel:
    """An executor of one recurrent state, a hash of all tokens in their order; logits and hidden state follow from it.

    Attributes:
        passes: how many tokens each pass had.
        interrupt: how many more passes run whole; the one after them is interrupted when it has changed the state.
        damaged: whether passes over `UNREADABLE` fail.
    """

    name, threads, expert_bytes_read, float16_states = "toy", 1, None, ()
    experts_read: int | None = None

    def __init__(self, largest: int = 4) -> None:
        self.passes: list[int] = []
        self.interrupt = -1
        self.damaged = False
        self._largest = largest

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [self._largest] * (count // self._largest) + [1] * (count % self._largest)

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        (state,) = states.values()
        told: dict[str, NDArray[np.float32]] = {}

        def step(inputs: StepInputs) -> NDArray[np.float32]:
            self.passes.append(len(inputs.token_ids))
            hashes = []
            for token_id in inputs.token_ids.tolist():
                state[...] = (31 * state + token_id + 1) % MODULUS
                hashes.append(int(state.flat[0]))
            self.interrupt -= 1
            if self.interrupt == -1:
                raise KeyboardInterrupt
            if self.damaged and UNREADABLE in inputs.token_ids:
                raise TableError("rows can't be read")
            told[HIDDEN] = np.repeat(np.array(hashes, dtype=np.float32)[:, None], WIDTH, axis=1)
            logits: NDArray[np.float32] = LOGITS[np.array(hashes)[inputs.logit_rows]]
            return logits

        return FunctionStep(step, told)


def toy_bundle() -> Bundle:
    """Return the toy model's bundle, which has no files."""
    raw: dict[str, Any] = sound_manifest()
    raw["tables"] = []
    decoder = raw["graphs"]["decoder"]
    decoder["inputs"] = decoder["inputs"][:3]
    decoder["states"] = [{"name": "state", "dtype": "float32", "shape": [1, 1, 1, 1], "kind": "recurrent"}]
    return Bundle(Path(), Manifest.from_dict(raw))


class ToySession(Session):
    """A session of the toy model.

    Attributes:
        requests: what `request` was asked for.
    """

    def __init__(self, model: ToyModel, token_ids: Sequence[int]) -> None:
        super().__init__(toy_bundle(), model, [])
        self.requests: list[list[int]] = []
        self.first_logits = self.prefill(token_ids)

    def request(self, token_ids: Sequence[int]) -> None:
        super().request(token_ids)
        self.requests.append(list(token_ids))


class Scripted:
    """Drafts what a function says of the text so far, the pending token included, one by one or all at once.

    Attributes:
        told: how often it was told of tokens, each time with as many hidden states as it was given.
    """

    name = "scripted"

    def __init__(self, guess: Callable[[Sequence[int]], int], *, most: int = 64, group: int = 1) -> None:
        self._guess = guess
        self._most = most
        self._group = group
        self._token_ids: list[int] = []
        self.told: list[tuple[list[int], int]] = []

    @property
    def token_ids(self) -> Sequence[int]:
        return self._token_ids

    def add(self, token_ids: Sequence[int], hidden: NDArray[np.float32]) -> None:
        self._token_ids += token_ids
        self.told.append((list(token_ids), len(hidden)))

    def forget(self, count: int) -> None:
        del self._token_ids[len(self._token_ids) - count :]

    def propose(self, token_id: int) -> Proposal:
        def draw(count: int) -> Groups:
            text = [*self._token_ids, token_id]
            while True:
                group = []
                for _ in range(self._group):
                    text.append(self._guess(text))
                    group.append(Draft(text[-1]))
                yield group

        return Proposal(most=self._most, grade=0, draw=draw)


def toy_logits(text: Sequence[int]) -> NDArray[np.float32]:
    """Return the model's logits ``[V]`` after a text."""
    state = 0
    for token_id in text:
        state = (31 * state + token_id + 1) % MODULUS
    logits: NDArray[np.float32] = LOGITS[state]
    return logits


def right(text: Sequence[int]) -> int:
    """Guess the likeliest token."""
    return int(toy_logits(text).argmax())


def wrong(text: Sequence[int]) -> int:
    """Guess another one."""
    return (right(text) + 1) % VOCAB


def erratic(text: Sequence[int]) -> int:
    """Guess right two times of three, and else anything."""
    chance = np.random.default_rng(len(text))
    return right(text) if chance.random() < 2 / 3 else int(chance.integers(VOCAB))
