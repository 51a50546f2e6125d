"""Row D6: clients that send or read as slowly as they can, beside one that asks as it should."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.faults.clients_expected import Known, known_texts
from tests.faults.clients_http import CHAT, Client, connected, deltas
from tests.faults.clients_server import Running, toy_server
from tests.faults.requests_toy import ToyEngine
from tests.faults.row import Outcome, Row

ENGINE = ToyEngine(pass_s=0.005)
CROWD = 500  # of the 512 connections there are
HELD_S = 15.0
SLACK_S = 1.0  # of timers on a machine with other work
TRICKLE_S = 0.5
ANSWER_S = 5.0
LEAST_SUCCESS = 0.95
UNREAD = 40  # answers of some 20 KB, beyond what the kernel and the server keep of a connection


@dataclass
class Seen:
    """What came of clients; ``held_s`` of those that were closed by the server."""

    held_s: list[float] = field(default_factory=list)
    right: int = 0
    asked: int = 0
    most_descriptors: int = 0


def slow(count: int) -> Outcome:
    """Open so many slow connections, ``CROWD`` at a time."""
    texts = known_texts(60, Random("D6"), engine=ENGINE)
    known = [each for each in texts if each.stream and len(each.body) < 200]
    failures: list[str] = []
    seen = Seen()
    with toy_server(ENGINE) as server:
        for _ in range(0, count, CROWD):
            asyncio.run(_wave(server, known, min(count, CROWD), seen, failures))
    if seen.right < LEAST_SUCCESS * seen.asked:
        failures.append(f"{seen.right} of {seen.asked} sound requests were answered")
    figure = (
        f"{seen.right} of {seen.asked} sound requests answered; held up to {max(seen.held_s):.1f} s, "
        f"{seen.most_descriptors} descriptors at most"
    )
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:10]))


async def _wave(server: Running, known: Sequence[Known], count: int, seen: Seen, failures: list[str]) -> None:
    await _asks_well(server.url, known[0])
    base = server.descriptors
    over = asyncio.Event()
    sound = asyncio.create_task(_keep_asking(server.url, known, seen, over))
    kinds = [_slow_head, _slow_body, _slow_reader]
    crowd = [asyncio.create_task(_held(server.url, kinds[place % 3], seen, failures)) for place in range(count)]
    began = time.perf_counter()
    while server.descriptors < base + count // 2:
        await asyncio.sleep(0.05)
    while (held := server.descriptors - base) > 2 and time.perf_counter() - began < HELD_S + SLACK_S:
        seen.most_descriptors = max(seen.most_descriptors, held)
        await asyncio.sleep(0.1)
    if held > 2:  # the sound client's
        failures += [f"{held} connections are still held after {HELD_S + SLACK_S:.0f} s"] * held
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    over.set()
    await sound


async def _held(url: str, kind: Callable[[Client], Awaitable[None]], seen: Seen, failures: list[str]) -> None:
    began = time.perf_counter()
    try:
        async with connected(url, receive_bytes=4096) as client:
            await kind(client)
    except (OSError, EOFError):
        pass
    seen.held_s.append(time.perf_counter() - began)
    if seen.held_s[-1] > HELD_S + SLACK_S:
        failures.append(f"{kind.__name__} was held {seen.held_s[-1]:.1f} s")


async def _slow_head(client: Client) -> None:
    """Send a byte of headers now and then."""
    client.writer.write(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ")
    await _trickle(client)


async def _slow_body(client: Client) -> None:
    """Send a byte of a body now and then."""
    client.writer.write(client.head("POST", CHAT, 100_000) + b'{"model": "toy"')
    await _trickle(client)


async def _trickle(client: Client) -> None:
    while not client.reader.at_eof():
        client.writer.write(b"x")
        await client.writer.drain()
        await asyncio.sleep(TRICKLE_S)


async def _slow_reader(client: Client) -> None:
    """Ask for more than fits on the way and read a byte of it now and then."""
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.writer.write(client.head("GET", "/openapi.json", 0) * UNREAD)
    while True:
        await asyncio.sleep(TRICKLE_S)
        client.writer.write(b"x")  # raises once the server has closed


async def _keep_asking(url: str, known: Sequence[Known], seen: Seen, over: asyncio.Event) -> None:
    while not over.is_set():
        seen.right += await _asks_well(url, known[seen.asked % len(known)])
        seen.asked += 1
        await asyncio.sleep(0.05)


async def _asks_well(url: str, wanted: Known) -> bool:
    try:
        async with asyncio.timeout(ANSWER_S), connected(url) as client:
            reply, body = await client.ask("POST", CHAT, wanted.body)
    except (OSError, EOFError, TimeoutError):
        return False
    return reply.status == 200 and "".join(deltas(event) for event in body.split(b"\n\n")) == wanted.text


ROWS = (
    Row(
        name="D6",
        fault="connections that send headers or a body by the byte, or hardly read, 500 at a time",
        expected="closed within 15 s, and a sound client answered 95 times of 100",
        quick=CROWD,
        full=10 * CROWD,
        run=slow,
    ),
)
