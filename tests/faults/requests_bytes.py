"""Row D1: bytes that are nearly HTTP, over connections."""

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.faults.clients_http import CHAT, chat_body, connected
from tests.faults.requests_asgi import is_error
from tests.faults.requests_toy import ToyEngine
from tests.faults.row import Outcome, Row
from tests.served import served

AT_ONCE = 8
ANSWER_S = 30.0
HEAD = b"host: 127.0.0.1\r\n"
BODY = chat_body("Hi", max_tokens=1)
SEEDS = [
    b"GET /health HTTP/1.1\r\n" + HEAD + b"\r\n",
    b"POST %s HTTP/1.1\r\n%scontent-length: %d\r\n\r\n%s" % (CHAT.encode(), HEAD, len(BODY), BODY),
    b"POST /tokenize HTTP/1.1\r\n%stransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (HEAD, len(BODY), BODY),
    b"GET /v1/models/a%2Fb?x=%00 HTTP/1.1\r\nuser-agent: x\r\n" + HEAD + b"connection: close\r\n\r\n",
]
LINES = [
    *(b"content-length: -1", b"content-length: 5, 5", b"content-length: 99999999999999999999", b"content-length: +3"),
    *(b"transfer-encoding: chunked", b"transfer-encoding: gzip, chunked", b"transfer-encoding: \x0bchunked", b"te: x"),
    *(
        b"host: evil.example",
        b"host:",
        b" folded",
        b"\tfolded: x",
        b": empty",
        b"no colon",
        b"a b: c",
        b"x: \0",
        b"x: \xff",
    ),
    *(b"expect: 100-continue", b"upgrade: websocket\r\nconnection: upgrade", b"upgrade: h2c", b"connection: close, x"),
    *(b"sec-websocket-key: x\r\nsec-websocket-version: 13", b"x: " + b"a" * 17_000, b"\r\n".join([b"y: 1"] * 100)),
]
STARTS = [
    *(
        b"GET",
        b"get / HTTP/1.1",
        b"GET  / HTTP/1.1",
        b"GET / HTTP/1.0",
        b"GET / HTTP/9.9",
        b"GET / http/1.1",
        b"GET /\0 HTTP/1.1",
    ),
    *(b"CONNECT x:1 HTTP/1.1", b"GET http://127.0.0.1/health HTTP/1.1", b"OPTIONS * HTTP/1.1", b"PRI * HTTP/2.0"),
    *(
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1",
        b"GET /%ff%fe%00 HTTP/1.1",
    ),
    *(b"GET /\xc3\xa9 HTTP/1.1", b"\r\n\r\nGET /health HTTP/1.1", b"HEAD /health HTTP/1.1", b"TRACE / HTTP/1.1"),
]
PARTS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"-1\r\n",
    b"5;x=y\r\n",
    b"\r\n\r\n",
    b"\xff" * 9,
]
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def mutated(random: Random) -> bytes:
    """Return bytes that begin as one or two requests."""
    sent = b"".join(random.choices(SEEDS, k=random.choice((1, 1, 2))))
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(sent) + 1)
        match random.randrange(6):
            case 0:
                rest = sent.partition(b"\r\n")[2]
                sent = random.choice(STARTS) + b"\r\n" + rest
            case 1 | 2:
                sent = sent.replace(HEAD, HEAD + random.choice(LINES) + b"\r\n", 1)
            case 3:
                sent = sent[:at] + random.choice(PARTS) + sent[at:]
            case 4:
                sent = sent[:at] + sent[at + random.randint(1, 20) :]
            case _:
                sent = bytes(byte ^ (1 << random.randrange(8)) if random.random() < 0.01 else byte for byte in sent)
    return sent


class _Logged(logging.Handler):
    """Keeps what the server tells of exceptions, which a client needn't notice."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.errors.append(f"logged {record.getMessage()[:100]!r}: {error!r}")


def raw(count: int) -> Outcome:
    """Send so many pieces; a number repeats one: ``mutated(Random(f"D1 bytes {number}"))``."""
    failures: list[str] = []
    statuses: Counter[int] = Counter()
    logged = _Logged()
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addHandler(logged)
    with TemporaryDirectory() as folder, ToyEngine().open(Path(folder)) as engine, served(engine) as url:
        asyncio.run(_all(url, iter(range(count)), statuses, failures))
    failures += logged.errors
    figure = ", ".join(f"{times:,} x {status}" for status, times in sorted(statuses.items()))
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:10]))


async def _all(url: str, numbers: Iterator[int], statuses: Counter[int], failures: list[str]) -> None:
    async def work() -> None:
        for number in numbers:
            sent = mutated(Random(f"D1 bytes {number}"))
            fault = _fault(await _answers(url, sent), statuses)
            if fault is not None:
                failures.append(f"bytes {number}: {fault} to {sent[:200]!r}")

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


async def _answers(url: str, sent: bytes) -> bytes:
    """Return all that is answered until the server closes, after being told that no more will come."""
    received = b""
    try:
        async with asyncio.timeout(ANSWER_S), connected(url) as client:
            client.writer.write(sent)
            client.writer.write_eof()
            while piece := await client.reader.read(65_536):
                received += piece
    except ConnectionError:
        pass  # closed at once, as what came could not be read on
    return received


def _fault(received: bytes, statuses: Counter[int]) -> str | None:
    """Return what is wrong with answers; none at all is right where a request had no end."""
    found = [int(status) for status in STATUS.findall(received)]
    statuses.update(found or [0])
    if any(status >= 500 for status in found):
        return f"answered {received[:300]!r}"
    head, _, body = received.rpartition(b"\r\n\r\n")
    if found and found[-1] >= 400 and body and b"text/event-stream" not in head and not is_error(json.loads(body)):
        return f"an error of another shape: {received[:300]!r}"
    return None


ROWS = (
    Row(
        name="D1 bytes",
        fault="bytes that are nearly HTTP: lines, lengths and chunks that are wrong, cut or doubled",
        expected="0 of 5xx, errors as OpenAI spells them, or a closed connection",
        quick=5_000,
        full=200_000,
        run=raw,
    ),
)
