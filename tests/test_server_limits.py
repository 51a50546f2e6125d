"""What a server takes of strangers: sizes, times, keys and hosts, and what it tells of errors."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h11
import httpx2
import openai
import pytest
from tests.scripted_engine import ROWS, SITE, ScriptedEngine, ScriptedTicket
from tests.served import LOOPBACK, raw_answer, served
from tests.tiny import save_tokenizer

from engram_runtime.errors import RequestError, TableError
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.openai_api.job import prepare
from engram_runtime.openai_api.respond import respond
from engram_runtime.server import protocol
from engram_runtime.server.access import Access, access_for, read_keys
from engram_runtime.server.guard import OTHER_ROUTE
from engram_runtime.server.limits import MAX_BODY_BYTES, WORKER_THREADS
from engram_runtime.server.run import listen
from engram_runtime.serving.engine_protocol import Tell
from engram_runtime.serving.request import TextRequest
from engram_runtime.tokenizer import TextTokenizer

TEXT = "Über den Wolken, 日本"
CHAT = "/v1/chat/completions"
KEYS = ["0123456789abcdef", "fedcba9876543210"]
BODY: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return TextTokenizer.load(folder)


@pytest.fixture
def engine(tokenizer: TextTokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, lambda request: TEXT)


@pytest.fixture
def url(engine: ScriptedEngine) -> Iterator[str]:
    with served(engine) as address:
        yield address


def until(true: Callable[[], bool]) -> None:
    """Wait for something that is about to come true."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    told: dict[str, Any] = answer.json()["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    return told


@contextlib.contextmanager
def streaming(url: str, *, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    """Ask for a stream by hand; yields the connection once the first bytes have come."""
    body = json.dumps({**BODY, "stream": True}).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as connection:
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(20)
        connection.connect((host, int(port)))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection


def test_the_pieces_of_a_stream_are_whole_characters(url: str) -> None:
    with httpx2.stream("POST", f"{url}{CHAT}", json={**BODY, "stream": True, "engram": {"activity": True}}) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
    tokens = [token for choice in choices for token in choice.get("engram", {"tokens": []})["tokens"]]
    assert "".join(token["text"] for token in tokens) == TEXT
    assert tokens[0]["sites"] == {SITE: {"rows": list(ROWS), "gate": 0.25, "contribution": None}}


def test_usage_adds_up_the_texts(url: str) -> None:
    usage = httpx2.post(f"{url}{CHAT}", json={**BODY, "n": 2, "engram": {"usage": True}}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": usage["prompt_tokens"] - 1}
    assert usage["engram"] == {
        "sites": {SITE: {"rows": 16, "unique": 12, "bytes": 192, "cold": 2, "wait_ms": 4.0}},
        "drafts": {"made": 6, "accepted": 4, "tokens_per_forward": 2.0},
        "experts": None,
    }


def test_a_client_that_leaves_ends_its_text_and_nobody_else_s(engine: ScriptedEngine, url: str) -> None:
    engine.go_on.clear()
    with streaming(url), streaming(url) as other:
        with streaming(url):
            until(lambda: engine.load.running == 3)
        until(lambda: engine.load.running == 2)
        assert engine.cancelled == 1
        engine.go_on.set()
        received = b""
        while b"[DONE]" not in received:
            received += other.recv(65536)
    assert engine.cancelled == 1


def test_a_client_that_leaves_before_a_whole_answer_ends_its_text(engine: ScriptedEngine, url: str) -> None:
    engine.go_on.clear()
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{url}{CHAT}", json={**BODY, "n": 2}, timeout=0.3)
    until(lambda: engine.load.running == 0)
    assert engine.cancelled == 2


def test_openai_s_client_ends_a_stream_by_closing_it(engine: ScriptedEngine, url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = client.chat.completions.create(**BODY, stream=True)
        engine.go_on.clear()
        next(iter(stream))
        stream.close()
        until(lambda: engine.load.running == 0)


def test_a_full_queue_says_when_to_come_back(engine: ScriptedEngine, url: str) -> None:
    engine.slots = 0
    answer = httpx2.post(f"{url}{CHAT}", json=BODY)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    told = error_of(answer)
    assert (told["type"], told["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.chat.completions.create(**BODY)


def test_a_text_that_fails_is_an_error_with_a_status_or_in_the_stream(engine: ScriptedEngine, url: str) -> None:
    engine.error = TableError("rows can't be read")
    answer = httpx2.post(f"{url}{CHAT}", json=BODY)
    assert answer.status_code == 500
    assert error_of(answer) == {
        "message": "rows can't be read",
        "type": "server_error",
        "param": None,
        "code": "TableError",
    }
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIError, match="rows can't be read"),
    ):
        list(client.chat.completions.create(**BODY, stream=True))


def test_health_says_loading_ok_and_failed(engine: ScriptedEngine) -> None:
    with served(engine, loading=["other"]) as url:
        answer = httpx2.get(f"{url}/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
        assert [model["id"] for model in httpx2.get(f"{url}/v1/models").json()["data"]] == ["scripted"]
        for path in (CHAT, "/tokenize"):
            answer = httpx2.post(f"{url}{path}", json={**BODY, "model": "other"})
            assert (answer.status_code, error_of(answer)["code"]) == (503, "model_loading")
            assert answer.headers["retry-after"] == "5"
    with served(engine) as url:
        assert httpx2.get(f"{url}/health").json() == {"status": "ok"}
        engine.failure = RequestError("a defect")
        answer = httpx2.get(f"{url}/health")
        trouble = {"status": "failed", "since": 0.0, "reason": "a defect", "restarts": 0}
        assert (answer.status_code, answer.json()) == (503, {"status": "failed", "models": {"scripted": trouble}})
        answer = httpx2.post(f"{url}{CHAT}", json=BODY)
        assert (answer.status_code, error_of(answer)["message"]) == (503, "model 'scripted' has failed: a defect")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/none", 404), ("GET", CHAT, 405), ("POST", "/health", 405)]
)
def test_what_is_not_there_is_said_in_openai_s_shape(url: str, method: str, path: str, status: int) -> None:
    answer = httpx2.request(method, url + path)
    assert answer.status_code == status
    assert error_of(answer)["type"] == "invalid_request_error"
    assert len(answer.headers["x-request-id"]) == 16


def test_the_page_is_served_under_a_strict_policy(url: str) -> None:
    answer = httpx2.get(f"{url}/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx2.get(f"{url}/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert httpx2.get(f"{url}/../run.py").status_code == 404


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_is_counted_whatever_it_announces(url: str, announced: bool) -> None:
    large = b" " * (MAX_BODY_BYTES + 1)
    answer = httpx2.post(f"{url}{CHAT}", content=large if announced else iter([large[:1000], large[1000:]]))
    assert answer.status_code == 413
    assert error_of(answer)["message"] == "the body has more than 1048576 bytes; shorten it"


def test_headers_are_bounded(url: str) -> None:
    many = {f"x-{index}": "1" for index in range(80)}
    assert httpx2.get(f"{url}/health", headers=many).status_code == 431
    assert httpx2.get(f"{url}/health", headers={"x-long": "a" * 15_000}).status_code == 200
    assert httpx2.get(f"{url}/health", headers={"x-long": "a" * 17_000}).status_code in (400, 431)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nhost: 127",
        f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9\r\n\r\n{{".encode(),
    ],
    ids=["headers", "body"],
)
@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"], ids=["first", "second"])
def test_a_request_that_never_ends_is_ended(
    url: str, before: bytes, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "RECEIPT_S", {h11.IDLE: 0.3, h11.SEND_BODY: 0.3})
    with contextlib.suppress(ConnectionResetError):
        assert raw_answer(url, before + sent).count(b"HTTP/1.1") == bool(before)


def test_what_is_no_http_after_an_answer_closes_the_connection(url: str, caplog: pytest.LogCaptureFixture) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"POST /none HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(b"no chunk\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP/1.1" not in b"".join(iter(lambda: connection.recv(65536), b""))
    assert caplog.records == []


def test_a_deadline_counts_from_the_beginning_of_a_part(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "RECEIPT_S", {h11.IDLE: 0.5, h11.SEND_BODY: 0.5})
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:

        def send_slowly() -> None:
            for _ in range(200):
                connection.sendall(b"x")
                time.sleep(0.05)

        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_slowly()


def test_a_client_that_stops_reading_is_left(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protocol, "STALLED_READER_S", 0.3)
    caplog.set_level("INFO", "engram_runtime.server.guard")
    engine = ScriptedEngine(tokenizer, lambda request: "x" * 30_000, context_length=60_000)
    with served(engine) as url, streaming(url, receive_bytes=4096) as connection:
        until(lambda: any(CHAT in record.getMessage() for record in caplog.records))  # the request has ended
        with contextlib.suppress(ConnectionResetError):
            assert b"[DONE]" not in b"".join(iter(lambda: connection.recv(65536), b""))


def test_every_route_but_health_and_the_page_needs_a_key(engine: ScriptedEngine) -> None:
    with served(engine, access=access_for(LOOPBACK, KEYS)) as url:
        refused = {path for method, path in ROUTES if httpx2.request(method, url + path).status_code == 401}
        assert refused == {path for _, path in ROUTES} - OPEN_PATHS
        for key in KEYS:
            assert httpx2.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        for value in ("", KEYS[0], f"Bearer {KEYS[0]}x", "Bearer", f"Basic {KEYS[0]}", "Bearer \xe9"):
            wrong = httpx2.get(f"{url}/v1/models", headers={b"authorization": value.encode("latin-1")})
            assert (wrong.status_code, error_of(wrong)["code"]) == (401, "invalid_api_key")
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong" * 4) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


OPEN_PATHS = {"/health", "/", "/api.js", "/icon.svg", "/page.css", "/page.js", "/reply.js"}
ROUTES = [
    *(
        ("GET", path)
        for path in (*OPEN_PATHS, "/v1/models", "/v1/models/scripted", "/metrics", "/openapi.json", "/none")
    ),
    *(("POST", path) for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize", "/none")),
]


def test_turns_are_taken_between_keys(engine: ScriptedEngine) -> None:
    with served(engine, access=access_for(LOOPBACK, KEYS)) as url:
        for key in KEYS:
            httpx2.post(f"{url}{CHAT}", json=BODY, headers={"authorization": f"Bearer {key}"})
    assert engine.clients == ["key 0", "key 1"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "localhost:80"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "localhost.evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "127.0.0.1:9", "origin": "http://127.0.0.1:9"}, 200),
    ],
)
def test_other_sites_can_not_ask(url: str, headers: dict[str, str], status: int) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/health", headers=headers)
    assert connection.getresponse().status == status
    connection.close()


def test_others_reach_only_a_server_with_a_key() -> None:
    assert access_for("0.0.0.0", KEYS) == Access(None, tuple(key.encode() for key in KEYS))
    with pytest.raises(RequestError, match=r"--host 192\.168\.0\.9 can be reached by others, which needs a key; "):
        access_for("192.168.0.9", [])
    with pytest.raises(RequestError, match="an API key has 5 characters, wanted at least 16 of printable ASCII; "):
        access_for(LOOPBACK, ["short"])


def test_a_name_that_no_host_can_have_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"^can't listen at 'a{64}', which is no name of a host; choose another one$"
    ):
        listen("a" * 64, 0)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"{KEYS[0]}\n\n{KEYS[1]}\n")
    assert read_keys(path, {"ENGRAM_API_KEY": "x"}) == [*KEYS, "x"]
    path.write_text("\n")
    with pytest.raises(RequestError, match="keys has no API key, wanted one a line"):
        read_keys(path, {})
    with pytest.raises(RequestError, match=r"API keys .*none can't be read: "):
        read_keys(tmp_path / "none", {})


def test_no_text_of_a_request_is_logged(engine: ScriptedEngine, url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "engram_runtime")
    httpx2.post(f"{url}{CHAT}", json={**BODY, "messages": [{"role": "user", "content": "a secret"}]})
    httpx2.get(f"{url}/secret?secret")
    until(lambda: len([record for record in caplog.records if record.name.startswith("engram")]) == 2)
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("engram")]
    lines = [json.loads(line) for line in logged]
    assert [(line["route"], line["status"]) for line in lines] == [(CHAT, 200), (OTHER_ROUTE, 404)]
    assert "secret" not in "".join(logged)


def test_a_response_needs_no_server(engine: ScriptedEngine) -> None:
    engines = {"scripted": engine}
    answer = asyncio.run(respond(engines, CHAT, BODY, client="batch", time_limit_s=7))
    assert answer["choices"][0]["message"]["content"] == TEXT
    assert (engine.clients, engine.requests[0].time_limit_s) == (["batch"], 7)
    with pytest.raises(ApiError, match="stream is true, which only the server does; leave it out"):
        asyncio.run(respond(engines, CHAT, {**BODY, "stream": True}))
    with pytest.raises(ApiError, match="there is nothing at /v1/embeddings, wanted /v1/chat/completions or "):
        asyncio.run(respond(engines, "/v1/embeddings", BODY))


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_a_response_that_is_cancelled_ends_its_text(engine: ScriptedEngine, pause_s: float) -> None:
    engine.go_on.clear()

    async def leave() -> None:
        task = asyncio.create_task(respond({"scripted": engine}, CHAT, BODY))
        await asyncio.sleep(pause_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    until(lambda: engine.load.running == 0)


class SlowGrammars(ScriptedEngine):
    """Takes requests with a grammar when ``read`` is set; ``waiting`` is how many there are."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        super().__init__(tokenizer, lambda request: TEXT)
        self.read = threading.Event()
        self.waiting = 0

    def submit(self, requests: Sequence[TextRequest], tell: Tell, *, client: str = "") -> ScriptedTicket:
        if requests[0].grammar is not None:
            self.waiting += 1
            assert self.read.wait(20)
        return super().submit(requests, tell, client=client)


def test_grammars_that_take_long_keep_no_other_request_waiting(tokenizer: TextTokenizer) -> None:
    engine = SlowGrammars(tokenizer)
    with served(engine) as url, ThreadPoolExecutor(WORKER_THREADS) as clients:

        def ask(**fields: object) -> int:
            return httpx2.post(f"{url}{CHAT}", json={**BODY, **fields}, timeout=10).status_code

        slow = [clients.submit(ask, response_format={"type": "json_object"}) for _ in range(WORKER_THREADS)]
        try:
            until(lambda: engine.waiting == WORKER_THREADS)
            assert ask() == 200
        finally:
            engine.read.set()
        assert [each.result() for each in slow] == [200] * WORKER_THREADS


def test_a_schema_s_multiple_that_is_no_number_is_refused_by_the_grammar(tokenizer: TextTokenizer) -> None:
    body = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer", "multipleOf": True}}}
    job = prepare(
        {"scripted": ScriptedEngine(tokenizer, lambda request: TEXT)}, CHAT, {**BODY, "response_format": body}
    )
    assert "multipleOf" in str(job.requests[0].grammar)


def test_the_openapi_document_has_every_route_but_the_page_s_files(url: str) -> None:
    document = httpx2.get(f"{url}/openapi.json").json()
    routes = {path.replace("scripted", "{model}") for _, path in ROUTES} - (OPEN_PATHS - {"/", "/health"}) - {"/none"}
    assert set(document["paths"]) == routes
    assert set(document["components"]["schemas"]["ChatBody"]["required"]) == {"model", "messages"}
