"""How many drafts a forward pass verifies: a fixed number, or what gives most tokens a second and never loses time."""

import itertools
import statistics
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

MOST_DRAFTS = 15  # of `Measured`: with the pending token as many rows as the costs were measured for
LOSS_SHARE = 0.02  # of the time so far that drafts may have cost more than they gave
FIRST_PASSES = 32  # the time so far counts as that of so many plain passes at least, so that short texts are drafted
CREDIT_PASSES = 8  # gains are kept for bad times up to as many plain passes
PLAIN_EVERY = 24  # passes, of which one is plain to know what that takes by now
DOUBT, DOUBT_DRAFTS = 0.5, 2.0  # share of right drafts where nothing is known, and how many drafts outweigh it
DECAY = 0.97  # of what is known, with each further draft of that position
FADE = 0.99  # of what is known, with each pass that doesn't try a position: text changes, and is tried again
RECENT, PLAIN_RECENT = 9, 3  # drafts and plain passes whose median is what one takes at the moment
LEARNING, MOST_SURPRISE = 0.25, 0.5  # how fast costs follow what passes take, and how far one can pull them


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a pass took and gave.

    Attributes:
        grade: of the drafts, see `engram_runtime.drafting.drafter.Proposal`.
        drafted: how many drafts were verified.
        put_off: tokens computed in addition, `engram_runtime.session.Session.put_off`.
        said: tokens that came of it, one more than drafts were right.
        draft_s: the drafter's seconds.
        forward_s: the model's.
    """

    grade: int
    drafted: int
    put_off: int
    said: int
    draft_s: float
    forward_s: float

    @property
    def rows(self) -> int:
        """Tokens that were computed."""
        return self.put_off + 1 + self.drafted


class Schedule(Protocol):
    """Chooses the number of drafts."""

    def count(self, grade: int, most: int, put_off: int) -> int:
        """Return how many drafts of a grade to make, 0 to ``most``, where so many tokens were put off."""
        ...

    def note(self, taken: Pass) -> None:
        """Learn from a pass."""
        ...


@dataclass(frozen=True, slots=True)
class Always:
    """As many drafts as there are, up to ``drafts``."""

    drafts: int

    def count(self, grade: int, most: int, put_off: int) -> int:
        """See `Schedule`."""
        return min(self.drafts, most)

    def note(self, taken: Pass) -> None:
        """See `Schedule`: there is nothing to learn."""


class Measured:
    """The number with the most expected tokens a second, from what passes cost and how many drafts were right lately.

    A ledger holds the seconds that passes took beyond what their tokens would have taken one by one. A number of drafts
    is considered only if the ledger stays within `LOSS_SHARE` of the time so far even where none is right. So tries
    come out of that share, and text that can't be drafted costs no more than it. The time is that of all texts which
    share a schedule.
    """

    def __init__(self, forward_s: Sequence[float], draft_s: float) -> None:
        """Begin with nothing known of drafts.

        Args:
            forward_s: seconds of passes over 1, 2, .. tokens, see `engram_runtime.drafting.costs.ForwardCosts`.
            draft_s: of one draft.
        """
        self._costs = _CurrentCosts(forward_s, draft_s)
        self._odds: defaultdict[int, _Odds] = defaultdict(_Odds)
        self._lost_s = 0.0
        self._total_s = 0.0
        self._since_plain = PLAIN_EVERY  # the first pass says how fast the machine is

    @property
    def lost_s(self) -> float:
        """Seconds that drafts have cost beyond what they gave; below 0 is a gain, as far as it is remembered."""
        return self._lost_s

    @property
    def total_s(self) -> float:
        """Seconds of all passes so far."""
        return self._total_s

    def count(self, grade: int, most: int, put_off: int) -> int:
        """See `Schedule`."""
        if self._since_plain >= PLAIN_EVERY:
            return 0
        plain_s = self._costs.forward(1 + put_off)
        allowance_s = self._allowance_s()
        best, best_rate, tokens, likely = 0, 1 / plain_s, 1.0, 1.0
        for drafts, share in enumerate(self._odds[grade].shares(min(most, MOST_DRAFTS)), start=1):
            likely *= share
            tokens += likely
            seconds = self._costs.forward(1 + drafts + put_off) + self._costs.draft_s * drafts
            if seconds - plain_s <= allowance_s and tokens / seconds > best_rate:
                best, best_rate = drafts, tokens / seconds
        return best

    def note(self, taken: Pass) -> None:
        """See `Schedule`."""
        plain_s = self._costs.forward(1)
        gained_s = (taken.said - 1) * plain_s
        self._lost_s = max(self._lost_s + self._costs.extra(taken) - gained_s, -CREDIT_PASSES * plain_s)
        self._costs.note(taken)
        self._total_s += taken.draft_s + taken.forward_s
        self._since_plain = self._since_plain + 1 if taken.drafted else 0
        if taken.drafted:
            self._odds[taken.grade].note(taken.drafted, taken.said - 1)
        else:
            for odds in self._odds.values():
                odds.fade()

    def _allowance_s(self) -> float:
        return LOSS_SHARE * max(self._total_s, FIRST_PASSES * self._costs.forward(1)) - self._lost_s


@dataclass(slots=True)
class _Odds:
    """Of each position, how many drafts were made and how many right, those long ago counting less.

    A position counts where all before it were right.
    """

    made: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def shares(self, count: int) -> Iterator[float]:
        """Yield the share of right drafts at each position: where few were made, mostly that of the one before."""
        share = DOUBT
        for made, right in itertools.islice(zip(self.made, self.right, strict=True), count):
            share = (right + share * DOUBT_DRAFTS) / (made + DOUBT_DRAFTS)
            yield share
        yield from itertools.repeat(share, count - len(self.made))

    def note(self, drafted: int, right: int) -> None:
        """Count drafts of which so many were right before one wasn't; positions that weren't tried fade."""
        reached = min(drafted, right + 1)
        missing = [0.0] * (reached - len(self.made))
        self.made, self.right = self.made + missing, self.right + missing
        for position in range(reached):
            self.made[position] = DECAY * self.made[position] + 1
            self.right[position] = DECAY * self.right[position] + (position < right)
        self.fade(drafted)

    def fade(self, first: int = 0) -> None:
        """Let what is known of positions from ``first`` on count less."""
        for position in range(first, len(self.made)):
            self.made[position] *= FADE
            self.right[position] *= FADE


class _CurrentCosts:
    """What passes cost at the machine's present pace, which is that of the last plain ones.

    Passes over several tokens are known by their ratio to a plain one. What the last ones took counts, and less with
    every plain pass since: then that which was measured counts again.
    """

    def __init__(self, forward_s: Sequence[float], draft_s: float) -> None:
        self._measured = [seconds / forward_s[0] for seconds in forward_s]
        self._ratios = list(self._measured)
        self._plain_times: deque[float] = deque(maxlen=PLAIN_RECENT)
        self._plain_s = forward_s[0]
        self._draft_times = deque([draft_s] * RECENT, maxlen=RECENT)
        self.draft_s = draft_s

    def forward(self, rows: int) -> float:
        """Return the seconds of a pass over so many tokens, in proportion beyond those measured."""
        measured = min(rows, len(self._ratios))
        return self._plain_s * self._ratios[measured - 1] * rows / measured

    def extra(self, taken: Pass) -> float:
        """Return the seconds a pass took more than a plain one, but for what it has to wait when others are at work."""
        draft_s = min(taken.draft_s, self.draft_s * max(1, taken.drafted))
        return draft_s + (self._likely(taken) - self._plain_s if taken.rows > 1 else 0.0)

    def _likely(self, taken: Pass) -> float:
        """Return what a pass took, or as much as can be believed of it."""
        expected_s = self.forward(taken.rows)
        surprise = taken.forward_s / expected_s - 1
        return expected_s * (1 + min(max(surprise, -MOST_SURPRISE), MOST_SURPRISE))

    def note(self, taken: Pass) -> None:
        """Learn from a pass."""
        if taken.rows == 1:
            self._plain_times.append(taken.forward_s)
            self._plain_s = statistics.median(self._plain_times)
            pairs = zip(self._ratios, self._measured, strict=True)
            self._ratios = [measured + FADE * (ratio - measured) for ratio, measured in pairs]
        elif taken.rows <= len(self._ratios):
            ratio = self._ratios[taken.rows - 1]
            self._ratios[taken.rows - 1] += LEARNING * (self._likely(taken) / self._plain_s - ratio)
        if taken.drafted:
            self._draft_times.append(taken.draft_s / taken.drafted)
            self.draft_s = statistics.median(self._draft_times)
