"""The parent's side of a runner: a process that is asked and answers, one line of JSON each."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engram_runtime import errors
from engram_runtime.errors import EngramError, TargetError

# -P: its folder must not come before the installed packages. By its path: -m would import engram_runtime first.
WORKER = (sys.executable, "-P", str(Path(__file__).with_name("worker.py")))


REBUILD = (
    "gcc 12 miscompiles it for CPUs with AMX: build it by another compiler, with clang: "
    "CC=clang CXX=clang++ pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python"
)
HINTS = {("llama.cpp", -signal.SIGILL): REBUILD}  # by runner and exit code


class Worker:
    """A process that measures; close it, best by ``with``."""

    def __init__(self, name: str, command: Sequence[str] = WORKER) -> None:
        """Start it.

        Args:
            name: what errors call it.
            command: a program that speaks the protocol of `engram_runtime.bench.worker`.
        """
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            process_group=0,  # Ctrl-C is for the parent, which ends it
        )

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """Have something done and return the answer.

        Raises:
            EngramError: the one that the process answered with.
            TargetError: the process ended instead of answering.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **details}) + "\n")
        except BrokenPipeError:
            raise self._ended(what) from None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):  # nothing, or an answer cut short
            raise self._ended(what)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind: type[EngramError] = getattr(errors, answer["error"])
            raise kind(answer["message"])
        return answer

    def _ended(self, what: str) -> TargetError:
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        advice = HINTS.get((self.name, code), "what it printed stands above")
        return TargetError(f"{self.name} {how} during {what}; {advice}")

    def close(self) -> None:
        """End the process and wait for it."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()  # it may be amid a measurement that nobody waits for any more
        self.close()
