"""Run the application on a socket until a signal comes."""

import signal
import socket
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from engram_runtime.errors import RequestError
from engram_runtime.server.limits import DRAIN_S, KEEP_ALIVE_S, MAX_CONNECTIONS, MAX_HEADER_BYTES
from engram_runtime.server.protocol import DeadlineProtocol

BACKLOG = 1024


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
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            limit_concurrency=MAX_CONNECTIONS,
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
    except OSError as error:
        raise RequestError(f"can't listen at {host} port {port}: {error.strerror}; choose another one") from error
    listener.listen(BACKLOG)
    return listener
