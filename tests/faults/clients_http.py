"""A client of HTTP/1.1 that can do all a bad one does: stop in the middle, read slowly, leave at any time."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
HANG_S = 60.0  # without a byte


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of an answer; names of headers are in lower case."""

    status: int
    headers: dict[str, str]


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self.reader, self.writer = reader, writer
        self._host = host

    def head(self, method: str, path: str, size: int, *headers: str) -> bytes:
        """Return what a request begins with."""
        lines = [f"{method} {path} HTTP/1.1", f"host: {self._host}", f"content-length: {size}", *headers, "", ""]
        return "\r\n".join(lines).encode()

    async def send(self, method: str, path: str, body: bytes = b"", *headers: str) -> None:
        """Send a whole request."""
        self.writer.write(self.head(method, path, len(body), *headers) + body)
        await self.writer.drain()

    async def reply(self) -> Reply:
        """Read the head of an answer."""
        async with asyncio.timeout(HANG_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Reply(int(first.split()[1]), headers)

    async def pieces(self, reply: Reply) -> AsyncIterator[bytes]:
        """Read what follows a head, piece by piece."""
        if "content-length" in reply.headers:
            async with asyncio.timeout(HANG_S):
                yield await self.reader.readexactly(int(reply.headers["content-length"]))
            return
        while True:
            async with asyncio.timeout(HANG_S):
                size = int(await self.reader.readline(), 16)
                piece = await self.reader.readexactly(size + 2)
            if size == 0:
                return
            yield piece[:-2]

    async def body(self, reply: Reply) -> bytes:
        """Read all that follows a head."""
        return b"".join([piece async for piece in self.pieces(reply)])

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[Reply, bytes]:
        """Send a request and read its answer."""
        await self.send(method, path, body)
        reply = await self.reply()
        return reply, await self.body(reply)


@asynccontextmanager
async def connected(url: str, *, receive_bytes: int | None = None) -> AsyncIterator[Client]:
    """Connect to ``http://HOST:PORT``; whatever was not done by the end of the block is broken off by a reset."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setblocking(False)
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    try:
        await asyncio.get_running_loop().sock_connect(connection, (host, int(port)))
    except BaseException:
        connection.close()
        raise
    reader, writer = await asyncio.open_connection(sock=connection, limit=1 << 20)
    try:
        yield Client(reader, writer, f"{host}:{port}")
    finally:
        writer.transport.abort()


def deltas(event: bytes) -> str:
    """Return the text that an event of a stream adds."""
    if not event.startswith(b"data: {"):
        return ""
    chunk: Any = json.loads(event.removeprefix(b"data: "))
    return "".join(choice["delta"].get("content", "") for choice in chunk["choices"])


def chat_body(prompt: str, **fields: Any) -> bytes:
    """Return the body of a chat with the toy model."""
    return json.dumps({"model": "toy", "messages": [{"role": "user", "content": prompt}], **fields}).encode()
