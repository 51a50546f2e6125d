"""Drafted text is that of plain decoding, whoever drafts; what is rejected never happened, whenever one leaves."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.toy_model import CONTEXT, UNREADABLE, VOCAB, Scripted, ToyModel, ToySession, erratic, right, wrong

from engram_runtime.drafting.drafter import Drafter
from engram_runtime.drafting.lookup import LookupDrafter
from engram_runtime.drafting.mask import MaskOptions, decode_by_masks, decode_by_verified_masks
from engram_runtime.drafting.schedule import Always, Measured
from engram_runtime.drafting.speculate import Speculation, decode_drafted
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import RequestError, TableError
from engram_runtime.generation import Tokens, decode_tokens
from engram_runtime.sampling import Sampler, SamplingOptions, make_sampler
from engram_runtime.session import Session

PROMPT = [3, 1, 4, 1, 5]
COUNTS = (1, 2, 3, 5, 7)
SAMPLING = {
    "greedy": SamplingOptions(),
    "penalised": SamplingOptions(repetition_penalty=1.4),
    "drawn": SamplingOptions(temperature=0.4, seed=7),
    "drawn and penalised": SamplingOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=8),
}
DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "right": lambda: Scripted(right),
    "wrong": lambda: Scripted(wrong),
    "erratic": lambda: Scripted(erratic),
    "in groups": lambda: Scripted(erratic, group=3),
    "silent": lambda: Scripted(right, most=0),
    "look-up": LookupDrafter,
}
Recorded = list[NDArray[np.float32]]


def recording(sample: Sampler, rows: Recorded) -> Sampler:
    """Sample, and keep the logits."""

    def sample_and_keep(logits: NDArray[np.float32], token_ids: Sequence[int]) -> int:
        rows.append(logits.copy())
        return sample(logits, list(token_ids))

    return sample_and_keep


def speculation(drafter: Drafter, drafts: int, sample: Sampler) -> Speculation:
    return Speculation(drafter, Always(drafts), sample, DraftStatistics(drafter=drafter.name))


def drafted(
    session: ToySession, drafter: Drafter, drafts: int, sample: Sampler, *, max_tokens: int = 20, end: int | None = None
) -> Tokens:
    return decode_drafted(
        session,
        session.first_logits,
        speculation(drafter, drafts, sample),
        max_tokens=max_tokens,
        end_ids=set() if end is None else {end},
    )


def plain(session: ToySession, sample: Sampler, *, max_tokens: int = 20, end: int | None = None) -> Tokens:
    return decode_tokens(
        session, session.first_logits, sample, max_tokens=max_tokens, end_ids=set() if end is None else {end}
    )


def new_session(prompt: Sequence[int] = PROMPT) -> ToySession:
    return ToySession(ToyModel(), prompt)


def greedy_text(count: int) -> list[int]:
    return list(plain(new_session(), make_sampler(SamplingOptions()), max_tokens=count))


def assert_same_states(found: Session, expected: Session) -> None:
    """Compare what sessions hold, and what their states make of it."""
    assert list(found.token_ids) == list(expected.token_ids)
    np.testing.assert_array_equal(found.decode([7, 9]), expected.decode([7, 9]))


@pytest.mark.parametrize("drafts", COUNTS)
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_text_and_logits_are_those_of_plain_decoding(name: str, drafts: int, sampling: str) -> None:
    options = SAMPLING[sampling]
    sessions, rows = (new_session(), new_session()), (Recorded(), Recorded())
    samplers = [recording(make_sampler(options), kept) for kept in rows]
    found = list(drafted(sessions[0], DRAFTERS[name](), drafts, samplers[0]))
    assert found == list(plain(sessions[1], samplers[1]))
    np.testing.assert_array_equal(np.stack(rows[0]), np.stack(rows[1]))
    assert_same_states(*sessions)


def test_a_measured_schedule_changes_nothing() -> None:
    schedule = Measured([1.0, 1.01, 1.02, 1.03] * 6, 0.0)
    session = new_session()
    sample = make_sampler(SamplingOptions())
    statistics = DraftStatistics(drafter="scripted")
    tokens = decode_drafted(
        session,
        session.first_logits,
        Speculation(Scripted(erratic), schedule, sample, statistics),
        max_tokens=25,
        end_ids=(),
    )
    assert list(tokens) == greedy_text(25)
    assert sum(statistics.drafted) > 0


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("left_after", range(1, 12))
def test_whoever_leaves_early_leaves_session_and_generator_as_plain_decoding(name: str, left_after: int) -> None:
    sessions, samplers = (new_session(), new_session()), [make_sampler(SAMPLING["drawn"]) for _ in range(2)]
    generators = drafted(sessions[0], DRAFTERS[name](), 3, samplers[0]), plain(sessions[1], samplers[1])
    found, expected = ([*itertools.islice(tokens, left_after)] for tokens in generators)
    assert found == expected
    for tokens in generators:
        tokens.close()
    assert_same_states(*sessions)
    logits = np.zeros(VOCAB, dtype=np.float32)
    assert samplers[0](logits, []) == samplers[1](logits, [])


@pytest.mark.parametrize("drafts", COUNTS)
@pytest.mark.parametrize("place", range(1, 9))
@pytest.mark.parametrize("guess", [right, erratic])
def test_an_end_token_inside_a_draft_ends_the_text(
    drafts: int, place: int, guess: Callable[[Sequence[int]], int]
) -> None:
    end = greedy_text(9)[place]
    sessions = new_session(), new_session()
    sample = make_sampler(SamplingOptions())
    found = list(drafted(sessions[0], Scripted(guess), drafts, sample, end=end))
    assert found == list(plain(sessions[1], sample, end=end))
    assert found[-1] == end
    assert_same_states(*sessions)


@pytest.mark.parametrize("drafts", COUNTS)
def test_an_end_token_that_is_only_drafted_ends_nothing(drafts: int) -> None:
    text = greedy_text(12)
    (end, *_) = set(range(VOCAB)) - set(text)
    found = drafted(
        new_session(), Scripted(lambda _: end), drafts, make_sampler(SamplingOptions()), end=end, max_tokens=12
    )
    assert list(found) == text


@pytest.mark.parametrize("drafts", COUNTS)
@pytest.mark.parametrize("guess", [right, wrong])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 9])
def test_no_more_is_said_or_computed_than_was_asked_for(
    drafts: int, guess: Callable[[Sequence[int]], int], max_tokens: int
) -> None:
    session = new_session()
    found = list(drafted(session, Scripted(guess), drafts, make_sampler(SamplingOptions()), max_tokens=max_tokens))
    assert found == greedy_text(max_tokens)
    assert list(session.token_ids) == [*PROMPT, *found[:-1]]


@pytest.mark.parametrize("drafts", COUNTS)
@pytest.mark.parametrize("guess", [right, wrong])
@pytest.mark.parametrize("room", range(7))
def test_the_end_of_the_context_inside_a_draft_ends_the_text(
    drafts: int, guess: Callable[[Sequence[int]], int], room: int
) -> None:
    prompt = [(7 * place) % VOCAB for place in range(CONTEXT - room)]
    sessions, sample = (new_session(prompt), new_session(prompt)), make_sampler(SamplingOptions())
    found = list(drafted(sessions[0], Scripted(guess), drafts, sample))
    assert found == list(plain(sessions[1], sample))
    assert len(found) == room + 1
    assert list(sessions[0].token_ids) == list(sessions[1].token_ids)


@pytest.mark.parametrize("wrong_id", [-1, VOCAB, 1 << 40])
@pytest.mark.parametrize("group", [1, 3])
def test_drafts_that_are_no_tokens_are_refused(wrong_id: int, group: int) -> None:
    session = new_session()
    guesses = Scripted(lambda text: wrong_id if len(text) > len(PROMPT) + 1 else 2, group=group)
    tokens = drafted(session, guesses, 3, make_sampler(SamplingOptions()))
    assert next(tokens) == greedy_text(1)[0]
    with pytest.raises(RequestError) as caught:
        next(tokens)
    assert str(caught.value) == f"drafter 'scripted' proposes token id {wrong_id}, outside the vocabulary of {VOCAB}"
    assert_same_states(session, new_session())


def test_rows_of_a_draft_that_cant_be_read_change_nothing() -> None:
    model = ToyModel()
    session = ToySession(model, PROMPT)
    model.damaged = True
    assert UNREADABLE not in greedy_text(12)
    tokens = drafted(session, Scripted(lambda _: UNREADABLE), 3, make_sampler(SamplingOptions()), max_tokens=12)
    assert list(tokens) == greedy_text(12)


def test_rows_of_the_text_that_cant_be_read_are_an_error_as_ever() -> None:
    model = ToyModel()
    session = ToySession(model, PROMPT)
    model.damaged = True
    tokens = drafted(session, Scripted(right), 3, lambda logits, ids: UNREADABLE)
    assert next(tokens) == UNREADABLE
    with pytest.raises(TableError, match="rows can't be read"):
        next(tokens)
    assert_same_states(session, new_session())


@pytest.mark.parametrize("passes", [0, 1])
def test_an_interrupted_pass_never_happened(passes: int) -> None:
    model = ToyModel(largest=2)
    session = ToySession(model, PROMPT)
    tokens = drafted(session, Scripted(right), 3, make_sampler(SamplingOptions()))
    next(tokens)
    model.interrupt = passes
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    assert_same_states(session, new_session())


WAYS: dict[str, Callable[[ToySession], Tokens]] = {
    "plain": lambda session: plain(session, make_sampler(SamplingOptions())),
    "drafts": lambda session: drafted(session, Scripted(right), 7, make_sampler(SamplingOptions())),
    "masks": lambda session: masked(session, decode_by_verified_masks),
    "masks, unverified": lambda session: masked(session, decode_by_masks),
}


def masked(session: ToySession, decode: Callable[..., Tokens]) -> Tokens:
    sample, statistics = make_sampler(SamplingOptions()), DraftStatistics(drafter="masks")
    ends = {"max_tokens": 20, "end_ids": ()}
    return decode(session, session.first_logits, sample, MaskOptions(mask_id=0), statistics=statistics, **ends)


@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("said", [1, 3])
def test_a_text_whose_session_began_another_cant_go_on_and_disturbs_nothing(first: str, second: str, said: int) -> None:
    """Even where both hold the same tokens."""
    expected = list(WAYS[second](new_session()))
    for leave in (close, refused):
        session = new_session()
        outdated = WAYS[first](session)
        assert len([next(outdated) for _ in range(said)]) == said
        session.trim(len(session))
        session.first_logits = session.prefill(PROMPT)
        tokens = WAYS[second](session)
        begun = [next(tokens) for _ in range(said)]
        leave(outdated)
        assert [*begun, *tokens] == expected


def close(tokens: Tokens) -> None:
    tokens.close()


def refused(tokens: Tokens) -> None:
    with pytest.raises(RequestError) as caught:
        next(tokens)
    assert str(caught.value) == (
        "another text was begun in this session while this one was generated, which can't go on; finish or close a "
        "text before the next one"
    )


def test_a_drafter_is_told_what_the_session_holds_with_hidden_states_of_all_it_said() -> None:
    session, drafter = new_session(), Scripted(right)
    text = list(drafted(session, drafter, 3, make_sampler(SamplingOptions()), max_tokens=7))
    assert [ids for ids, _ in drafter.told] == [PROMPT, text[:4], text[4:6]]
    assert list(drafter.token_ids) == list(session.token_ids)


def test_a_drafter_that_was_told_of_another_text_forgets_it() -> None:
    session, drafter = new_session(), LookupDrafter()
    drafter.add([*PROMPT[:3], 9, 9, 9], np.empty((0, 8), np.float32))
    list(drafted(session, drafter, 3, make_sampler(SamplingOptions()), max_tokens=9))
    assert list(drafter.token_ids) == list(session.token_ids)


@pytest.mark.parametrize(("group", "lengths"), [(1, [2, 3, 4]), (3, [4]), (5, [6])])
def test_rows_are_asked_for_as_drafts_come(group: int, lengths: list[int]) -> None:
    session = new_session()
    tokens = drafted(session, Scripted(right, group=group), 3, make_sampler(SamplingOptions()), max_tokens=5)
    text = list(tokens)
    assert [len(ids) for ids in session.requests] == lengths
    assert session.requests[-1][: len(text) - 1] == text[:-1]


def test_statistics_count_positions() -> None:
    statistics = DraftStatistics(drafter="any")
    for made, said in ((3, 4), (3, 1), (2, 2), (0, 1)):
        statistics.note(made, said)
    assert (statistics.drafted, statistics.accepted) == ([3, 3, 2], [2, 1, 1])
    assert statistics.tokens_per_forward == 2
    assert statistics.figures() == {
        "draft": "any",
        "forwards": 4,
        "tokens_per_forward": 2.0,
        "drafted": 8,
        "accepted": 4,
        "acceptance": [0.667, 0.333, 0.5],
    }


def test_a_chain_of_right_drafts_says_all_of_them_in_one_pass() -> None:
    session, drafter = new_session(), Scripted(right)
    with_drafts = speculation(drafter, 7, make_sampler(SamplingOptions()))
    text = list(decode_drafted(session, session.first_logits, with_drafts, max_tokens=17, end_ids=()))
    assert text == greedy_text(17)
    assert (with_drafts.statistics.forwards, with_drafts.statistics.accepted) == (2, [2] * 7)
