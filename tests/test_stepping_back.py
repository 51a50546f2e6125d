"""What was trimmed was never there, whatever states a sequence has and whatever it has gone through."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.test_families import compiled
from tests.test_manifest import sound_manifest
from tests.tiny_families import FAMILIES
from tests.tiny_gemma import CONFIGS, WINDOW, save_gemma
from tests.workshop import Workshop, bundle_logits, open_session, random_ids

from engram_runtime.bundle import Bundle
from engram_runtime.executor import State, Step, StepInputs
from engram_runtime.manifest import DECODER, Manifest
from engram_runtime.session import MOST_PUT_OFF, Session

RECURRENT = {"name": "state.0", "dtype": "float32", "shape": [1, 2, 4, 4], "kind": "recurrent"}
FLOAT_TOLERANCE = 1e-3  # of onnxruntime's passes of other lengths
MODULUS = 8191  # its multiples by 31 are exact in float32


class RollingHash:
    """An executor of one recurrent state, a hash of all tokens in their order, which is each token's logits.

    Attributes:
        passes: how many tokens each pass had.
        interrupt: how many more passes run whole; the one after them is interrupted when it has changed the state.
    """

    name, threads, expert_bytes_read, float16_states = "rolling hash", 1, None, ()
    experts_read = None

    def __init__(self, largest: int = 4) -> None:
        self.passes: list[int] = []
        self.interrupt = -1
        self._largest = largest

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [self._largest] * (count // self._largest) + [1] * (count % self._largest)

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        (state,) = states.values()

        def step(inputs: StepInputs) -> NDArray[np.float32]:
            self.passes.append(len(inputs.token_ids))
            hashes = []
            for token_id in inputs.token_ids.tolist():
                state[...] = (31 * state + token_id + 1) % MODULUS
                hashes.append(float(state.flat[0]))
            self.interrupt -= 1
            if self.interrupt == -1:
                raise KeyboardInterrupt
            return np.array(hashes, dtype=np.float32)[inputs.logit_rows, None]

        return FunctionStep(step)


def new_session(largest: int = 4) -> tuple[Session, RollingHash]:
    raw = sound_manifest()
    raw["graphs"]["decoder"]["states"] = [RECURRENT]
    executor = RollingHash(largest)
    return Session(Bundle(Path(), Manifest.from_dict(raw)), executor, []), executor


def hashes(token_ids: Sequence[int]) -> list[float]:
    """Return the hash after each token."""
    state, found = 0, []
    for token_id in token_ids:
        state = (31 * state + token_id + 1) % MODULUS
        found.append(float(state))
    return found


TOKENS = st.lists(st.integers(0, 15), min_size=1, max_size=6)
ACTIONS: st.SearchStrategy[tuple[str, list[int]]] = st.one_of(
    TOKENS.map(lambda ids: ("decode", ids)),
    TOKENS.map(lambda ids: ("prefill", ids)),
    TOKENS.map(lambda ids: ("interrupted", ids)),
    st.just(("checkpoint", [])),
    st.integers(0, 7).map(lambda count: ("trim", [0] * count)),
)


@settings(deadline=None)
@given(actions=st.lists(ACTIONS, max_size=12))
def test_logits_are_those_of_the_tokens_that_are_left(actions: list[tuple[str, list[int]]]) -> None:
    session, executor = new_session()
    text: list[int] = []
    for action, ids in actions:
        if action != "trim" and len(ids) > session.room:
            continue
        if action == "checkpoint":
            session.checkpoint()
        elif action == "trim":
            session.trim(min(len(ids), len(text)))
            text = text[: max(0, len(text) - len(ids))]
        elif action == "interrupted":
            executor.interrupt = 0
            with pytest.raises(KeyboardInterrupt):
                session.prefill(ids)
            executor.interrupt = -1
        elif action == "decode":
            text += ids
            assert session.decode(ids)[:, 0].tolist() == hashes(text)[-len(ids) :]
        else:
            text += ids
            assert session.prefill(ids).tolist() == hashes(text)[-1:]
        assert session.token_ids == text


def test_tokens_since_the_checkpoint_are_computed_in_the_pass_of_those_that_come() -> None:
    session, executor = new_session(largest=8)
    session.prefill(list(range(8)))
    session.checkpoint()
    session.decode([1, 2, 3])
    executor.passes.clear()
    assert (session.trim(1), session.put_off) == (2, 2)
    assert executor.passes == []
    np.testing.assert_array_equal(
        session.decode([4, 5, 6, 7, 8, 9])[:, 0], hashes([*range(8), 1, 2, *range(4, 10)])[10:]
    )
    assert (executor.passes, session.put_off) == ([8], 0)


def test_without_a_checkpoint_all_is_computed_again() -> None:
    session, executor = new_session()
    session.prefill([1, 2, 3, 4])
    executor.passes.clear()
    assert (session.trim(1), session.put_off) == (3, 3)
    assert session.prefill([5]).tolist() == hashes([1, 2, 3, 5])[-1:]
    assert executor.passes == [4]


def test_a_checkpoint_of_tokens_that_were_trimmed_is_none() -> None:
    session, _ = new_session()
    session.prefill([1, 2, 3, 4])
    session.checkpoint()
    assert session.trim(1) == 3
    assert session.prefill([5, 6]).tolist() == hashes([1, 2, 3, 5, 6])[-1:]
    assert session.trim(1) == 4


def test_rejected_drafts_are_computed_again_with_later_ones_until_they_are_many() -> None:
    session, executor = new_session(largest=1)
    session.checkpoint()
    put_off = []
    for token_id in range(MOST_PUT_OFF + 2):
        session.checkpoint()
        session.decode([token_id, 15])
        session.trim(1)
        put_off.append(session.put_off)
    assert put_off == [*range(1, MOST_PUT_OFF + 2), 1]
    assert session.decode([7])[0].tolist() == hashes([*range(MOST_PUT_OFF + 2), 7])[-1:]
    assert sum(executor.passes) == sum(range(2, MOST_PUT_OFF + 3)) + (MOST_PUT_OFF + 1) + 2 + 2


# Compiled bundles


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32], executor: str) -> None:
    """Hold logits against others, bit for bit where passes of other lengths compute the same bits."""
    tolerance = 0.0 if executor == "tvm" else FLOAT_TOLERANCE
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def assert_rounds_leave_no_trace(bundle: Bundle, length: int, executor: str = "tvm") -> None:
    """Draft and reject the tokens of a text, some of each draft, and hold its logits against those of the text."""
    text, wrong = random_ids(length), random_ids(length, seed=1)
    expected = bundle_logits(bundle, text, executor)
    with open_session(bundle, executor) as session:
        start = length // 3
        session.prefill(text[:start])
        sizes = np.random.default_rng(4)
        while start < length:
            right, rejected = sizes.integers(1, 4), sizes.integers(0, 4)
            piece = text[start : start + right]
            session.checkpoint()
            found = session.decode([*piece, *wrong[:rejected]])[: len(piece)]
            session.trim(int(rejected))
            assert_same(found, expected[start : start + len(piece)], executor)
            start += len(piece)


@pytest.mark.parametrize(
    "family", ["qwen4_exp", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("qwen3_5_moe", "mixtral"))]
)
def test_rejected_drafts_leave_no_trace_in_compiled_families(workshop: Workshop, family: str) -> None:
    assert_rounds_leave_no_trace(compiled(workshop, FAMILIES[family][0], "int8"), 60)


def test_rejected_drafts_leave_no_trace_in_the_window_of_a_site(workshop: Workshop) -> None:
    assert_rounds_leave_no_trace(workshop.ready(), 60)


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        ("gemma3n", "onnxruntime"),
        pytest.param("gemma3n", "tvm", marks=pytest.mark.exhaustive),
        pytest.param("gemma4", "tvm", marks=pytest.mark.exhaustive),
    ],
)
def test_rejected_drafts_leave_no_trace_across_a_sliding_window(
    workshop: Workshop, tmp_path: Path, name: str, executor: str
) -> None:
    assert "sliding_attention" in CONFIGS[name]["layer_types"]
    bundle = workshop.bundle(save_gemma(tmp_path / name, name))
    bundle = workshop.compiled(bundle) if executor == "tvm" else bundle
    assert_rounds_leave_no_trace(bundle, 3 * WINDOW, executor)
    text = random_ids(2 * WINDOW)
    with open_session(bundle, executor) as session:
        session.prefill([*text[:WINDOW], *random_ids(3 * WINDOW, seed=1)])
        session.trim(3 * WINDOW)
        found = session.decode(text[WINDOW:])
    assert_same(found, bundle_logits(bundle, text, executor)[WINDOW:], executor)
