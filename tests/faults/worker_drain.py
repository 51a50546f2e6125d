"""D8: a server is told to end while it answers."""

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import NoReturn

from tests.faults import worker_toy
from tests.faults.row import Outcome, Row
from tests.faults.worker_clients import PATH
from tests.toy_model import CONTEXT
from tests.toy_serving import END

from engram_runtime.server.access import access_for
from engram_runtime.server.run import listen, serve_models
from engram_runtime.serving.worker.child import run_worker

HOST = "127.0.0.1"
LONGEST_S = 10.0
CLIENTS = 8  # four of which wait for a place
AT_ONCE = 4  # servers
SLOW_EVERY = 10  # servers, of which one has texts that would take half a minute
SLOW_PASS_S = 1.0
HALF_A_REQUEST = f"POST {PATH} HTTP/1.1\r\nhost: {HOST}\r\ncontent-le".encode()


class ForkedWorker:
    """A worker that is forked from this program while it has no threads: a hundredth of the work of a start."""

    def __init__(self, pass_s: float) -> None:
        self.connection, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            worker_toy.PASS_S = pass_s
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os._exit(run_worker(theirs, worker_toy.open_toy))
        theirs.close()

    def end(self, patience_s: float) -> str:
        self.connection.close()
        return "has ended"


@dataclass
class Trial:
    """A server with a worker, both processes of their own, and clients.

    Attributes:
        address: where it listens.
        slow: whether no text can end before the server has to.
        faults: what went otherwise than it must.
        whole, cut: streams that were told to their end, and those that weren't.
    """

    address: str
    server: int
    worker: int
    slow: bool
    faults: list[str] = field(default_factory=list)
    whole: int = 0
    cut: int = 0

    @classmethod
    def started(cls, slow: bool) -> "Trial":
        """Fork a worker and its server; to be called while there are no threads."""
        worker = ForkedWorker(SLOW_PASS_S if slow else worker_toy.PASS_S)
        with listen(HOST, 0) as listener, worker.connection:
            address = f"{HOST}:{listener.getsockname()[1]}"
            server = os.fork()
            if server == 0:
                _serve(listener, worker)
        return cls(address, server, worker.pid, slow)

    def run(self, pause_s: float) -> float:
        """Ask, tell the server to end after a while, and return the seconds it took."""
        self._wait_until_ready()
        clients = [threading.Thread(target=self._read_stream, args=(seed,)) for seed in range(CLIENTS)]
        with socket.create_connection(tuple(self.address.split(":"))) as half:  # type: ignore[arg-type]
            half.sendall(HALF_A_REQUEST)
            for client in clients:
                client.start()
            time.sleep(pause_s)
            os.kill(self.server, signal.SIGTERM)
            took_s = self._wait_for_end()
        for client in clients:
            client.join()
        if self.cut and not self.slow:
            self.faults.append(f"{self.cut} streams were cut that had the time to end")
        return took_s

    def _wait_for_end(self) -> float:
        began = time.monotonic()
        code = _exit_code(self.server, LONGEST_S + 20)
        took_s = time.monotonic() - began
        if code != 0:
            self.faults.append(f"the server ended with {code}")
        if took_s > LONGEST_S:
            self.faults.append(f"the server took {took_s:.1f} s")
        if _exit_code(self.worker, 5.0) is None:
            self.faults.append("the worker has outlived its server")
        return took_s

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection(self.address, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.02)
        self.faults.append("the server didn't get ready")

    def _read_stream(self, seed: int) -> None:
        """Ask for a stream that ends with the context; what isn't taken any more is as it must be."""
        body = {"model": "toy", "prompt": [seed + 1], "max_tokens": CONTEXT - 1, "seed": seed, "stream": True}
        connection = http.client.HTTPConnection(self.address, timeout=30)
        try:
            connection.request("POST", PATH, json.dumps({**body, "logit_bias": {str(END): -100}}))
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException):
            connection.close()
            return
        try:
            whole = answer.status == 200 and answer.read().endswith(b"data: [DONE]\n\n")
        except (OSError, http.client.HTTPException):
            whole = False
        connection.close()
        self.whole, self.cut = self.whole + whole, self.cut + (not whole)


def _serve(listener: socket.socket, worker: ForkedWorker) -> NoReturn:
    """Be the server."""
    code = 1
    try:
        serve_models(
            listener,
            ["toy"],
            lambda name, note_pass: worker_toy.toy_engine(lambda: worker),
            access_for(HOST, []),
            loaded=lambda: None,
        )
        code = 0
    finally:
        os._exit(code)


def _exit_code(pid: int, timeout_s: float) -> int | None:
    """Wait for a process and return how it ended; None where it hasn't, which is ended then."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def told_to_end(count: int) -> Outcome:
    """D8: SIGTERM at a random moment of eight streams, half a request on another connection."""
    chance, took_s, ended = Random("D8"), list[float](), list[Trial]()
    while len(ended) < count:
        places = range(len(ended), min(len(ended) + AT_ONCE, count))
        trials = [Trial.started(place % SLOW_EVERY == SLOW_EVERY - 1) for place in places]
        pauses = [chance.random() * 0.5 for _ in trials]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            took_s += pool.map(Trial.run, trials, pauses)
        ended += trials
    failures = [f"server {place}: {'; '.join(trial.faults)}" for place, trial in enumerate(ended) if trial.faults]
    whole, cut = sum(trial.whole for trial in ended), sum(trial.cut for trial in ended)
    figure = f"ended after at most {max(took_s):.1f} s; {whole} streams whole, {cut} cut that would have taken longer"
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:5]))


ROWS = (
    Row(
        name="D8",
        fault="SIGTERM under load",
        expected="texts that can end do, exit 0 within 10 s, no process left",
        quick=20,
        full=200,
        run=told_to_end,
    ),
)
