"""Run the application on a socket until a signal comes."""

import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from engram_runtime.errors import RequestError
from engram_runtime.server.access import Access
from engram_runtime.server.app import create_app
from engram_runtime.server.limits import DRAIN_S, KEEP_ALIVE_S, MAX_HEADER_BYTES
from engram_runtime.server.loading import Loader
from engram_runtime.server.metrics import Metrics
from engram_runtime.server.models import Models
from engram_runtime.server.protocol import DeadlineProtocol
from engram_runtime.serving.engine_protocol import Engine

BACKLOG = 1024
# Python's 5 ms cost a text 13 % of its speed while bodies of a megabyte were read in other threads.
SWITCH_INTERVAL_S = 0.0005

OpenModel = Callable[[str, Callable[[float], None]], AbstractContextManager[Engine]]
"""Opens the engine of a name; it is to tell the seconds of its passes."""


def serve_models(
    listener: socket.socket,
    names: Collection[str],
    open_model: OpenModel,
    access: Access,
    *,
    loaded: Callable[[], None],
) -> None:
    """Serve until a signal comes, from before the models are loaded on; ``loaded`` is called when they are.

    Raises:
        EngramError, OSError: a model can't be opened.
    """
    models = Models(names, int(time.time()))
    metrics = Metrics(models)
    server = make_server(create_app(models, access, metrics))
    openings = {name: partial(open_model, name, partial(metrics.note_pass, name)) for name in names}

    def done() -> None:
        if loader.error is None:
            loaded()
        else:
            server.should_exit = True

    loader = Loader(models, openings, done)
    with loader, _quick_switches():
        server.run(sockets=[listener])
    if loader.error is not None:
        raise loader.error


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Have a thread that computes in Python give way to the engines' sooner."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Server(uvicorn.Server):
    """Ends normally where a signal asked for it, its answers under way finished; a second Ctrl-C cuts them off."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def make_server(app: ASGIApp) -> Server:
    """Return a server that hasn't begun."""
    return Server(
        uvicorn.Config(
            app,
            http=DeadlineProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",  # its warnings are of what clients do wrong
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
        )
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        RequestError: the address can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except UnicodeError as error:
        raise RequestError(f"can't listen at {host!r}, which is no name of a host; choose another one") from error
    except OSError as error:
        raise RequestError(f"can't listen at {host} port {port}: {error.strerror}; choose another one") from error
    listener.listen(BACKLOG)
    return listener
