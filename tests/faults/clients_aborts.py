"""Row D5: clients that leave at any time, beside others that check their texts."""

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from tests.faults.clients_expected import Known, known_texts
from tests.faults.clients_http import CHAT, Client, connected, deltas
from tests.faults.requests_toy import ToyEngine
from tests.faults.row import Outcome, Row
from tests.served import served

from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.engine_protocol import Engine, Tell, Ticket
from engram_runtime.serving.events import Event, Token
from engram_runtime.serving.request import TextRequest

ENGINE = ToyEngine(queue=64, pass_s=0.001, drafts=3)
LEAVING, CHECKING = 10, 2  # clients at once
FREED_S, STUCK_S = 0.1, 1.0  # beside the pass that runs: for 99 of 100, and for any
LONGEST_S = 0.03  # that a client waits before it leaves
KINDS = ("in the body", "at once", "after a time", "after the head", "in the text")


class Watched:
    """An engine that notes what each text was at when its client left.

    Attributes:
        inner: that generates, be it in a worker.
        left_in: how many texts were left in which phase.
        open: jobs that were submitted and that nobody has left.
    """

    def __init__(self, engine: Engine, inner: BundleEngine) -> None:
        self.inner = inner
        self.left_in: Counter[str] = Counter()
        self.open: set[Ticket] = set()
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for a text, and none is waiting or running."""
        return not (self.open or self.inner.load.running or self.inner.load.waiting)

    def submit(self, requests: Sequence[TextRequest], tell: Tell, *, client: str = "") -> Ticket:
        """See `Engine.submit`."""
        events: list[Event] = []

        def watch(index: int, event: Event) -> None:
            events.append(event)
            tell(index, event)

        ticket = _WatchedTicket(self, requests[0], self._engine.submit(requests, watch, client=client), events)
        self.open.add(ticket)
        return ticket


class _WatchedTicket:
    def __init__(self, watched: Watched, request: TextRequest, ticket: Ticket, events: list[Event]) -> None:
        self._watched, self._request, self._ticket, self._events = watched, request, ticket, events

    def cancel(self) -> None:
        events = list(self._events)
        if not events or isinstance(events[-1], Token):
            self._watched.left_in[self._phase(events)] += 1
        self._ticket.cancel()
        self._watched.open.discard(self)

    def _phase(self, events: Sequence[Event]) -> str:
        inner = self._watched.inner
        if any(text.request == self._request for text in list(inner._queue)):
            return "queued"
        if not events:
            return "prefill"
        return "decode" if inner._running._alone is None else "speculative step"


def aborts(count: int) -> Outcome:
    """Leave so many times: four fifths in a crowd, the rest one by one, when texts are drafted."""
    with TemporaryDirectory() as folder, ENGINE.open(Path(folder)) as engine:
        return _aborts(Watched(engine, engine), count, FREED_S)


def aborts_in_worker(count: int) -> Outcome:
    """The same with an engine behind the connection to a worker."""
    with TemporaryDirectory() as folder, ENGINE.open_in_worker(Path(folder)) as (remote, engine):
        outcome = _aborts(Watched(remote, engine), count, FREED_S)
        jobs = len(remote._link._jobs) if remote._link is not None else 0
    if not jobs:
        return outcome
    return replace(outcome, survived=0, failures=(f"the server holds {jobs} jobs at the end", *outcome.failures))


def _aborts(watched: Watched, count: int, freed_s: float) -> Outcome:
    known = known_texts(200, Random("D5"), engine=ENGINE)
    with served(watched) as url:
        asyncio.run(_check_once(url, known[0]))  # what is opened once and stays
        before = _descriptors()
        failures, checked, freed = asyncio.run(_run(url, watched, known, count))
    slow = sorted(seconds for seconds in freed if seconds > freed_s + ENGINE.pass_s)
    excused = min(len(freed) // 100, sum(seconds < STUCK_S for seconds in slow))
    failures += [f"freed after {seconds:.3f} s" for seconds in slow[excused:]]
    time.sleep(1)  # a worker tells of its load now and then
    failures += [f"{watched.load} at the end"] * bool(not watched.idle or watched.load.running or watched.load.waiting)
    failures += ["slots are busy at the end"] * (len(watched.inner._running.slots.free) != ENGINE.slots)
    failures += [f"{_descriptors() - before} descriptors more"] * (_descriptors() > before)
    phases = ", ".join(f"{times:,} {phase}" for phase, times in sorted(watched.left_in.items()))
    took = f"freed in {statistics.median(freed) * 1e3:.1f} ms, at most {max(freed) * 1e3:.0f}"
    figure = f"left: {phases}; {checked:,} texts beside them equal; {took}"
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:10]))


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def _run(url: str, watched: Watched, known: Sequence[Known], count: int) -> tuple[list[str], int, list[float]]:
    failures: list[str] = []
    crowd = count * 4 // 5
    numbers = iter(range(crowd))
    done = asyncio.Event()
    checkers = [asyncio.create_task(_keep_checking(url, known, failures, done)) for _ in range(CHECKING)]
    await asyncio.gather(*(_keep_leaving(url, known, numbers, failures) for _ in range(LEAVING)))
    done.set()
    checked = sum(await asyncio.gather(*checkers))
    await _until_idle(watched)
    streams = [each for each in known if each.stream and len(each.text) > 8]
    freed = [await _leave_alone(url, watched, streams, number, failures) for number in range(crowd, count)]
    return failures, checked, freed


async def _keep_leaving(url: str, known: Sequence[Known], numbers: Iterator[int], failures: list[str]) -> None:
    for number in numbers:
        fault = await _leave(url, known, Random(f"D5 {number}"))
        if fault is not None:
            failures.append(f"client {number}: {fault}")


async def _leave(url: str, known: Sequence[Known], random: Random) -> str | None:
    """Ask for a text and leave before its end; returns what was wrong with what came until then."""
    wanted = random.choice(known)
    kind = random.choice(KINDS)
    async with connected(url) as client:
        if kind == "in the body":
            cut = random.randrange(len(wanted.body))
            client.writer.write(client.head("POST", CHAT, len(wanted.body)) + wanted.body[:cut])
            await asyncio.sleep(random.choice((0, random.random() * LONGEST_S)))
            return None
        await client.send("POST", CHAT, wanted.body)
        if kind == "after a time":
            await asyncio.sleep(random.random() * LONGEST_S)
        if kind in ("after the head", "in the text"):
            return await _read_some(client, wanted, random.randrange(12) if kind == "in the text" else 0)
    return None


async def _read_some(client: Client, wanted: Known, count: int) -> str | None:
    """Read the head and so many pieces of an answer; returns what was wrong with them."""
    reply = await client.reply()
    if reply.status != 200:
        return f"status {reply.status}"
    if "content-length" in reply.headers:
        return None
    text = ""
    pieces = client.pieces(reply)
    for _ in range(count):
        piece = await anext(pieces, b"")
        text += "".join(deltas(event) for event in piece.split(b"\n\n"))
    return None if wanted.text.startswith(text) else f"{text!r} isn't the beginning of {wanted.text!r}"


async def _keep_checking(url: str, known: Sequence[Known], failures: list[str], done: asyncio.Event) -> int:
    """Ask for one text after the other until the crowd has left; returns how many there were."""
    checked = 0
    while not done.is_set():
        wanted = known[checked % len(known)]
        if (text := await _check_once(url, wanted)) != wanted.text:
            failures.append(f"a text beside is {text!r}, wanted {wanted.text!r}")
        checked += 1
    return checked


async def _check_once(url: str, wanted: Known) -> str:
    async with connected(url) as client:
        reply, body = await client.ask("POST", CHAT, wanted.body)
    if "content-length" not in reply.headers:
        return "".join(deltas(event) for event in body.split(b"\n\n"))
    told = json.loads(body)
    text: str = told["choices"][0]["message"]["content"] if reply.status == 200 else f"{reply.status} {told}"
    return text


async def _leave_alone(url: str, watched: Watched, known: Sequence[Known], number: int, failures: list[str]) -> float:
    """Leave in the midst of a text when nobody else is there; returns the seconds until none runs."""
    random = Random(f"D5 {number}")
    wanted = random.choice(known)
    async with connected(url) as client:
        await client.send("POST", CHAT, wanted.body)
        fault = await _read_some(client, wanted, random.randrange(6))
    if fault is not None:
        failures.append(f"client {number}, alone: {fault}")
    return await _until_idle(watched)


async def _until_idle(watched: Watched) -> float:
    began = time.perf_counter()
    while not watched.idle:
        await asyncio.sleep(0.0005)
        if time.perf_counter() - began > 10:
            break
    return time.perf_counter() - began


ROWS = (
    Row(
        name="D5 engine",
        fault="clients leave while the body is read, queued, in prefill, in decode and in a speculative step",
        expected="slots free within a step and 100 ms (99 of 100), 0 texts of others changed, descriptors +0",
        quick=10_000,
        full=100_000,
        run=aborts,
    ),
    Row(
        name="D5 worker",
        fault="the same with the engine in a worker, over its connection",
        expected="slots free within a step and 100 ms (99 of 100), 0 texts of others changed, descriptors +0",
        quick=1_000,
        full=100_000,
        run=aborts_in_worker,
    ),
)
