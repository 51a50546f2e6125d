"""Row D3: requests as large as they come, beside a client that asks as it should."""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.faults.clients_expected import Known, known_texts
from tests.faults.clients_http import CHAT, Client, chat_body, connected, deltas
from tests.faults.clients_server import Running, toy_server
from tests.faults.requests_asgi import is_error
from tests.faults.requests_toy import ToyEngine
from tests.faults.row import Outcome, Row

ENGINE = ToyEngine(pass_s=0.005)
AT_ONCE = 4
MOST_GROWTH_MIB = 64.0
ROUNDS = 3
MOST_LATER = 1.5  # times the sound client's 99th percentile without them
ALLOWED_S = 0.05  # on a machine with other work
CALM_S = 4
MILLION = 1_000_000


def _message(text: str) -> bytes:
    return chat_body(text, max_tokens=1)


def _completion(prompt: Any) -> bytes:
    return json.dumps({"model": "toy", "prompt": prompt, "max_tokens": 1}).encode()


def _with(field: str, value: bytes) -> bytes:
    return chat_body("Hi", max_tokens=1)[:-1] + f', "{field}": '.encode() + value + b"}"


def _tool(index: int) -> dict[str, Any]:
    properties = {f"p{number}": {"type": "string", "pattern": f"^{number}[a-z]+$"} for number in range(30)}
    return {
        "type": "function",
        "function": {"name": f"f{index}", "parameters": {"type": "object", "properties": properties}},
    }


# Each within a megabyte, which is what a body may have.
BODIES: dict[str, Callable[[], bytes]] = {
    "a million of one letter": lambda: _message("a" * MILLION),
    "a million of ^": lambda: _message("^" * MILLION),
    "a million spaces": lambda: _message(" " * MILLION),
    "of four bytes": lambda: json.dumps(json.loads(_message("🏳" * 250_000)), ensure_ascii=False).encode(),
    "a prompt beyond the context": lambda: _message("ab " * ENGINE.context),
    "token ids beyond the context": lambda: _completion([97] * 250_000),
    "lists in lists": lambda: _with("metadata", b"[" * 400_000 + b"]" * 400_000),
    "many lists": lambda: _with("stop", b"[" + b"[]," * 300_000 + b"1]"),
    "many objects": lambda: _with("stop", b"[" + b"{}," * 300_000 + b"1]"),
    "many keys": lambda: json.dumps({f"k{number}": 1 for number in range(70_000)}).encode(),
    "many wrong token ids": lambda: _completion([None] * 160_000),
    "many wrong prompts": lambda: _completion([[""]] * 160_000),
    "many numbers": lambda: _with("logit_bias", b"[" + b"1," * 450_000 + b"1]"),
    "many messages": lambda: json.dumps(
        {"model": "toy", "messages": [{"role": "user", "content": "a"}] * 20_000}
    ).encode(),
    "many tools": lambda: _with("tools", json.dumps([_tool(index) for index in range(100)]).encode()),
    "a long number": lambda: _with("seed", b"9" * MILLION),
    "escapes": lambda: _message("\0" * 150_000),
    "spaces before": lambda: b" " * 900_000 + _message("Hi"),
}


def large(count: int) -> Outcome:
    """Send each kind so many times, after as many to another server: that one takes as much of the processor."""
    texts = known_texts(60, Random("D3"), engine=ENGINE)
    known = [each for each in texts if each.stream and len(each.body) < 200]
    with toy_server(ENGINE) as server, toy_server(ENGINE) as other:
        return asyncio.run(_measure(server, other.url, known, count))


async def _measure(server: Running, other: str, known: Sequence[Known], count: int) -> Outcome:
    failures: list[str] = []
    await _send_all(server.url, 1, failures)  # what is imported once
    calm = _late(await _asking_while(asyncio.sleep(CALM_S), server.url, known, failures))
    base = server.resident_mib
    server.reset_peak()
    elsewhere: list[float] = []
    here: list[float] = []
    for _ in range(ROUNDS):  # in turn, as the machine has other things to do as well
        for url, late in ((other, elsewhere), (server.url, here)):
            work = _elsewhere(url, max(1, count // ROUNDS), failures)
            late.append(_late(await _asking_while(work, server.url, known, failures)))
    busy, beside = statistics.median(elsewhere), statistics.median(here)
    grown = server.peak_mib - base
    if grown > MOST_GROWTH_MIB:
        failures.append(f"memory grew by {grown:.0f} MiB, wanted at most {MOST_GROWTH_MIB:.0f}")
    if beside > MOST_LATER * max(calm, busy) + ALLOWED_S:
        failures.append(f"another client's p99 {beside * 1e3:.0f} ms, {busy * 1e3:.0f} ms where they go elsewhere")
    tried = 2 * (len(BODIES) + 2) * ROUNDS * max(1, count // ROUNDS)
    figure = (
        f"memory +{grown:.0f} MiB; another client's p99 {calm * 1e3:.0f} ms alone, {busy * 1e3:.0f} ms while all is "
        f"sent to another server of this machine, {beside * 1e3:.0f} ms to this one, medians of {ROUNDS} rounds"
    )
    return Outcome(tried=tried, survived=tried - len(failures), figure=figure, failures=tuple(failures[:10]))


def _late(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100)[-1]


async def _asking_while(work: Any, url: str, known: Sequence[Known], failures: list[str]) -> list[float]:
    """Ask for texts until work is done; returns the seconds that each took."""
    task = asyncio.ensure_future(work)
    took: list[float] = []
    while not task.done():
        wanted = known[len(took) % len(known)]
        began = time.perf_counter()
        async with connected(url) as client:
            reply, body = await client.ask("POST", CHAT, wanted.body)
        took.append(time.perf_counter() - began)
        if reply.status != 200 or "".join(deltas(event) for event in body.split(b"\n\n")) != wanted.text:
            failures.append(f"another client's answer: {reply.status} {body[:200]!r}")
        await asyncio.sleep(0.01)
    await task
    return took


async def _elsewhere(url: str, count: int, failures: list[str]) -> None:
    """Send all from another process, lest this one's clients wait for one another."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, url, str(count)), stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    failures += json.loads(told)


async def _send_all(url: str, count: int, failures: list[str]) -> None:
    bodies = {kind: make() for kind, make in BODIES.items()}
    kinds = iter([*BODIES, "announced", "unannounced"] * count)

    async def work() -> None:
        for kind in kinds:
            fault = await (_post(url, bodies[kind]) if kind in bodies else _endless(url, kind == "announced"))
            if fault is not None:
                failures.append(f"{kind}: {fault}")

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


async def _post(url: str, body: bytes) -> str | None:
    """Send a body that can't be served; returns what is wrong with the answer."""
    async with connected(url) as client:
        path = CHAT if b'"prompt"' not in body[:40] else "/v1/completions"
        reply, told = await client.ask("POST", path, body)
    if b"Hi" in body[-40:] and reply.status == 200:
        return None
    return _fault(reply.status, told, (400, 413))


async def _endless(url: str, announced: bool) -> str | None:
    """Send a hundred megabytes, or as much of them as the server takes."""
    piece = b" " * 65_536
    async with connected(url) as client:
        head = client.head("POST", CHAT, 100 * MILLION)
        if not announced:
            head = head.replace(b"content-length: 100000000", b"transfer-encoding: chunked")
        client.writer.write(head)
        sending = asyncio.create_task(_pour(client, piece if announced else b"10000\r\n" + piece + b"\r\n"))
        try:
            reply = await client.reply()
            told = await client.body(reply)
        except (OSError, EOFError):
            return None  # the connection was closed, which may overtake what was said before
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    return _fault(reply.status, told, (413,))


async def _pour(client: Client, piece: bytes) -> None:
    for _ in range(100 * MILLION // len(piece)):
        client.writer.write(piece)
        await client.writer.drain()


def _fault(status: int, told: bytes, wanted: Sequence[int]) -> str | None:
    right = status in wanted and is_error(json.loads(told))
    return None if right else f"status {status}: {told[:200]!r}"


def main() -> None:
    """Send each kind as often as the second argument says, to the server that the first one names."""
    failures: list[str] = []
    asyncio.run(_send_all(sys.argv[1], int(sys.argv[2]), failures))
    sys.stdout.write(json.dumps(failures))


ROWS = (
    Row(
        name="D3",
        fault="a hundred megabytes, prompts beyond the context, a million of one character, deep and wide JSON",
        expected="400 or 413; memory +64 MiB; another client's p99 at most 1.5 times that beside other load, and 50 ms",
        quick=6,
        full=1000,
        run=large,
    ),
)

if __name__ == "__main__":
    main()
