"""Row D4: ten times as many requests as can be served."""

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from tests.faults.clients_expected import Known, known_texts
from tests.faults.clients_http import CHAT, connected, deltas
from tests.faults.clients_server import Running, toy_server
from tests.faults.requests_toy import ToyEngine
from tests.faults.row import Outcome, Row

ENGINE = ToyEngine(slots=4, queue=16, pass_s=0.025)
TIMES = 10  # of what can be served
LEAST_GOODPUT = 0.9  # of that at full load
MOST_SLOPE = 0.02  # of the memory at the middle, that the end may have more
NOISE_MIB = 4.0  # of what the first hundreds of requests make once
BUSY = (429, 503)
SHORT_BYTES = 200  # of a body, as long prompts take most of the time


@dataclass
class Seen:
    """What came of requests; ``lengths`` are characters of whole texts, by the second they ended in."""

    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    characters: int = 0
    waits_s: list[float] = field(default_factory=list)


def overload(seconds: int) -> Outcome:
    """Send ten times what can be served for so many seconds, after a quarter of that at full load."""
    texts = known_texts(100, Random("D4"), engine=ENGINE)
    known = [each for each in texts if each.stream and len(each.text) > 4 and len(each.body) < SHORT_BYTES]
    with toy_server(ENGINE) as server:
        return asyncio.run(_measure(server, known, seconds))


async def _measure(server: Running, known: Sequence[Known], seconds: int) -> Outcome:
    full, over = Seen(), Seen()
    before = await _at_full_load(server, known, full, seconds / 8)
    rate = TIMES * full.statuses[200] / (seconds / 8)
    began = time.perf_counter()
    memory = await _pour(server, known, rate, seconds, over)
    reached = over.characters / (time.perf_counter() - began)
    goodput = min(before, await _at_full_load(server, known, full, seconds / 8))  # others use this machine too
    failures = [*full.failures, *over.failures]
    if reached < LEAST_GOODPUT * goodput:
        failures.append(f"{reached:.0f} characters/s at {TIMES} times the load, {goodput:.0f} at full load")
    if memory[-1] > (1 + MOST_SLOPE) * memory[0] + NOISE_MIB:
        failures.append(f"memory grew from {memory[0]:.0f} to {memory[-1]:.0f} MiB in the second half")
    busy = sum(over.statuses[status] for status in BUSY)
    figure = (
        f"{rate:.0f} requests/s: {over.statuses[200]:,} answered, {busy:,} told to wait, goodput "
        f"{reached / goodput:.0%}, answers p99 {_late(over.waits_s):.2f} s, {memory[0]:.0f} to {memory[-1]:.0f} MiB"
    )
    tried = over.statuses.total()
    return Outcome(tried=tried, survived=tried - len(failures), figure=figure, failures=tuple(failures[:10]))


async def _at_full_load(server: Running, known: Sequence[Known], seen: Seen, seconds: float) -> float:
    """Have twice as many clients as slots ask again and again; returns characters a second."""
    began, characters = time.perf_counter(), seen.characters
    until = began + seconds
    await asyncio.gather(*(_keep_asking(server.url, known, place, seen, until) for place in range(2 * ENGINE.slots)))
    return (seen.characters - characters) / (time.perf_counter() - began)


async def _pour(server: Running, known: Sequence[Known], rate: float, seconds: int, seen: Seen) -> list[float]:
    """Ask so many times a second, whatever comes of it; returns memory in MiB in the second half, at its quarters."""
    began = time.perf_counter()
    memory, due = [], [seconds * share for share in (0.5, 0.625, 0.75, 0.875)]
    async with asyncio.TaskGroup() as tasks:
        number = 0
        while (passed := time.perf_counter() - began) < seconds:
            while number < passed * rate:
                tasks.create_task(_ask(server.url, known[number % len(known)], seen))
                number += 1
            if due and passed >= due[0]:
                due.pop(0)
                memory.append(server.resident_mib)
            await asyncio.sleep(0.005)
    return [*memory, server.resident_mib]


async def _keep_asking(url: str, known: Sequence[Known], place: int, seen: Seen, until: float) -> None:
    while time.perf_counter() < until:
        await _ask(url, known[place % len(known)], seen)
        place += 7


async def _ask(url: str, wanted: Known, seen: Seen) -> None:
    """Ask for a text; it comes as it must be, or the client is told when to come back."""
    began = time.perf_counter()
    try:
        async with connected(url) as client:
            reply, body = await client.ask("POST", CHAT, wanted.body)
    except (OSError, EOFError, TimeoutError) as error:
        seen.statuses[0] += 1
        seen.failures.append(f"{error!r} after {time.perf_counter() - began:.1f} s")
        return
    seen.statuses[reply.status] += 1
    seen.waits_s.append(time.perf_counter() - began)
    if reply.status == 200:
        text = "".join(deltas(event) for event in body.split(b"\n\n"))
        seen.characters += len(text)
        if text != wanted.text:
            seen.failures.append(f"text {text!r}, wanted {wanted.text!r}")
    elif reply.status not in BUSY or "retry-after" not in reply.headers:
        seen.failures.append(f"status {reply.status} with {reply.headers}")


def _late(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100)[-1]


ROWS = (
    Row(
        name="D4",
        fault="ten times the requests that can be served; so many seconds",
        expected="429 or 503 with Retry-After beyond the queue, accepted texts whole, goodput >= 90 %, memory flat",
        quick=20,
        full=600,
        run=overload,
    ),
)
