"""The texts that grow together: each turn takes all of them a token further, and one prompt a pass."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.drafting.opening import Decoding
from engram_runtime.errors import EngramError, NumericError, TableError
from engram_runtime.parallel.sessions import JointSessions
from engram_runtime.serving.alone import Alone
from engram_runtime.serving.engine_protocol import DEGRADED, OK, Health
from engram_runtime.serving.events import SiteReading
from engram_runtime.serving.figures import StepFigures
from engram_runtime.serving.readings import prompt_readings, readings
from engram_runtime.serving.slots import Slot, Slots
from engram_runtime.serving.text import Text
from engram_runtime.serving.usage import PassMeter, since
from engram_runtime.session import Session

log = logging.getLogger(__name__)

REMEMBERED = 32  # texts whose seconds tell how long the next ones may take


@dataclass(eq=False, slots=True)
class _Running:
    """A text in a slot.

    Attributes:
        begun: whether the slot holds what others had of its prompt.
        logits: ``[V]`` after the last token that the slot holds, once its prompt is computed; None where a token
            is pending.
        pending: the id of a token that was said and that the slot doesn't hold yet.
        sites: what they did in the pass that the logits are of, where that was asked for.
    """

    text: Text
    slot: Slot
    begun: bool = False
    logits: NDArray[np.float32] | None = None
    pending: int | None = None
    sites: Mapping[str, SiteReading] | None = None


class RunningTexts:
    """Texts in slots, in the order they were admitted in; to be used from one thread.

    Attributes:
        slots: those of all texts.
        took_s: of the last texts that ended.
        health: ``degraded`` from the first text on that failed by a table.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        end_ids: Collection[int],
        decoding: Decoding | None,
        watch: Callable[[StepFigures], None],
    ) -> None:
        """Run texts in sessions of one bundle and executor, which stay open when this is closed.

        Args:
            decoding: for a text that is the only one, in place of one token a pass; None for none.
        """
        self.slots = Slots(sessions)
        self.took_s: deque[float] = deque(maxlen=REMEMBERED)
        self.health = Health()
        self._joint = JointSessions(sessions)
        self._meter = PassMeter(sessions[0])
        self._context_length = sessions[0].model.context_length
        self._end_ids = end_ids
        self._decoding = decoding
        self._watch = watch
        self._running: list[_Running] = []
        self._alone: Alone | None = None

    def __len__(self) -> int:
        return len(self._running)

    @property
    def texts(self) -> list[Text]:
        """Those that run."""
        return [each.text for each in self._running]

    def admit(self, text: Text) -> None:
        """Give a text a slot; one must be free."""
        text.admit()
        self._running.append(_Running(text, self.slots.take(text.request.prompt_ids)))
        self._end_alone()

    def turn(self) -> None:
        """Take every text a token further, and the first one whose prompt isn't computed a pass of that."""
        self._end_due()
        if len(self._running) == 1 and self._goes_alone(self._running[0]):
            return
        if self._prefill():
            self._end_due()  # a slot is to be free within one pass, not two
        for each in list(self._running):
            if each.logits is not None:
                self._choose(each, each.logits)
        self._decode()

    def close(self) -> None:
        """End what works for texts; those that run are left as they are."""
        self._end_alone()
        self._joint.close()

    def _end_due(self) -> None:
        """End texts that were cancelled and those whose time is over."""
        now = time.perf_counter()
        for each in list(self._running):
            if each.text.job.cancelled:
                self._release(each)
            elif now >= each.text.deadline:
                self._finish(each, "time")

    def _goes_alone(self, each: _Running) -> bool:
        """Have the only text go on by itself where it may; returns whether it did."""
        if self._alone is None and self._decoding and each.logits is not None and not each.text.request.activity:
            self._alone = Alone(each.text, each.slot.session, each.logits, self._decoding, self._end_ids)
        if self._alone is None:
            return False
        with self._failing([each]):
            began = time.perf_counter()
            if self._alone.step():
                self._watch(StepFigures(time.perf_counter() - began, texts=1, prompt_tokens=0))
            self._say(each)
        return True

    def _end_alone(self) -> None:
        if self._alone is not None:
            alone, self._alone = self._alone, None
            alone.close()

    def _prefill(self) -> bool:
        """Compute what a pass takes of a prompt; returns whether there was one."""
        each = next((each for each in self._running if each.logits is None and each.pending is None), None)
        if each is None:
            return False
        with self._failing([each]):
            session, prompt_ids, usage = each.slot.session, each.text.request.prompt_ids, each.text.usage
            if not each.begun:
                self.slots.begin(each.slot, prompt_ids)
                each.begun = True
            part = prompt_ids[len(session) :][: session.passes(len(prompt_ids) - len(session))[0]]
            began, counters = time.perf_counter(), session.counters
            logits = session.prefill(part)
            seconds = time.perf_counter() - began
            usage.add_prompt(len(part), seconds, since(counters, session))
            self._watch(StepFigures(seconds, texts=0, prompt_tokens=len(part)))
            if len(session) == len(prompt_ids):
                self._end_prompt(each, logits)
        return True

    def _end_prompt(self, each: _Running, logits: NDArray[np.float32]) -> None:
        """Have a text go on from the logits after its prompt, and with it all that have the same one to begin with."""
        prompt_ids, session = each.text.request.prompt_ids, each.slot.session
        alike = [other for other in self._running if not other.begun and other.text.request.prompt_ids == prompt_ids]
        for other in alike:
            other.slot.session.copy(session, len(prompt_ids))
            other.begun = True
        for one in (each, *alike):
            one.logits = logits
            if one.text.request.activity:
                one.sites = prompt_readings(session)

    def _choose(self, each: _Running, logits: NDArray[np.float32]) -> None:
        with self._failing([each]):
            each.text.chooser(logits, each.slot.session.token_ids)
            self._say(each)

    def _say(self, each: _Running) -> None:
        """Tell of the token that was chosen, which may be the last one."""
        each.logits, each.pending = None, each.text.say(each.sites)
        if (reason := each.text.end(self._context_length)) is not None:
            self._finish(each, reason)

    def _decode(self) -> None:
        """Have the slots take the pending tokens; where that fails at once, each by itself shows whose fault it is."""
        going = [(each, each.pending) for each in self._running if each.pending is not None]
        if len(going) > 1 and self._joint.at_once:
            try:
                return self._take(going)
            except EngramError as error:
                log.info("a pass of %d texts failed, now they go one by one: %s", len(going), error)
        for each, token_id in going:
            with self._failing([each]):
                self._take([(each, token_id)])

    def _take(self, going: Sequence[tuple[_Running, int]]) -> None:
        """Run a pass over a token of each of some texts."""
        self._meter.begin()
        decoded = self._joint.decode([each.slot.place for each, _ in going], [token_id for _, token_id in going])
        took = self._meter.end()
        self._watch(StepFigures(took.seconds, texts=len(going), prompt_tokens=0))
        for row, (each, _) in enumerate(going):
            each.logits, each.pending = decoded.logits[row], None
            each.text.usage.add_pass(took, decoded.row_ids, row)
            if each.text.request.activity:
                each.sites = readings(decoded.activity, decoded.row_ids, row)

    @contextlib.contextmanager
    def _failing(self, of: Sequence[_Running]) -> Iterator[None]:
        """Have texts fail by what is raised on purpose."""
        try:
            yield
        except EngramError as error:
            if isinstance(error, TableError) and self.health.status == OK:
                self.health = Health(status=DEGRADED, since=time.time(), reason=str(error))
            for each in of:
                self._release(each)
                if isinstance(error, NumericError):  # or another text might go on from what this one computed
                    each.slot.session.trim(len(each.slot.session))
                each.text.fail(error)

    def _finish(self, each: _Running, reason: str) -> None:
        self._release(each)
        each.text.finish(reason)

    def _release(self, each: _Running) -> None:
        self._end_alone()
        self._running.remove(each)
        self.slots.release(each.slot)
        self.took_s.append(each.text.seconds)
