"""A draft head drafts what its chain says of the text so far, whatever it was told in between."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.test_draft_head import chained, hidden_states, opened_head, with_head
from tests.tiny import HIDDEN
from tests.workshop import Workshop, open_session, random_ids

from engram_runtime.bundle import Bundle
from engram_runtime.drafting import head as head_drafter
from engram_runtime.drafting.drafter import Drafter
from engram_runtime.drafting.head import HeadDrafter
from engram_runtime.drafting.opening import open_decoding
from engram_runtime.drafting.options import DraftOptions
from engram_runtime.errors import RequestError
from engram_runtime.executor import load_executor

TEXT = random_ids(60)
NO_HIDDEN = np.empty((0, HIDDEN), dtype=np.float32)


@pytest.fixture(autouse=True)
def never_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_drafter, "LEAST_LIKELY", 0.0)


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Bundle:
    return workshop.compiled(with_head(workshop, quant="int8"))


@pytest.fixture(scope="module")
def hidden(bundle: Bundle) -> NDArray[np.float32]:
    """Hidden states of `TEXT`; those of compiled bundles don't depend on how many tokens come at once."""
    return hidden_states(bundle, TEXT, "tvm")


@pytest.fixture
def drafter(bundle: Bundle) -> HeadDrafter:
    return HeadDrafter(opened_head(bundle, "tvm"))


def drafts_of(drafter: Drafter, pending: int, count: int) -> list[int]:
    proposal = drafter.propose(pending)
    groups = proposal.draw(min(count, proposal.most))
    drafts = [draft for _, group in zip(range(count), groups, strict=False) for draft in group]
    groups.close()
    return drafts


def expected(bundle: Bundle, hidden: NDArray[np.float32], length: int, pending: int, count: int) -> list[int]:
    """Draft with a new head that gets everything at once."""
    return chained(opened_head(bundle, "tvm"), [*TEXT[1:length], pending], hidden[:length], count)


Step = Callable[[HeadDrafter, NDArray[np.float32]], object]


def adds(start: int, stop: int, *others: int, states_from: int | None = None) -> Step:
    """Tell of a part of `TEXT` and ids after it, with the states there, or with more states before."""

    def step(drafter: HeadDrafter, hidden: NDArray[np.float32]) -> None:
        first = start if states_from is None else states_from
        drafter.add([*TEXT[start:stop], *others], hidden[first : stop + len(others)])

    return step


def drafts(place: int) -> Step:
    """Draft after a token of `TEXT`."""
    return lambda drafter, hidden: drafts_of(drafter, TEXT[place], 3)


def forgets(count: int) -> Step:
    return lambda drafter, hidden: drafter.forget(count)


WAYS: dict[str, list[Step]] = {
    "at once": [adds(0, 40)],
    "one by one": [adds(0, 33), *(adds(place, place + 1) for place in range(33, 40))],
    "with drafts in between": [adds(0, 5), drafts(5), adds(5, 8), drafts(8), adds(8, 28), drafts(28), adds(28, 40)],
    "with states of more than it is told": [adds(0, 3), adds(3, 40, states_from=0)],
    "after other text": [adds(0, 30, 9, 9, 9), drafts(9), forgets(33), adds(0, 40)],
    "after forgetting what waited": [adds(0, 36), drafts(36), adds(36, 38, 9, 9), forgets(2), adds(38, 40)],
}


@pytest.mark.parametrize("way", WAYS)
def test_drafts_are_those_of_the_head_that_gets_the_whole_text_at_once(
    bundle: Bundle, hidden: NDArray[np.float32], drafter: HeadDrafter, way: str
) -> None:
    for step in WAYS[way]:
        step(drafter, hidden)
    assert list(drafter.token_ids) == TEXT[:40]
    assert drafts_of(drafter, TEXT[40], 4) == expected(bundle, hidden, 40, TEXT[40], 4)


def test_nothing_is_drafted_where_the_last_state_is_not_known(
    hidden: NDArray[np.float32], drafter: HeadDrafter
) -> None:
    assert drafter.propose(3).most == 0
    drafter.add(TEXT[:5], NO_HIDDEN)
    assert drafter.propose(3).most == 0
    drafter.add(TEXT[5:7], hidden[5:7])
    assert len(drafts_of(drafter, TEXT[7], 3)) == 3
    drafter.add(TEXT[7:8], NO_HIDDEN)
    assert drafter.propose(3).most == 0


def test_the_head_sees_the_end_of_a_long_text(
    bundle: Bundle, hidden: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_drafter, "MOST_KEPT", 20)
    head = opened_head(bundle, "tvm")
    drafter = HeadDrafter(head)
    drafter.add(TEXT[:40], hidden[:40])
    assert len(head) == 19
    ends = chained(opened_head(bundle, "tvm"), [*TEXT[21:40], TEXT[40]], hidden[20:40], 4)
    assert drafts_of(drafter, TEXT[40], 4) == ends


def test_of_tokens_that_nothing_was_drafted_for_the_head_gets_the_last(
    bundle: Bundle, hidden: NDArray[np.float32]
) -> None:
    head = opened_head(bundle, "tvm")
    drafter = HeadDrafter(head)
    for place in range(40):
        adds(place, place + 1)(drafter, hidden)
    assert len(head) == 0
    ends = chained(opened_head(bundle, "tvm"), [*TEXT[33:40], TEXT[40]], hidden[32:40], 4)
    assert drafts_of(drafter, TEXT[40], 4) == ends


@pytest.mark.parametrize(("least", "made"), [(0.0, 4), (1.1, 1)])
def test_no_draft_is_made_after_one_that_is_unlikely(
    hidden: NDArray[np.float32], drafter: HeadDrafter, monkeypatch: pytest.MonkeyPatch, least: float, made: int
) -> None:
    monkeypatch.setattr(head_drafter, "LEAST_LIKELY", least)
    drafter.add(TEXT[:10], hidden[:10])
    assert len(drafts_of(drafter, TEXT[10], 4)) == made


def test_drafts_leave_no_entries(hidden: NDArray[np.float32], bundle: Bundle) -> None:
    head = opened_head(bundle, "tvm")
    drafter = HeadDrafter(head)
    drafter.add(TEXT[:10], hidden[:10])
    drafts_of(drafter, TEXT[10], 5)
    assert len(head) == 10


def test_a_bundle_without_a_head_is_told_so(workshop: Workshop) -> None:
    bundle = workshop.ready()
    with pytest.raises(RequestError) as caught:
        open_decoding(bundle, load_executor("tvm", bundle, threads=1), DraftOptions(drafter="mtp"))
    assert str(caught.value) == (
        f"bundle {bundle.path} has no draft head, which drafter 'mtp' needs; use 'lookup' or export the bundle with a "
        f"head"
    )


def test_states_of_tokens_that_were_trimmed_are_no_longer_told(bundle: Bundle) -> None:
    with open_session(bundle, "tvm") as session:
        session.decode(TEXT[:6])
        assert len(session.hidden) == 6
        session.trim(1)
        assert session.hidden.shape == (0, HIDDEN)
