"""An engine's process: that it may die, hang and lie, and what the server that it belongs to makes of that."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from tests.served import served
from tests.test_engine import asked, held, let_go
from tests.toy_model import VOCAB
from tests.toy_serving import POSITIONAL, TakingTurns, Together, Told, said, said_alone, toy_bundle, toy_tokenizer
from tests.toy_worker import ToyWorkers, remote_engine

from engram_runtime import errors
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import BundleError, EngramError, RequestError, TableError
from engram_runtime.generation import Generation
from engram_runtime.sampling import SamplingOptions
from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.engine_protocol import (
    FAILED,
    OK,
    RESTARTING,
    BusyError,
    EngineError,
    Health,
    Load,
    UnavailableError,
    WorkerError,
)
from engram_runtime.serving.events import Event, Finished, SiteReading, Token
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.worker import answering, link, remote
from engram_runtime.serving.worker.frames import LENGTH, MAX_FRAME_BYTES, FrameReader, FrameWriter, ProtocolError
from engram_runtime.serving.worker.messages import (
    Accepted,
    Beat,
    Ended,
    ErrorNote,
    FromWorker,
    Opened,
    Said,
    State,
    Submit,
    decode_from_worker,
    decode_to_worker,
    encode_from_worker,
    encode_to_worker,
)
from engram_runtime.serving.worker.process import WorkerProcess
from engram_runtime.serving.worker.remote import RemoteEngine
from engram_runtime.serving.worker.settings import WorkerSettings
from engram_runtime.session import Session
from engram_runtime.tables.counters import TableCounters

LONG = 20
STATE = State(load=Load(waiting=0, running=0, slots=1, cached_tokens=0), health=Health())
DIED = "the process that generates has died; it is started anew, ask again"


def until(true: Callable[[], object]) -> None:
    """Wait for something that is about to come true."""
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def away(workers: ToyWorkers, **options: Any) -> Iterator[RemoteEngine]:
    with remote_engine(workers, POSITIONAL, EngineOptions(**{"slots": 1, **options})) as engine:
        yield engine


@dataclasses.dataclass
class Liar:
    """Starts workers that open, take a job and then say what a test wrote."""

    says: Sequence[bytes] = ()
    first: bytes = encode_from_worker(Opened(fingerprint="0", state=STATE))
    ended: int = 0
    _theirs: list[socket.socket] = dataclasses.field(default_factory=list)

    def __call__(self) -> "Liar":
        self.connection, theirs = socket.socketpair()
        self._theirs.append(theirs)
        threading.Thread(target=self._lie, args=(theirs,), daemon=True).start()
        return self

    def _lie(self, connection: socket.socket) -> None:
        reader, writer = FrameReader(connection), FrameWriter(connection)
        writer.put(self.first)
        with contextlib.suppress(EOFError):
            while True:
                for frame in reader.receive(1.0):
                    message = decode_to_worker(frame)
                    if isinstance(message, Submit):
                        writer.put(encode_from_worker(Accepted(job=message.job, state=STATE)))
                        for said in self.says:
                            writer.put(said)

    def end(self, patience_s: float) -> str:
        self.ended += 1
        self.connection.close()
        return "has died"


def lied_to(liar: Liar) -> RemoteEngine:
    bundle = toy_bundle(POSITIONAL)
    settings = WorkerSettings(path=bundle.path, executor="toy", slots=1, queue=16)
    return RemoteEngine(bundle, toy_tokenizer(), settings, liar)


def token(token_id: int, *, job: int = 1, index: int = 0, **more: Any) -> bytes:
    return encode_from_worker(Said(job=job, index=index, token=Token(token_id=token_id, piece="", **more)))


def end(reason: str, *token_ids: int) -> bytes:
    generation = Generation(
        text="",
        token_ids=token_ids,
        finish_reason=reason,
        prompt_tokens=1,
        prefilled_tokens=1,
        prefill_s=0.0,
        ttft_s=0.0,
        decode_s=0.0,
        tables={},
    )
    return encode_from_worker(
        Ended(job=1, index=0, end=Finished(piece="", generation=generation, queued_s=0.0), state=STATE)
    )


def beat(health: str) -> bytes:
    """Return what no sound worker writes."""
    load = '{"waiting":0,"running":0,"slots":1,"cached_tokens":0}'
    return f'{{"kind":"beat","state":{{"load":{load},"health":{{{health}}}}}}}'.encode()


def test_a_worker_that_dies_fails_its_texts_and_is_started_anew() -> None:
    model = held(3)
    workers = ToyWorkers(model)
    with away(workers) as engine:
        engine.submit([asked(1, max_tokens=LONG), asked(2, max_tokens=LONG)], told := Told())
        told.wait_for_tokens(2)
        workers.started[0].die()
        assert [(type(told.error(index)), str(told.error(index))) for index in range(2)] == [(WorkerError, DIED)] * 2
        let_go(model)
        until(lambda: engine.health.restarts == 1 and engine.health.status == OK)
        engine.submit([asked(1)], again := Told())
        alone = said_alone(Session(toy_bundle(POSITIONAL), TakingTurns(), []), toy_tokenizer(), asked(1))
        assert said(again.generation()) == alone
    assert len(workers.started) == 2


def test_requests_are_told_to_come_back_while_there_is_no_worker() -> None:
    opens = threading.Event()
    workers = ToyWorkers(Together())

    def start() -> Any:
        if workers.started:
            opens.wait(10)
        return workers()

    bundle = toy_bundle(POSITIONAL)
    settings = WorkerSettings(path=bundle.path, executor="toy", slots=3, queue=1)
    with RemoteEngine(bundle, toy_tokenizer(), settings, start) as engine, served(engine) as url:
        workers.started[0].die()
        until(lambda: engine.health.status == RESTARTING)
        with pytest.raises(UnavailableError) as caught:
            engine.submit([asked(1)], Told())
        assert str(caught.value) == "model 'toy' is being started anew; ask again"
        assert engine.load == Load(waiting=0, running=0, slots=3, cached_tokens=0)
        answer = httpx2.post(f"{url}/v1/completions", json={"model": "toy", "prompt": [1]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_restarting")
        assert int(answer.headers["retry-after"]) >= 1
        health = httpx2.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "restarting")
        assert health.json()["models"]["toy"]["reason"] == DIED
        assert 'engram_model_up{model="toy"} 0.0' in httpx2.get(f"{url}/metrics").text
        opens.set()
        until(lambda: engine.health.status == OK)
        assert httpx2.post(f"{url}/v1/completions", json={"model": "toy", "prompt": [1]}).status_code == 200
        assert 'engram_worker_restarts_total{model="toy"} 1.0' in httpx2.get(f"{url}/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_worker_dies_is_told_so(stream: bool) -> None:
    model = held(2)
    workers = ToyWorkers(model)
    body = {"model": "toy", "prompt": [1], "max_tokens": LONG, "stream": stream}
    with away(workers) as engine, served(engine) as url:

        def kill_it() -> None:
            until(lambda: engine.load.running == 1)
            workers.started[0].die()

        threading.Thread(target=kill_it).start()
        answer = httpx2.post(f"{url}/v1/completions", json=body)
        let_go(model)
    told = answer.text.removesuffix("\n\n").rpartition("data: ")[2] if stream else answer.text
    assert f'"message":"{DIED}","type":"server_error","param":null,"code":"worker_died"' in answer.text, told
    assert answer.status_code == (200 if stream else 502)


def test_a_worker_that_does_not_get_ready_is_tried_again_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_pauses", lambda: iter([0.0, 0.01, 0.01]))
    workers, refusals = ToyWorkers(Together()), [OSError("no memory"), RequestError("no room")]

    def start() -> Any:
        if workers.started and refusals:
            raise refusals.pop()
        return workers()

    bundle = toy_bundle(POSITIONAL)
    settings = WorkerSettings(path=bundle.path, executor="toy", slots=1, queue=1)
    with RemoteEngine(bundle, toy_tokenizer(), settings, start) as engine:
        workers.started[0].die()
        until(lambda: engine.health.restarts == 3 and engine.health.status == OK)
    assert refusals == []


def test_pauses_get_longer() -> None:
    pauses = remote._pauses()
    assert [next(pauses) for _ in range(8)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_another_bundle_in_the_place_of_the_first_is_not_served() -> None:
    workers = ToyWorkers(Together())
    with away(workers) as engine:
        engine.fingerprint = "of another one"
        workers.started[0].die()
        until(lambda: engine.failure)
        assert str(engine.failure) == "the bundle of model 'toy' was replaced; start the server anew"
        until(lambda: engine.health.status == FAILED)
        with pytest.raises(EngineError):
            engine.submit([asked(1)], Told())


def test_a_bundle_that_can_not_be_opened_is_refused_by_the_same_error() -> None:
    class Refusing(ToyWorkers):
        @contextlib.contextmanager
        def _open(self, settings: object, watch: object) -> Iterator[Any]:
            raise TableError("the table is damaged")
            yield

    with pytest.raises(TableError, match=r"^the table is damaged$"):
        remote_engine(Refusing(Together()), POSITIONAL, EngineOptions())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_the_engine_starts_another_one() -> None:
    model = Together()
    model.error, model.broken = ZeroDivisionError("by zero"), 42
    with away(ToyWorkers(model)) as engine:
        engine.submit([asked(42)], told := Told())
        message = "a defect has ended the engine: ZeroDivisionError('by zero'); start it anew"
        assert (type(told.error()), str(told.error())) == (EngineError, message)
        until(lambda: engine.health.restarts == 1 and engine.health.status == OK)
        engine.submit([asked(1)], again := Told())
        again.generation()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_the_server_leaves_no_text_waiting() -> None:
    def broken(index: int, event: Event) -> None:
        raise ZeroDivisionError("by zero")

    model = held(1)
    with away(ToyWorkers(model), slots=2) as engine:
        engine.submit([asked(1, max_tokens=LONG)], told := Told())
        told.wait_for_tokens(1)
        engine.submit([asked(2)], broken)
        let_go(model)
        message = "a defect has ended the engine: ZeroDivisionError('by zero'); start the server anew"
        assert (type(told.error()), str(told.error())) == (EngineError, message)
        until(lambda: engine.health.status == FAILED)
        assert str(engine.failure) == engine.health.reason == message
        with pytest.raises(EngineError, match=r"^a defect has ended the engine"):
            engine.submit([asked(1)], Told())


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ([b"{"], "a message can't be understood: it: Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ([b"[" * 100_000], "a message can't be understood: it: Invalid JSON: recursion limit exceeded at line 1"),
        ([b'{"kind":"open"}'], "a message can't be understood: it: Input tag 'open' found using 'kind' does not match"),
        ([b'{"kind":"beat"}'], "a message can't be understood: beat.state: Field required"),
        ([token(1, index=1)], "an event is of text 1, which has ended or never was"),
        ([end("stop"), token(1)], None),
        ([token(1), token(1), token(1), token(1)], "text 0 has more than the 3 tokens it may"),
        ([token(VOCAB)], f"a token is outside the vocabulary of {VOCAB}"),
        ([token(1, top=[(-1, 0.5)])], f"a token is outside the vocabulary of {VOCAB}"),
        ([end("stop", 2**70)], f"a token is outside the vocabulary of {VOCAB}"),
        ([end("whim")], "a text has ended by 'whim', which is no reason"),
        ([beat('"status":"whim"')], "an engine is 'whim', wanted one of ['ok', 'degraded', 'restarting', 'failed']"),
        ([beat('"since":NaN')], "a time since when is nan, wanted a finite number of seconds"),
    ],
)
def test_a_worker_that_lies_is_killed(says: list[bytes], reason: str | None) -> None:
    liar = Liar(says)
    with lied_to(liar) as engine:
        engine.submit([asked(1)], told := Told())
        if reason is None:  # it is told of a job that is over, which may be
            told.finished()
            assert engine.health == Health()
        else:
            assert str(told.error()).startswith(f"the process that generates was killed: {reason}")
            until(lambda: engine.health.restarts and engine.health.status == OK)


def test_a_message_that_is_too_long_is_not_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(LENGTH.pack(MAX_FRAME_BYTES + 1) + b"[")
        with pytest.raises(ProtocolError) as caught:
            FrameReader(ours).receive(1.0)
    assert str(caught.value) == f"a message has {MAX_FRAME_BYTES + 1} bytes, wanted at most {MAX_FRAME_BYTES}"


def test_a_worker_that_begins_with_something_else_is_not_used() -> None:
    liar = Liar(first=encode_from_worker(Beat(state=STATE)))
    with pytest.raises(WorkerError) as caught:
        lied_to(liar)
    assert str(caught.value) == (
        "the process that generates was killed: the first message is 'beat'; it is started anew, ask again"
    )


def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "TICK_S", 0.02)
    monkeypatch.setattr(link, "HUNG_S", 0.1)
    with lied_to(Liar()) as engine:
        engine.submit([asked(1)], told := Told())
        assert str(told.error()) == (
            "the process that generates was killed: it has said nothing for 0 s; it is started anew, ask again"
        )


def test_a_text_that_does_not_end_by_its_time_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "TICK_S", 0.02)
    monkeypatch.setattr("engram_runtime.serving.worker.jobs.GRACE_S", 0.0)
    with lied_to(Liar()) as engine:
        engine.submit([asked(1, time_limit_s=0.05)], told := Told())
        assert str(told.error()) == (
            "the process that generates was killed: a text hasn't ended by its time; it is started anew, ask again"
        )


def test_a_worker_that_does_not_answer_keeps_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "ANSWER_S", 0.05)
    silent = Liar()
    silent._lie = lambda connection: FrameWriter(connection).put(silent.first)  # type: ignore[method-assign]
    with lied_to(silent) as engine:
        with pytest.raises(UnavailableError, match=r"^the model's process doesn't answer; ask again$"):
            engine.submit([asked(1)], Told())
        with pytest.raises(RequestError, match=r"^the grammar takes more than 0 s to make; simplify the schema$"):
            engine.submit([asked(1, grammar="start: /a/")], Told())


def test_a_server_that_does_not_read_loses_texts_but_holds_up_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "MOST_UNSENT_BYTES", 20_000)
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    reader = FrameReader(theirs)
    with ours, BundleEngine(toy_bundle(POSITIONAL), Together(), [], toy_tokenizer(), EngineOptions(slots=2)) as engine:
        thread = threading.Thread(target=answering.Answering(engine, FrameWriter(theirs)).serve, args=(reader,))
        thread.start()
        for job in range(1, 40):
            texts = tuple(
                asked(1, max_tokens=LONG, seed=seed, top_logprobs=9, logit_bias={7: -100.0}) for seed in range(16)
            )
            FrameWriter(ours).put(encode_to_worker(Submit(job=job, client="", requests=texts)))
            until(lambda: engine.load.waiting + engine.load.running < 16)
        until(lambda: engine.load.waiting + engine.load.running == 0)
        engine.submit([asked(1)], told := Told())  # as another server's
        told.generation()
        received = read_all(FrameReader(ours))
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
    lost = [message for message in received if message.kind == "lost"]
    assert lost
    assert {message.error for message in lost} == {
        ErrorNote(name="EngineError", message="more than 0 MiB of texts weren't read; ask again")
    }


def read_all(reader: FrameReader) -> list[FromWorker]:
    """Return what comes until nothing does for half a second."""
    frames: list[bytes] = []
    while more := reader.receive(0.1):
        frames += more
    return [decode_from_worker(frame) for frame in frames]


EVENTS: list[Event] = [
    Token(token_id=5, piece="日\x00\u2028", top=[]),
    Token(token_id=5, piece="", logprob=-0.1, top=[(5, -0.1), (0, float("-inf"))]),
    Token(token_id=0, piece="e", top=[], sites={"a": SiteReading([1, 2**62], 0.1, float("inf"))}),
    Finished(
        piece=".",
        queued_s=1e-9,
        generation=Generation(
            text="e.",
            token_ids=(0, 5),
            finish_reason="stop",
            prompt_tokens=3,
            prefilled_tokens=2,
            prefill_s=0.1,
            ttft_s=0.2,
            decode_s=1 / 3,
            tables={"a": TableCounters(rows=8, wait_s=0.1)},
            drafts=DraftStatistics(drafter="lookup", forwards=2, tokens=3, drafted=[2, 1], accepted=[1, 0]),
            experts=7,
        ),
    ),
]


@pytest.mark.parametrize("event", EVENTS)
def test_events_cross_unchanged(event: Token | Finished) -> None:
    if isinstance(event, Token):
        there: FromWorker = Said(job=1, index=2, token=event)
    else:
        there = Ended(job=1, index=2, end=event, state=STATE)
    assert decode_from_worker(encode_from_worker(there)) == there


def test_numbers_cross_bit_by_bit() -> None:
    bits = np.random.default_rng(5).integers(0, 2**64, 1000, dtype=np.uint64)
    numbers = [number for number in bits.view(np.float64).tolist() if number == number]
    said_ = Said(job=1, index=0, token=Token(token_id=0, piece="", top=[(0, number) for number in numbers]))
    assert decode_from_worker(encode_from_worker(said_)) == said_


def test_requests_cross_unchanged() -> None:
    request = TextRequest(
        prompt_ids=(1, 2),
        max_tokens=3,
        sampling=SamplingOptions(temperature=0.7, seed=2**64 + 1, top_p=1e-300),
        stop=("日",),
        logit_bias={7: 0.5, 3: -100.0},
        top_logprobs=3,
        grammar="start: /a/",
        activity=True,
        time_limit_s=0.5,
    )
    there = Submit(job=1, client="key 1", requests=(request, asked(1)))
    assert decode_to_worker(encode_to_worker(there)) == there
    with pytest.raises(RequestError, match=r"^the request has text that isn't unicode: .*; send whole characters$"):
        encode_to_worker(Submit(job=1, client="", requests=(asked(1, stop=("\ud800",)),)))


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EngramError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_cross_by_their_class(kind: type[EngramError]) -> None:
    there = ErrorNote.of(kind("what is wrong")).error()
    assert (type(there), str(there)) == (kind, "what is wrong")


@pytest.mark.parametrize("kind", [BusyError, UnavailableError])
def test_errors_cross_with_when_to_come_again(kind: type[BusyError]) -> None:
    there = ErrorNote.of(kind("full", 2.5)).error()
    assert isinstance(there, kind)
    assert (str(there), there.retry_after_s) == ("full", 2.5)


def test_what_a_socket_does_not_take_at_once_is_sent_in_its_order() -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    with ours, theirs:
        writer = FrameWriter(theirs)
        frames = [bytes([place % 251]) * (1000 * place) for place in range(50)]
        for frame in frames:
            writer.put(frame)
        assert writer.unsent_bytes > 0
        reader = FrameReader(ours)
        received: list[bytes] = []
        while len(received) < len(frames):
            received += reader.receive(5.0)
        assert received == frames
        writer.close(1.0)
        with pytest.raises(EOFError):
            reader.receive(1.0)
        writer.put(b"to nobody")


def test_the_process_has_no_secrets_and_says_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_API_KEY", "0123456789abcdef")
    worker = WorkerProcess((sys.executable, "-c", "import time; time.sleep(60)"), hidden=["ENGRAM_API_KEY"])
    environment = Path(f"/proc/{worker.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"ENGRAM_API_KEY" not in environment
    os.kill(worker.pid, signal.SIGSEGV)
    assert worker.end(5.0) == "was ended by signal 11 (segmentation fault)"
    assert WorkerProcess((sys.executable, "-c", "raise SystemExit(3)")).end(20.0) == "ended with code 3"
    assert WorkerProcess((sys.executable, "-c", "import time; time.sleep(60)")).end(0.0) == (
        "was ended by signal 9 (killed)"
    )


ORPHAN = """
import os, sys
from engram_runtime.serving.worker.process import WorkerProcess
worker = WorkerProcess()
print(worker.pid, flush=True)
sys.stdin.read()
"""


def test_a_worker_does_not_outlive_its_server() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        server.kill()
        server.wait()
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def test_a_bundle_that_is_not_there_is_refused_by_the_process(tmp_path: Path) -> None:
    settings = WorkerSettings(path=tmp_path / "none.engram", executor="tvm", slots=1, queue=1)
    with pytest.raises(BundleError, match=r"none.engram"):
        RemoteEngine(toy_bundle(POSITIONAL), toy_tokenizer(), settings, WorkerProcess)
