"""A server of engines in a thread of its own, on a free port."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence

from engram_runtime.server.access import Access, access_for
from engram_runtime.server.app import create_app
from engram_runtime.server.metrics import Metrics
from engram_runtime.server.models import Models
from engram_runtime.server.run import listen, make_server
from engram_runtime.serving.engine_protocol import Engine

LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def served(*engines: Engine, loading: Sequence[str] = (), access: Access | None = None) -> Iterator[str]:
    """Serve engines, with the names of others that are still loading; yields the address, ``http://127.0.0.1:PORT``."""
    models = Models([*(engine.name for engine in engines), *loading], created=int(time.time()))
    models.engines.update({engine.name: engine for engine in engines})
    server = make_server(create_app(models, access or access_for(LOOPBACK, []), Metrics(models)))
    listener = listen(LOOPBACK, 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def raw_answer(url: str, sent: bytes) -> bytes:
    """Send bytes to a server and return all it sends until it closes the connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65536), b""))
