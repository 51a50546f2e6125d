"""The program of a worker: ``python -m engram_runtime.serving.worker.child DESCRIPTOR``, of its end of a socket."""

import contextlib
import ctypes
import faulthandler
import functools
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import click

from engram_runtime.command_line import show_warning
from engram_runtime.commands.announcing import announce_table
from engram_runtime.errors import BundleError, EngramError
from engram_runtime.serving.engine_protocol import Engine
from engram_runtime.serving.figures import StepFigures
from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.serving.worker.answering import Answering
from engram_runtime.serving.worker.frames import FrameReader, FrameWriter, ProtocolError
from engram_runtime.serving.worker.messages import ErrorNote, Open, Refused, decode_to_worker, encode_from_worker
from engram_runtime.serving.worker.settings import WorkerSettings

FLUSH_S = 1.0
WAIT_S = 3600.0
PR_SET_PDEATHSIG = 1
OOM_SCORE = "500"  # the kernel ends the worker before the server, which can start it anew
OOM_SCORE_FILE = Path("/proc/self/oom_score_adj")
# As the engine's thread is to wait no longer than needed for those that read and write; see `server/run.py`.
SWITCH_INTERVAL_S = 0.0005

Watch = Callable[[StepFigures], None]
OpenBundle = Callable[[WorkerSettings, Watch], AbstractContextManager[Engine]]


def main() -> None:
    """Run until the server closes the socket."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    faulthandler.enable()
    warnings.showwarning = functools.partial(show_warning, "engram")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    end_with_server()
    sys.exit(run_worker(connection, open_bundle))


def run_worker(connection: socket.socket, opening: OpenBundle) -> int:
    """Open the bundle that the server names and answer for it; returns an exit code."""
    reader, writer = FrameReader(connection), FrameWriter(connection)
    try:
        return _answer(reader, writer, opening)
    except EOFError:  # the server has left before it said what to open
        return 0
    except EngramError as error:
        writer.put(encode_from_worker(Refused(job=None, error=ErrorNote.of(error))))
        return error.exit_code
    finally:
        writer.close(FLUSH_S)
        connection.close()


def _answer(reader: FrameReader, writer: FrameWriter, opening: OpenBundle) -> int:
    settings = _settings(reader)
    answering: Answering | None = None

    def watch(figures: StepFigures) -> None:
        if answering is not None:  # an engine makes no pass before it is asked
            answering.watch(figures)

    try:
        opened = opening(settings, watch)
        with opened as engine:
            answering = Answering(engine, writer)
            answering.serve(reader)
            return 0 if engine.failure is None else 1
    except OSError as error:
        raise BundleError(f"{error.strerror}: {error.filename}" if error.filename else str(error)) from error


@contextlib.contextmanager
def open_bundle(settings: WorkerSettings, watch: Watch) -> Iterator[Engine]:
    """Yield the engine that settings are of; its tables are announced on stderr."""
    options = EngineOptions(slots=settings.slots, queue=settings.queue, tables_on=settings.tables_on, watch=watch)
    with (
        click.Context(click.Command("engram")).scope(),  # which progress bars end with
        open_engine(
            settings.path,
            settings.executor,
            options=options,
            threads=settings.threads,
            target=settings.target,
            tables=settings.tables,
            drafts=settings.drafts,
            announce=announce_table,
            trust=settings.trust,
        ) as engine,
    ):
        yield engine


def _settings(reader: FrameReader) -> WorkerSettings:
    while not (frames := reader.receive(WAIT_S)):
        pass
    message = decode_to_worker(frames[0])
    if not isinstance(message, Open):
        raise ProtocolError(f"the first message is {message.kind!r}, wanted a bundle to open")
    return message.settings


def end_with_server() -> None:
    """Leave signals to the server, but end when it does, however it does; be the one that lack of memory ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):  # some containers don't let it be written
        OOM_SCORE_FILE.write_text(OOM_SCORE, encoding="ascii")


if __name__ == "__main__":
    main()
