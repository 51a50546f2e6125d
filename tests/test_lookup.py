"""Look-up finds what a search through the whole text finds, and what was forgotten was never there."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_runtime.drafting.drafter import Drafter
from engram_runtime.drafting.lookup import ORDERS, LookupDrafter

NO_HIDDEN = np.empty((0, 8), dtype=np.float32)
IDS = st.lists(st.integers(0, 3), max_size=40)


def told(token_ids: Sequence[int]) -> LookupDrafter:
    drafter = LookupDrafter()
    drafter.add(token_ids, NO_HIDDEN)
    return drafter


def drafts_of(drafter: Drafter, pending: int, count: int) -> tuple[int, list[int]]:
    """Return the grade and up to ``count`` drafts."""
    proposal = drafter.propose(pending)
    groups = proposal.draw(min(count, proposal.most))
    return proposal.grade, [draft for group in groups for draft in group]


def searched(token_ids: Sequence[int], pending: int, count: int) -> tuple[int, list[int]]:
    """Search the text itself: the longest of `ORDERS`, where it stood last."""
    text = [*token_ids, pending]
    for order in ORDERS:
        for end in range(len(text) - 1, order - 1, -1):
            if len(text) >= order and text[end - order : end] == text[-order:]:
                drafts: list[int] = []
                for place in range(end, end + count):
                    drafts.append([*text, *drafts][place])
                return order, drafts
    return 0, []


@given(token_ids=IDS, pending=st.integers(0, 3), count=st.integers(1, 9))
def test_drafts_are_what_followed_the_longest_ending_that_stood_before(
    token_ids: list[int], pending: int, count: int
) -> None:
    assert drafts_of(told(token_ids), pending, count) == searched(token_ids, pending, count)


@given(token_ids=IDS, forgotten=st.integers(0, 40), others=IDS, pending=st.integers(0, 3))
def test_what_was_forgotten_was_never_there(
    token_ids: list[int], forgotten: int, others: list[int], pending: int
) -> None:
    kept = token_ids[: max(0, len(token_ids) - forgotten)]
    drafter = told(token_ids)
    drafter.forget(len(token_ids) - len(kept))
    drafter.add(others, NO_HIDDEN)
    assert list(drafter.token_ids) == [*kept, *others]
    assert drafts_of(drafter, pending, 5) == drafts_of(told([*kept, *others]), pending, 5)


def test_a_text_that_repeats_itself_is_drafted_beyond_its_end() -> None:
    assert drafts_of(told([5, 6, 7, 5, 6]), 7, 8) == (3, [5, 6, 7, 5, 6, 7, 5, 6])


def test_nothing_is_drafted_where_nothing_stood_before() -> None:
    assert drafts_of(told([1, 2, 3]), 4, 3) == (0, [])


@pytest.mark.parametrize(("after", "drafts"), [([8, -1, 9], [8]), ([-1, 8], [])])
def test_positions_that_were_given_as_embeddings_end_a_draft(after: list[int], drafts: list[int]) -> None:
    assert drafts_of(told([1, 2, 3, *after, 1, 2]), 3, 4)[1] == drafts
