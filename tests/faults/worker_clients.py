"""Clients of a server whose worker dies: what they may be told, and how soon."""

import http.client
import json
import os
import threading
import time
from dataclasses import dataclass, field
from random import Random
from typing import Any, Self

PATH = "/v1/completions"
LONGEST_S = 5.0  # for any answer, and for a new worker
BUSY = 2.0  # programs that want each core, above which others share in what is measured here
PAUSE_S, AWAY_PAUSE_S = 0.02, 0.2  # between requests: after a text, and where there was none
LOST, AWAY = (502, "worker_died"), (503, "model_restarting")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: status, the text or the code of the error, and after how long."""

    status: int
    told: str
    seconds: float
    retry_after: str | None = None

    @property
    def kind(self) -> tuple[int, str]:
        """Status and code."""
        return self.status, self.told


def longest_s() -> float:
    """Return `LONGEST_S`, stretched by how much more others ask of this machine than it has."""
    return LONGEST_S * max(1.0, os.getloadavg()[0] / (BUSY * (os.cpu_count() or 1)))


def ask(url: str, prompt: list[int], *, max_tokens: int = 8, seed: int = 1) -> Answer:
    """Ask for a text and wait for it."""
    began = time.monotonic()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        body = {"model": "toy", "prompt": prompt, "max_tokens": max_tokens, "seed": seed}
        connection.request("POST", PATH, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        raw: dict[str, Any] = json.loads(answer.read())
    finally:
        connection.close()
    told = raw["choices"][0]["text"] if answer.status == 200 else str(raw["error"]["code"])
    return Answer(answer.status, told, time.monotonic() - began, answer.getheader("retry-after"))


@dataclass
class Others:
    """Clients that go on asking in threads of their own, by ``with``.

    Attributes:
        texts: of prompts, which must stay what they are.
        counts: of answers by status.
        failures: what none should have been told.
        slowest_s: the longest any waited.
    """

    url: str
    count: int = 3
    texts: dict[int, str] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        for first in range(1, 7):
            self.texts[first] = ask(self.url, [first, 2, 3]).told
        self._threads = [threading.Thread(target=self._ask_on, args=(place,)) for place in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, place: int) -> None:
        chance = Random(place)
        while not self._ended.wait(PAUSE_S):
            first = chance.randrange(1, 7)
            try:
                answer = ask(self.url, [first, 2, 3])
            except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
                self._note(0, 0.0, f"{error!r} instead of an answer")
                continue
            self._note(answer.status, answer.seconds, self._fault(first, answer))
            if answer.status != 200:
                self._ended.wait(AWAY_PAUSE_S)

    def _note(self, status: int, seconds: float, fault: str) -> None:
        with self._lock:
            self.counts[status] = self.counts.get(status, 0) + 1
            self.slowest_s = max(self.slowest_s, seconds)
            if fault:
                self.failures.append(fault)

    def _fault(self, first: int, answer: Answer) -> str:
        """Return what is wrong with an answer, nothing if it is good."""
        if answer.seconds > longest_s():
            return f"a client waited {answer.seconds:.1f} s"
        if answer.status == 200:
            return "" if answer.told == self.texts[first] else f"prompt {first} has another text: {answer.told!r}"
        if answer.kind == AWAY:
            return "" if answer.retry_after else "503 without Retry-After"
        return "" if answer.kind == LOST else f"a client was told {answer.kind}"
