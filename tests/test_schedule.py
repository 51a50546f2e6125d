"""The number of drafts is the one that pays, and drafting never costs more than its share of the time."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_runtime.drafting.schedule import FIRST_PASSES, LOSS_SHARE, MOST_DRAFTS, Always, Measured, Pass

ROWS = 24
# By rows, in units of a plain pass: compiled sizes are 1, 2, 4, 8 and 16, others are sums of these.
SIZES = {1: 1.0, 2: 1.06, 4: 1.1, 8: 1.7, 16: 2.8}
SIMULATED, TEXT = 3000, 128


def sum_of_sizes(rows: int) -> float:
    total = 0.0
    for size in sorted(SIZES, reverse=True):
        times, rows = divmod(rows, size)
        total += times * SIZES[size]
    return total


COSTS = [sum_of_sizes(rows) for rows in range(1, ROWS + 1)]
FREE = 0.0


class Simulation:
    """Passes that take exactly what costs say, on a machine that may be slower than it was measured to be."""

    def __init__(self, draft_s: float = FREE, *, pace: Callable[[int], float] = lambda rows: 1.0) -> None:
        self.schedule = Measured(COSTS, draft_s)
        self.schedule.begin()
        self.seconds = self.plain_seconds = 0.0
        self.counts: list[int] = []
        self._draft_s, self._pace = draft_s, pace

    def step(self, right: Callable[[int], int], *, most: int = 64, grade: int = 0) -> None:
        """Take a pass; ``right`` says how many of so many drafts are."""
        count = self.schedule.count(grade, most, 0)
        said = 1 + right(count)
        forward_s = COSTS[count] * self._pace(1 + count)
        self.schedule.note(
            Pass(
                grade=grade,
                asked=count,
                drafted=count,
                put_off=0,
                said=said,
                draft_s=count * self._draft_s,
                forward_s=forward_s,
            )
        )
        self.seconds += forward_s + count * self._draft_s
        self.plain_seconds += said * COSTS[0] * self._pace(1)
        self.counts.append(count)


def chance(share: float, seed: int = 0) -> Callable[[int], int]:
    """Return drafts that are right with this chance each."""
    rng = np.random.default_rng(seed)

    def right(count: int) -> int:
        wrong = np.flatnonzero(rng.random(count) >= share)
        return int(wrong[0]) if len(wrong) else count

    return right


def best_rate(share: float, draft_s: float) -> float:
    """Return the most tokens in the time of a plain one that any fixed number gives, by the geometric series."""
    return max(
        (1 - share ** (count + 1)) / (1 - share) / (COSTS[count] + count * draft_s) for count in range(MOST_DRAFTS + 1)
    )


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.75, 0.93, 0.99])
@pytest.mark.parametrize("draft_s", [FREE, 0.04, 0.3])
def test_what_is_reached_is_nearly_what_the_best_fixed_number_reaches(share: float, draft_s: float) -> None:
    simulation = Simulation(draft_s)
    right = chance(share)
    for _ in range(SIMULATED):
        simulation.step(right)
    assert simulation.plain_seconds / simulation.seconds > 0.93 * best_rate(share, draft_s)


@settings(deadline=None, max_examples=30)
@given(
    shares=st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=8),
    draft_s=st.sampled_from([FREE, 0.04, 0.5]),
    seed=st.integers(0, 9),
)
def test_no_text_takes_longer_than_plain_decoding_and_the_share(
    shares: Sequence[float], draft_s: float, seed: int
) -> None:
    simulation = Simulation(draft_s)
    for number, share in enumerate(shares):
        right = chance(share, seed + number)
        for _ in range(100):
            simulation.step(right)
            allowed = LOSS_SHARE * max(simulation.seconds, FIRST_PASSES * COSTS[0])
            assert simulation.seconds - simulation.plain_seconds <= allowed + 1e-9


def test_drafts_that_are_never_right_are_still_tried() -> None:
    simulation = Simulation(0.04)
    for _ in range(SIMULATED):
        simulation.step(lambda count: 0)
    assert 0.005 < simulation.seconds / simulation.plain_seconds - 1 < LOSS_SHARE / (1 - LOSS_SHARE)


@pytest.mark.parametrize("before", [0, 2000])
def test_text_that_can_be_drafted_is_noticed(before: int) -> None:
    simulation = Simulation(0.04)
    for _ in range(before):
        simulation.step(lambda count: 0)
    seconds = simulation.seconds
    plain_seconds = simulation.plain_seconds
    right = chance(0.8)
    for _ in range(150):
        simulation.step(right)
    assert (simulation.plain_seconds - plain_seconds) / (simulation.seconds - seconds) > 1.5


def test_gains_of_one_text_are_no_credit_for_the_next() -> None:
    simulation = Simulation()
    for _ in range(200):
        simulation.step(lambda count: count)
    assert simulation.schedule.lost_s < -100
    simulation.schedule.begin()
    assert simulation.schedule.lost_s == 0
    seconds = simulation.seconds
    for _ in range(TEXT):
        simulation.step(lambda count: 0)
    assert simulation.seconds - seconds < 1.03 * TEXT


@pytest.mark.parametrize("times", [0.5, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_costs_that_are_wrong_by_far_leave_every_text_within_three_percent(times: float, share: float) -> None:
    simulation = Simulation(0.04, pace=lambda rows: 1.0 if rows == 1 else times)
    right = chance(share)
    for _ in range(8):
        simulation.schedule.begin()
        said, seconds = simulation.plain_seconds, simulation.seconds
        while simulation.plain_seconds - said < TEXT:
            simulation.step(right)
        assert simulation.seconds - seconds < 1.03 * (simulation.plain_seconds - said)


@pytest.mark.parametrize("slower", [0.5, 2.0, 5.0])
def test_a_machine_that_has_another_pace_than_it_had_is_drafted_for_as_before(slower: float) -> None:
    simulation = Simulation(pace=lambda rows: slower)
    right = chance(0.7)
    for _ in range(400):
        simulation.step(right)
    assert simulation.plain_seconds / simulation.seconds > 1.8


def test_rows_that_cost_more_than_was_measured_are_found_out() -> None:
    simulation = Simulation(pace=lambda rows: 1.0 if rows == 1 else 1.6)
    right = chance(0.35)
    for _ in range(SIMULATED):
        simulation.step(right)
    assert simulation.seconds / simulation.plain_seconds < 1.03


def test_a_pass_that_was_interrupted_by_others_changes_little() -> None:
    simulation = Simulation()
    right = chance(0.8)
    for _ in range(300):
        simulation.step(right)
    before = simulation.schedule.lost_s
    simulation.schedule.note(Pass(grade=0, asked=3, drafted=3, put_off=0, said=4, draft_s=0.0, forward_s=50.0))
    assert simulation.schedule.lost_s <= before + 1
    simulation.step(right, most=0)
    assert simulation.schedule.count(0, 64, 0) > 0


def test_a_drafter_that_stops_where_it_is_unsure_is_asked_for_more_than_one_that_goes_on() -> None:
    """Drafts that it doesn't make cost nothing."""
    asked = []
    for drafted, said in ((1, 2), (3, 2)):
        simulation = Simulation(0.3)
        taken = Pass(grade=0, asked=3, drafted=drafted, put_off=0, said=said, draft_s=0.3 * drafted, forward_s=1.1)
        for _ in range(50):
            simulation.schedule.note(taken)
            simulation.schedule.note(replace(taken, asked=0, drafted=0, said=1, draft_s=0.0, forward_s=1.0))
        asked.append(simulation.schedule.count(0, 3, 0))
    assert asked == [3, 1]


def test_grades_are_counted_by_themselves() -> None:
    simulation = Simulation()
    for _ in range(300):
        simulation.step(lambda count: count, grade=8)
        simulation.step(lambda count: 0, grade=2)
    good, bad = simulation.counts[200::2], simulation.counts[201::2]
    assert np.mean(good) > 0.9 * MOST_DRAFTS
    assert np.mean(bad) < 0.5


def test_rows_that_were_put_off_are_part_of_the_pass() -> None:
    simulation = Simulation()
    right = chance(0.6)
    for _ in range(300):
        simulation.step(right, most=3)
    simulation.step(right, most=0)
    assert simulation.schedule.count(0, 3, 0) == 3
    assert simulation.schedule.count(0, 3, 1) == 2  # 4 rows are one pass, 5 are two
    assert simulation.schedule.count(0, 3, 5) == 3  # which are computed before, in a pass of their own


def test_tokens_that_were_computed_before_in_a_pass_of_their_own_say_nothing_of_a_pass_over_as_many() -> None:
    """Five and then three tokens take far longer than eight at once."""
    simulation = Simulation()
    right = chance(0.9)
    for _ in range(300):
        simulation.step(right, most=7)
    simulation.step(right, most=0)
    both_s = COSTS[4] + COSTS[2]
    for _ in range(9):
        taken = Pass(grade=1, asked=2, drafted=2, put_off=5, said=3, draft_s=0.0, forward_s=both_s)
        simulation.schedule.note(taken)
    assert simulation.schedule.count(0, 7, 0) == 7


@given(drafts=st.integers(0, 9), most=st.integers(0, 9))
def test_a_fixed_number_is_taken_where_there_are_as_many(drafts: int, most: int) -> None:
    assert Always(drafts).count(0, most, 0) == min(drafts, most)


@given(most=st.integers(0, 20))
def test_there_are_no_more_drafts_than_are_wanted(most: int) -> None:
    simulation = Simulation()
    for _ in range(60):
        simulation.step(lambda count: count, most=most)
    assert max(simulation.counts) <= min(most, MOST_DRAFTS)
