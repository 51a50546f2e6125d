"""Row D1: requests that are nearly right, through the whole application with a toy model behind it."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from random import Random

from starlette.types import ASGIApp
from tests.faults.requests_asgi import ask, fault_of, running, toy_app
from tests.faults.requests_mutations import random_request
from tests.faults.row import Outcome, Row

AT_ONCE = 8
SHOWN = 10


def bodies(count: int) -> Outcome:
    """Send so many requests; a number repeats one: ``random_request(Random(f"D1 bodies {number}"))``."""
    failures: list[str] = []
    statuses: Counter[int] = Counter()
    with toy_app() as app:
        asyncio.run(_all(app, iter(range(count)), statuses, failures))
    figure = ", ".join(f"{times:,} x {status}" for status, times in sorted(statuses.items()))
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:SHOWN]))


async def _all(app: ASGIApp, numbers: Iterator[int], statuses: Counter[int], failures: list[str]) -> None:
    async def work() -> None:
        for number in numbers:
            fault = await _fault(app, number, statuses)
            if fault is not None:
                failures.append(f"request {number}: {fault}")

    async with running(app):
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))


async def _fault(app: ASGIApp, number: int, statuses: Counter[int]) -> str | None:
    asked = random_request(Random(f"D1 bodies {number}"))
    try:
        answered = await ask(app, asked)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  # what a row is there to find
        return f"{error!r} of {asked.method} {asked.path} {asked.body[:300]!r}"
    statuses[answered.status] += 1
    fault = fault_of(asked, answered)
    return fault and f"{fault} to {asked.method} {asked.path} {asked.body[:300]!r}"


ROWS = (
    Row(
        name="D1 bodies",
        fault="bodies, headers, methods and paths that are nearly right",
        expected="0 of 5xx, 0 foreign exceptions, errors as OpenAI spells them",
        quick=50_000,
        full=1_000_000,
        run=bodies,
    ),
)
