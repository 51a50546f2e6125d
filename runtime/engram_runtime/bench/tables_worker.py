"""Times look-ups in a process of its own: requests come as JSON lines on stdin, answers go as JSON lines to stdout.

    {"do": "load", "model": "x.engram", "site": .., "executor": .., "options": {..}}  ->  what is measured
    {"do": "evict"}                                                                   ->  {"stayed": 0.0}
    {"do": "fill", "num_bytes": ..}                                                   ->  {}
    {"do": "round", "state": "cold", "seed": 1, "tokens": 2048, "depth": 64}          ->  seconds by name

An error a user can act on is answered by {"error": class, "message": text}.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from engram_runtime.bench.tables_runner import TableRunner, load
from engram_runtime.errors import EngramError

Answer = Mapping[str, Any]
Requests = Mapping[str, Callable[..., Answer]]


class TableRequests:
    """What can be asked, by name."""

    def __init__(self) -> None:
        self._runner: TableRunner | None = None

    def __call__(self, do: str, **details: Any) -> Answer:
        """Do what is asked and return the answer; ``load`` comes first."""
        if do == "load":
            self._runner = load(**details)
            return self._runner.facts
        assert self._runner is not None
        measurements: Requests = {
            "evict": self._runner.evict,
            "fill": self._runner.fill,
            "round": self._runner.round,
        }
        return measurements[do](**details)


def serve(answer: Callable[..., Answer]) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get among the answers
    for line in sys.stdin:
        try:
            found = answer(**json.loads(line))
        except EngramError as error:
            found = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    serve(TableRequests())
