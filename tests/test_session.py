"""A session's states follow its tokens, whatever interrupts a step, and fit the machine's memory."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.test_manifest import sound_manifest

from engram_runtime import executor as executors
from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.executor import State, Step, StepInputs, allocate_states
from engram_runtime.manifest import DECODER, Manifest, StateSpec
from engram_runtime.session import Session

RECURRENT = {"name": "state.0", "dtype": "float32", "shape": [1, 2, 4, 4], "kind": "recurrent"}
POSITIONAL = RECURRENT | {"shape": [1, 2, 32, 4], "kind": "positional"}


class InterruptedSum:
    """Sums all token ids into its one state, two tokens at a time; the logits are that sum.

    Attributes:
        steps: positions of the steps so far, and how many tokens each had.
        interrupt: how many more steps run whole; the one after them is interrupted when it has changed its state.
    """

    name, threads, expert_bytes_read, float16_states = "interrupted sum", 1, None, ()
    experts_read = None

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.interrupt = -1

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [2] * (count // 2) + [1] * (count % 2)

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        (state,) = states.values()

        def step(inputs: StepInputs) -> NDArray[np.float32]:
            self.steps.append((inputs.position, len(inputs.token_ids)))
            state[...] += inputs.token_ids.sum()
            self.interrupt -= 1
            if self.interrupt == -1:
                raise KeyboardInterrupt
            return np.full((len(inputs.logit_rows), 1), state.flat[0])

        return FunctionStep(step)


def interrupted(executor: InterruptedSum, state: Mapping[str, object]) -> Session:
    """Return a session of tokens 1, 2, 3 whose next token, 4, was interrupted."""
    raw = sound_manifest()
    raw["graphs"]["decoder"]["states"] = [state]
    session = Session(Bundle(Path(), Manifest.from_dict(raw)), executor, [])
    session.prefill([1, 2, 3])
    executor.interrupt = 0
    with pytest.raises(KeyboardInterrupt):
        session.prefill([4])
    executor.steps.clear()
    return session


@pytest.mark.parametrize("token_ids", [[10], [10, 20, 30]])
def test_after_an_interrupted_step_the_kept_tokens_are_computed_with_the_next_ones(token_ids: list[int]) -> None:
    executor = InterruptedSum()
    session = interrupted(executor, RECURRENT)
    assert session.prefill(token_ids) == [6 + sum(token_ids)]
    assert session.token_ids == [1, 2, 3, *token_ids]
    assert executor.steps == [(place, 2) for place in range(0, 3 + len(token_ids), 2)]


@pytest.mark.parametrize(("count", "total"), [(0, 6), (1, 3), (3, 0)])
def test_trimming_after_an_interrupted_step_leaves_the_states_of_the_kept_tokens(count: int, total: int) -> None:
    session = interrupted(InterruptedSum(), RECURRENT)
    assert session.trim(count) == 3 - count
    assert session.trim(0) == 0
    assert session.prefill([10]) == [total + 10]


def test_tokens_whose_second_computation_is_interrupted_are_kept() -> None:
    executor = InterruptedSum()
    session = interrupted(executor, RECURRENT)
    executor.interrupt = 1
    with pytest.raises(KeyboardInterrupt):
        session.prefill([10])
    assert session.token_ids == [1, 2, 3]
    assert session.prefill([10]) == [16]


def test_states_with_an_entry_per_position_are_written_over_after_an_interruption() -> None:
    executor = InterruptedSum()
    session = interrupted(executor, POSITIONAL)
    assert session.trim(1) == 0
    session.prefill([10])
    assert executor.steps == [(2, 1)]


def states(*positions: int) -> list[StateSpec]:
    """Return caches of a KiB per position."""
    return [
        StateSpec(name=f"key.{i}", dtype="float32", shape=(1, 1, count, 256), kind="positional")
        for i, count in enumerate(positions)
    ]


def test_states_that_together_are_larger_than_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "physical_memory", lambda: 3 << 30)
    with pytest.raises(RequestError) as caught:
        allocate_states(states(2 << 20, (1 << 20) + (1 << 19)))
    assert str(caught.value) == (
        "the states need 3.5 GiB, this machine has 3.0 GiB of memory; export with a smaller --context"
    )


def test_states_as_large_as_memory_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "physical_memory", lambda: 5 << 10)
    assert {name: state.shape for name, state in allocate_states(states(2, 3)).items()} == {
        "key.0": (1, 1, 2, 256),
        "key.1": (1, 1, 3, 256),
    }


def test_a_child_process_has_states_of_its_own() -> None:
    state = allocate_states(states(2, 3))["key.0"]
    if (child := os.fork()) == 0:
        state[...] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not state.any()
