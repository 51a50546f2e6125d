"""Row D9: everything at once for a while: short and long texts, wrong ones, clients that leave, large and slow ones."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from random import Random

from tests.faults.clients_expected import Known, known_texts
from tests.faults.clients_http import CHAT, chat_body, connected, deltas
from tests.faults.clients_server import Running, toy_server
from tests.faults.requests_toy import ToyEngine
from tests.faults.row import Outcome, Row

ENGINE = ToyEngine(pass_s=0.002)
CLIENTS = 8
WARM = 0.4  # of the time, in which what is made once is made: threads, caches, the allocator's pools
MOST_DRIFT = 0.01  # of the memory after that
NOISE_MIB = 2.0  # of the allocator, which a minute does not even out
MOST_THREADS = 16  # the loop's, the engine's, those that tokenise, and the numeric libraries'
PARTS = 5
KINDS = {"text": 10, "leaves": 5, "wrong": 3, "large": 1, "grammar": 1, "stays": 1, "metrics": 1}


def soak(seconds: int) -> Outcome:
    """Keep a server busy for so many seconds."""
    known = known_texts(200, Random("D9"), engine=ENGINE)
    with toy_server(ENGINE) as server:
        return asyncio.run(_measure(server, known, seconds))


async def _measure(server: Running, known: Sequence[Known], seconds: int) -> Outcome:
    failures: list[str] = []
    done: Counter[str] = Counter()
    await _text(server.url, known[0])
    idle, began = server.descriptors, time.perf_counter()
    clients = [_keep_visiting(server.url, known, place, began + seconds, done, failures) for place in range(CLIENTS)]
    sampling = asyncio.create_task(_sampled(server, seconds))
    await asyncio.gather(*clients)
    memory = await sampling
    await asyncio.sleep(1)  # for what is closed a moment later
    most = (1 + MOST_DRIFT) * memory[0] + NOISE_MIB
    failures += [f"memory grew to {memory[-1]:.1f} MiB, wanted at most {most:.1f}: {memory}"] * (memory[-1] > most)
    failures += [f"{server.threads} threads at the end"] * (server.threads > MOST_THREADS)
    failures += [f"{server.descriptors - idle} descriptors more"] * (server.descriptors > idle)
    tried = done.total()
    kinds = ", ".join(f"{times:,} {kind}" for kind, times in done.most_common())
    figure = (
        f"{kinds} in {seconds} s; {memory[0]:.1f} MiB after {WARM:.0%} of the time, {memory[-1]:.1f} at the end, "
        f"{server.threads} threads"
    )
    return Outcome(tried=tried, survived=tried - len(failures), figure=figure, failures=tuple(failures[:10]))


async def _sampled(server: Running, seconds: int) -> list[float]:
    """Return the least memory of each fifth of the time after it is warm: what is held, not what is worked on."""
    await asyncio.sleep(WARM * seconds)
    share = (1 - WARM) * seconds / PARTS
    memory = []
    for _ in range(PARTS):
        until, samples = time.perf_counter() + share, [server.resident_mib]
        while time.perf_counter() < until:
            await asyncio.sleep(0.2)
            samples.append(server.resident_mib)
        memory.append(min(samples))
    return memory


async def _keep_visiting(
    url: str, known: Sequence[Known], place: int, until: float, done: Counter[str], failures: list[str]
) -> None:
    random = Random(f"D9 {place}")
    while time.perf_counter() < until:
        (kind,) = random.choices(list(KINDS), list(KINDS.values()))
        fault = await _visit(url, kind, random.choice(known), random)
        done[kind] += 1
        if fault is not None:
            failures.append(f"{kind}: {fault}")


async def _visit(url: str, kind: str, wanted: Known, random: Random) -> str | None:
    """Do one thing; returns what was wrong with what came of it."""
    match kind:
        case "text":
            text = await _text(url, wanted)
            return None if text == wanted.text else f"{text!r}, wanted {wanted.text!r}"
        case "leaves":
            async with connected(url) as client:
                await client.send("POST", CHAT, wanted.body)
                await asyncio.sleep(random.random() * 0.05)
            return None
        case "stays":
            async with connected(url) as client:
                await client.ask("GET", "/health")
                await asyncio.sleep(random.random())
            return None
    method, path, body, status = _others(kind, random)
    async with connected(url) as client:
        reply, told = await client.ask(method, path, body)
    return None if reply.status == status else f"{reply.status} {told[:200]!r}"


def _others(kind: str, random: Random) -> tuple[str, str, bytes, int]:
    """Return a request by its kind, and the status of its answer."""
    match kind:
        case "wrong":
            return "POST", CHAT, chat_body("Hi", n=random.randrange(5, 100)), 400
        case "large":
            return "POST", CHAT, chat_body(chr(random.randrange(97, 123)) * 900_000), 400
        case "grammar":
            form = {"type": "object", "properties": {f"p{random.randrange(10**6)}": {"type": "integer"}}}
            schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": form}}
            return "POST", CHAT, chat_body("Hi", max_tokens=20, response_format=schema), 200
        case _:
            return "GET", "/metrics", b"", 200


async def _text(url: str, wanted: Known) -> str:
    async with connected(url) as client:
        reply, body = await client.ask("POST", CHAT, wanted.body)
    if reply.status != 200:
        return f"{reply.status} {body!r}"
    if wanted.stream:
        return "".join(deltas(event) for event in body.split(b"\n\n"))
    text: str = json.loads(body)["choices"][0]["message"]["content"]
    return text


ROWS = (
    Row(
        name="D9",
        fault="texts, wrong requests, large ones, grammars and clients that leave, all at once; so many seconds",
        expected="memory +1 % and 2 MiB at most once it is warm, descriptors +0, texts as they are alone",
        quick=150,
        full=4 * 3600,
        run=soak,
    ),
)
