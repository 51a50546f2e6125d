"""Many clients at once against a running server: what they are told, how long they wait, what memory it takes.

    engram serve build/demo.engram &
    python benchmarks/load_server.py http://127.0.0.1:8080 --pid $! --clients 200 --seconds 60

A client asks for a stream, reads it, and asks again; every fifth time it leaves after the first token, and told that
the server is busy it comes back within a second. Afterwards clients leave one by one: how long until no text runs.
"""

import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx2

ABORTS = 20
HANG_S = 120.0  # without a byte


@dataclass
class Seen:
    """What clients saw; times in seconds."""

    statuses: Counter[str] = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)
    tokens: int = 0


def body(model: str, max_tokens: int) -> dict[str, Any]:
    """Return a request unlike the others."""
    text = f"Tell me about the number {random.randrange(10**9)}."
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": True,
    }


async def visit(client: httpx2.AsyncClient, model: str, seen: Seen) -> None:
    """Ask once."""
    leaves = random.random() < 0.2
    started = time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body(model, 16)) as answer:
        if answer.status_code != 200:
            seen.statuses[str(answer.status_code)] += 1
            await asyncio.sleep(random.random())
            return
        said = 0
        async for line in answer.aiter_lines():
            if line.startswith('data: {"error":'):
                seen.statuses["error in a stream"] += 1
            if '"content":"' not in line or '"content":""' in line:
                continue
            said += 1
            if said == 1:
                seen.first_token_s.append(time.perf_counter() - started)
            if leaves:
                break
    seen.tokens += said
    seen.statuses["left" if leaves else "200"] += 1


async def keep_asking(client: httpx2.AsyncClient, model: str, seen: Seen, until: float) -> None:
    """Ask until the time has come; what goes wrong is counted."""
    while time.perf_counter() < until:
        try:
            await visit(client, model, seen)
        except httpx2.TimeoutException:
            seen.statuses["hang"] += 1
        except httpx2.TransportError as error:
            seen.statuses[type(error).__name__] += 1


async def freed_after(client: httpx2.AsyncClient, model: str) -> float:
    """Leave a text that isn't finished; returns the seconds until no text runs."""
    async with client.stream("POST", "/v1/chat/completions", json=body(model, 2000)) as answer:
        lines = answer.aiter_lines()
        for _ in range(6):
            await anext(lines)
    left = time.perf_counter()
    while await running(client):
        await asyncio.sleep(0.002)
    return time.perf_counter() - left


async def running(client: httpx2.AsyncClient) -> float:
    """Return how many texts run."""
    text = (await client.get("/metrics")).text
    counts = re.findall(r'^engram_load_texts\{kind="(?:running|waiting)",.*\} (\S+)$', text, re.MULTILINE)
    return sum(map(float, counts))


def resident_mib(pid: int | None) -> float:
    """Return the memory of a process, 0 where none is given."""
    if pid is None:
        return 0.0
    (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kib) / 1024


async def measure(url: str, clients: int, seconds: float, pid: int | None, key: str | None) -> dict[str, Any]:
    """Return what was seen, as JSON values."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=HANG_S) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        seen = Seen()
        memory = [resident_mib(pid)]
        until = time.perf_counter() + seconds
        crowd = [asyncio.create_task(keep_asking(client, model, seen, until)) for _ in range(clients)]
        for share in (4, 1):  # at a quarter of the time everything has been seen once
            await asyncio.sleep(max(0.0, until - time.perf_counter()) / share)
            memory.append(resident_mib(pid))
        await asyncio.gather(*crowd)
        while await running(client):
            await asyncio.sleep(0.1)
        freed_s = [await freed_after(client, model) for _ in range(ABORTS)]
    waits = sorted(seen.first_token_s)
    return {
        "clients": clients,
        "seconds": seconds,
        "statuses": dict(seen.statuses),
        "tokens_per_second": round(seen.tokens / seconds, 1),
        "first_token_p50_s": round(statistics.median(waits), 3),
        "first_token_p99_s": round(waits[int(0.99 * (len(waits) - 1))], 3),
        "rss_mib_at_0_25_100_percent": [round(value, 1) for value in memory],
        "freed_after_leaving_p50_ms": round(statistics.median(freed_s) * 1e3, 1),
        "freed_after_leaving_max_ms": round(max(freed_s) * 1e3, 1),
    }


@click.command()
@click.argument("url")
@click.option("--clients", type=int, default=200, show_default=True)
@click.option("--seconds", type=float, default=60.0, show_default=True)
@click.option("--pid", type=int, help="The server's, for its memory.")
@click.option("--key", help="An API key.")
def main(url: str, clients: int, seconds: float, pid: int | None, key: str | None) -> None:
    """Print what many clients of the server at URL see."""
    print(json.dumps(asyncio.run(measure(url, clients, seconds, pid, key)), indent=2))


if __name__ == "__main__":
    main()
