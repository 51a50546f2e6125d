"""What many or large requests may take of a server: connections, bytes held, tokens counted."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from tests.scripted_engine import ScriptedEngine
from tests.served import raw_answer, served
from tests.tiny import save_tokenizer

from engram_runtime import tokenizer as tokenizers
from engram_runtime.errors import LengthError
from engram_runtime.server import body, protocol
from engram_runtime.server.limits import LARGE_BODY_BYTES
from engram_runtime.tokenizer import TextTokenizer

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return TextTokenizer.load(folder)


@pytest.fixture
def url(tokenizer: TextTokenizer) -> Iterator[str]:
    with served(ScriptedEngine(tokenizer, lambda request: "Hi")) as address:
        yield address


def chat(text: str) -> dict[str, object]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}]}


def error_of(answer: httpx2.Response) -> tuple[int, str, str]:
    told = answer.json()["error"]
    return answer.status_code, told["code"], told["message"]


@contextlib.contextmanager
def half_a_body(url: str, size: int) -> Iterator[None]:
    """Hold the first half of a body at a server."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {2 * size}\r\nexpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100")  # so that the body is being read
        connection.sendall(b" " * size)
        yield


def test_a_text_of_far_too_many_tokens_is_refused_before_all_of_it_is_read(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "PART_CHARS", 100)
    text = "the tide " * 30
    ids = tokenizer.encode(text)
    assert tokenizer.encode(text, most_tokens=len(ids)) == ids
    with pytest.raises(LengthError, match=r"^the prompt has more than \d+ tokens, wanted at most 10; shorten it$"):
        tokenizer.encode(text, most_tokens=10)


def test_a_prompt_of_far_too_many_tokens_has_openai_s_code(url: str) -> None:
    status, code, message = error_of(httpx2.post(f"{url}{CHAT}", json=chat("é" * 200_000)))
    assert (status, code) == (400, "context_length_exceeded")
    assert message.endswith(" tokens, wanted at most 192; shorten it")


def test_bodies_are_bounded_together(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MAX_HELD_BYTES", 5000)
    monkeypatch.setattr(body, "LARGE_BODY_BYTES", 1500)
    with half_a_body(url, 4000):
        answer = httpx2.post(f"{url}{CHAT}", json=chat("a" * 2000))
        assert answer.headers["retry-after"] == "1"
        assert error_of(answer) == (
            503,
            "server_busy",
            "the requests under way have more than 5000 bytes together, so that none of more than 1500 is taken; "
            "ask again",
        )
        assert error_of(httpx2.post(f"{url}{CHAT}", json=chat("a" * 1000)))[0] == 400
    while (answer := httpx2.post(f"{url}{CHAT}", json=chat("a" * 2000))).status_code == 503:
        pass  # until the server has seen that the other client has left
    assert error_of(answer)[1] == "context_length_exceeded"


def test_large_bodies_are_worked_on_by_one_thread() -> None:
    async def threads(*sizes: int) -> list[str]:
        bodies = body.Bodies()
        work = (bodies.work(lambda _: threading.current_thread().name, b" " * size) for size in sizes)
        return await asyncio.gather(*work)

    *large, small = asyncio.run(threads(LARGE_BODY_BYTES + 1, LARGE_BODY_BYTES + 1, LARGE_BODY_BYTES))
    assert large == ["large-bodies_0"] * 2
    assert not small.startswith("large-bodies")


def test_the_thread_for_large_bodies_rests_twice_as_long_as_it_worked(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rests = 100.0, []

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        rests.append(seconds)

    async def work_for(*took: float) -> None:
        def work(body: bytes) -> None:
            nonlocal now
            now += took[len(rests) - 1]

        bodies = body.Bodies()
        for _ in took:
            await bodies.work(work, b" " * (LARGE_BODY_BYTES + 1))
        await bodies.work(lambda _: None, b"small")

    monkeypatch.setattr(body, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(body, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
    asyncio.run(work_for(0.125, 0.0625, 3, 0))
    assert rests == [0, 0.25, 0.125, 0.5]


def test_one_connection_too_many_is_told_when_to_come_back(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 1)
    with half_a_body(url, 10):
        answer = httpx2.get(f"{url}/health")
    assert error_of(answer) == (503, "server_busy", "there are 1 connections, which is all that are taken; ask again")
    assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_what_is_no_http_is_told_once_whatever_was_asked_before(
    url: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    sent = f"{method} {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 2\r\n\r\n{{}}".encode()
    with contextlib.suppress(ConnectionResetError):
        answer = raw_answer(url, sent + b"\0\r\n\r\n")
        assert answer.endswith(b'"code": "invalid_http"}}') or answer.startswith(b"HTTP/1.1 40")
    assert raw_answer(url, b"\0\r\n\r\n").endswith(
        b'{"error": {"message": "the request is no valid HTTP; correct the client", '
        b'"type": "invalid_request_error", "param": null, "code": "invalid_http"}}'
    )
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
