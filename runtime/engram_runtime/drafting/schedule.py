"""How many drafts a forward pass verifies: a fixed number, or what gives most tokens a second and never loses time."""

import itertools
import statistics
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engram_runtime.session import MOST_PUT_OFF

MOST_DRAFTS = 15  # of `Measured`: with the pending token as many rows as the costs were measured for
LOSS_SHARE = 0.015  # of a text's time so far that drafts may have cost more than they gave
FIRST_PASSES = 64  # the time so far counts as that of so many plain passes at least, so that short texts are drafted
PLAIN_EVERY = 24  # passes, of which one is plain to know what that takes by now
DOUBT, DOUBT_DRAFTS = 0.5, 2.0  # share of right drafts where nothing is known, and how many drafts outweigh it
DECAY = 0.97  # of what is known, with each further draft of that position
FADE = 0.99  # of what is known, with each pass that doesn't try a position: text changes, and is tried again
RECENT, PLAIN_RECENT = 9, 3  # drafts and plain passes whose median is what one takes at the moment
LEARNING, MOST_SURPRISE = 0.25, 0.5  # how fast costs follow what passes take, and how far one can pull them
MOST_CHARGED = 3.0  # times what a pass should take; what it took beyond that was for others at work


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What a pass took and gave.

    Attributes:
        grade: of the drafts, see `engram_runtime.drafting.drafter.Proposal`.
        asked: how many drafts the schedule wanted.
        drafted: how many there were and were verified.
        put_off: tokens computed in addition, `engram_runtime.session.Session.put_off`.
        said: tokens that came of it, one more than drafts were right.
        draft_s: the drafter's seconds.
        forward_s: the model's.
    """

    grade: int
    asked: int
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

    def begin(self) -> None:
        """Start a text."""
        ...

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

    def begin(self) -> None:
        """See `Schedule`: every text is the same."""

    def count(self, grade: int, most: int, put_off: int) -> int:
        """See `Schedule`."""
        return min(self.drafts, most)

    def note(self, taken: Pass) -> None:
        """See `Schedule`: there is nothing to learn."""


class Measured:
    """The number with the most expected tokens a second, from what passes cost and how many drafts were right lately.

    Each text has a ledger of the seconds that passes took beyond what their tokens would have taken one by one. A
    number of drafts is considered only if the ledger stays within `LOSS_SHARE` of the text's time even where none is
    right. So tries come out of that share, and text that can't be drafted costs no more than it, but for a pass that
    takes longer than costs say. What is known of drafts and of costs goes on from text to text.
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
        self._since_plain = PLAIN_EVERY

    @property
    def lost_s(self) -> float:
        """Seconds that drafts have cost this text beyond what they gave it; below 0 is a gain."""
        return self._lost_s

    def begin(self) -> None:
        """See `Schedule`; the first pass says how fast the machine is by now."""
        self._lost_s = self._total_s = 0.0
        self._since_plain = PLAIN_EVERY

    def count(self, grade: int, most: int, put_off: int) -> int:
        """See `Schedule`."""
        if self._since_plain >= PLAIN_EVERY:
            return 0
        plain_s = self._costs.forward(1 + put_off)
        allowance_s = self._allowance_s()
        best, best_rate, tokens, likely = 0, 1 / plain_s, 1.0, 1.0
        seconds = before_s = plain_s
        for drafts, (made, right) in enumerate(self._odds[grade].shares(min(most, MOST_DRAFTS)), start=1):
            likely *= right
            tokens += likely
            all_made_s = self._costs.drafted(drafts, put_off)
            seconds += made * (all_made_s - before_s)
            before_s = all_made_s
            if all_made_s - plain_s <= allowance_s and tokens / seconds > best_rate:
                best, best_rate = drafts, tokens / seconds
        return best

    def note(self, taken: Pass) -> None:
        """See `Schedule`."""
        self._lost_s += self._costs.charged(taken) - taken.said * self._costs.plain(taken)
        self._costs.note(taken)
        self._total_s += taken.draft_s + taken.forward_s
        self._since_plain = self._since_plain + 1 if taken.drafted else 0
        if taken.asked:
            self._odds[taken.grade].note(taken)
        else:
            for odds in self._odds.values():
                odds.fade()

    def _allowance_s(self) -> float:
        return LOSS_SHARE * max(self._total_s, FIRST_PASSES * self._costs.forward(1)) - self._lost_s


@dataclass(slots=True)
class _Position:
    """Of one place after the pending token, what drafts came to; those long ago count less."""

    wanted: float = 0.0
    made: float = 0.0
    reached: float = 0.0  # all before were right
    right: float = 0.0

    def note(self, *, made: bool, reached: bool, right: bool) -> None:
        self.wanted = DECAY * self.wanted + 1
        self.made = DECAY * self.made + made
        if reached:
            self.reached = DECAY * self.reached + 1
            self.right = DECAY * self.right + right

    def fade(self) -> None:
        self.wanted, self.made = FADE * self.wanted, FADE * self.made
        self.reached, self.right = FADE * self.reached, FADE * self.right


@dataclass(slots=True)
class _Odds:
    """What drafts of a grade came to, by position."""

    positions: list[_Position] = field(default_factory=list)

    def shares(self, count: int) -> Iterator[tuple[float, float]]:
        """Yield of each position how often a wanted draft is made, and how often it is right where those before are.

        Where little is known a draft is made, and right as often as the one before.
        """
        made, right = 1.0, DOUBT
        for position in self.positions[:count]:
            made = min(made, (position.made + DOUBT_DRAFTS) / (position.wanted + DOUBT_DRAFTS))
            right = (position.right + right * DOUBT_DRAFTS) / (position.reached + DOUBT_DRAFTS)
            yield made, right
        yield from itertools.repeat((made, right), count - len(self.positions))

    def note(self, taken: Pass) -> None:
        """Count the drafts of a pass; what is known of positions that weren't wanted fades."""
        right = taken.said - 1
        self.positions += [_Position() for _ in range(taken.asked - len(self.positions))]
        for number, position in enumerate(self.positions):
            if number < taken.asked:
                position.note(made=number < taken.drafted, reached=number <= right, right=number < right)
            else:
                position.fade()

    def fade(self) -> None:
        """Let all count less."""
        for position in self.positions:
            position.fade()


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

    def drafted(self, drafts: int, put_off: int) -> float:
        """Return the seconds of so many drafts and of the pass over them, see `engram_runtime.session.checkpoint`."""
        return self._verified(drafts, put_off) + self.draft_s * drafts

    def _verified(self, drafts: int, put_off: int) -> float:
        if _apart(drafts, put_off):
            return self.forward(put_off) + self.forward(1 + drafts)
        return self.forward(put_off + 1 + drafts)

    def plain(self, taken: Pass) -> float:
        """Return the seconds of a plain pass at the time of this one."""
        return taken.forward_s if taken.rows == 1 else self._plain_s

    def charged(self, taken: Pass) -> float:
        """Return the seconds of a pass and its drafts, but for what it had to wait when others were at work."""
        expected_s = self.plain(taken) if taken.rows == 1 else self._verified(taken.drafted, taken.put_off)
        draft_s = min(taken.draft_s, MOST_CHARGED * self.draft_s * max(1, taken.drafted)) if taken.asked else 0.0
        return draft_s + min(taken.forward_s, MOST_CHARGED * expected_s)

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
        elif taken.rows <= len(self._ratios) and not _apart(taken.drafted, taken.put_off):
            ratio = self._ratios[taken.rows - 1]
            self._ratios[taken.rows - 1] += LEARNING * (self._likely(taken) / self._plain_s - ratio)
        if taken.drafted:
            self._draft_times.append(taken.draft_s / taken.drafted)
            self.draft_s = statistics.median(self._draft_times)


def _apart(drafts: int, put_off: int) -> bool:
    """Return whether tokens that were put off are computed in a pass of their own before one over drafts."""
    return drafts > 0 and put_off > MOST_PUT_OFF
