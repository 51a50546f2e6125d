"""The process of a worker: started anew each time, never forked from one that has threads."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import Protocol

STDERR = 2
# Without -P a folder the server is started in could hold modules that are taken for others.
COMMAND = (sys.executable, "-P", "-m", "engram_runtime.serving.worker.child")


class Worker(Protocol):
    """Something at the other end of a socket; a process, but for tests."""

    @property
    def connection(self) -> socket.socket: ...

    def end(self, patience_s: float) -> str:
        """Have it end, by force where it hasn't by itself after so long; returns how it did, as often as it is asked.

        For one thread at a time.
        """
        ...


class WorkerProcess:
    """A process that waits for the name of a bundle.

    Attributes:
        connection: to it.
        pid: its number.
    """

    def __init__(self, command: Sequence[str] = COMMAND, *, hidden: Collection[str] = ()) -> None:
        """Start it.

        Args:
            command: is given one argument more, the descriptor of its socket.
            hidden: variables of the environment that it doesn't get.
        """
        self.connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=STDERR,
                pass_fds=[theirs.fileno()],
                env={name: value for name, value in os.environ.items() if name not in hidden},
                process_group=0,  # Ctrl-C in a terminal is for the server, which lets answers end
            )
        self.pid = self._process.pid

    def end(self, patience_s: float) -> str:
        """See `Worker.end`."""
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()
        return _told(self._process.returncode)

    def close(self) -> None:
        """Have it end now."""
        with contextlib.suppress(OSError):  # it may have been closed, or have lost its other end
            self.connection.shutdown(socket.SHUT_RDWR)
        self.end(0.0)


def _told(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with code {returncode}"
    name = signal.strsignal(-returncode) or "unknown"
    return f"was ended by signal {-returncode} ({name.lower()})"
