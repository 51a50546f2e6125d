"""Messages of any size between two processes: their length in 4 bytes, then so many bytes."""

import contextlib
import socket
import struct
import threading
from collections import deque

from engram_runtime.errors import EngramError

MAX_FRAME_BYTES = 16 << 20  # 64 prompts of 32 thousand tokens; a finished text of as many is a fortieth
READ_BYTES = 64 << 10
LENGTH = struct.Struct("<I")
TIMEVAL = struct.Struct("@ll")


class ProtocolError(EngramError):
    """The other process sent what it never should."""


class FrameReader:
    """Reads frames from a connected socket; for one thread."""

    def __init__(self, connection: socket.socket) -> None:
        """Begin at a frame's first byte."""
        self._connection = connection
        self._timeout_s = 0.0
        self._received = memoryview(bytearray(READ_BYTES))
        self._buffer = bytearray()

    def receive(self, timeout_s: float) -> list[bytes]:
        """Return the frames that have come, none where none was whole within the time, more than 0.

        Raises:
            EOFError: the other side has closed the connection, or died.
            ProtocolError: a frame is longer than `MAX_FRAME_BYTES`.
        """
        if timeout_s != self._timeout_s:  # by the socket itself, as the reader is woken once a token
            self._timeout_s = timeout_s
            seconds, microseconds = divmod(round(timeout_s * 1e6), 1_000_000)
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEVAL.pack(seconds, microseconds))
        try:
            count = self._connection.recv_into(self._received)
        except BlockingIOError:
            return []
        except ConnectionError as error:
            raise EOFError from error
        if not count:
            raise EOFError
        self._buffer += self._received[:count]
        return self._whole_frames()

    def _whole_frames(self) -> list[bytes]:
        frames, start = [], 0
        while len(self._buffer) - start >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer, start)
            if size > MAX_FRAME_BYTES:
                raise ProtocolError(f"a message has {size} bytes, wanted at most {MAX_FRAME_BYTES}")
            end = start + LENGTH.size + size
            if end > len(self._buffer):
                break
            frames.append(bytes(self._buffer[start + LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return frames


class FrameWriter:
    """Sends frames, from any thread, without ever making the caller wait; nothing happens once the other side is gone.

    What the socket doesn't take at once is kept and sent by a thread.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Send over a connected socket, which stays the caller's."""
        self._connection = connection
        self._changed = threading.Condition()
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._ended = False
        self._thread = threading.Thread(target=self._send_rest, name="frames", daemon=True)
        self._thread.start()

    @property
    def unsent_bytes(self) -> int:
        """How much is kept."""
        return self._unsent_bytes

    def put(self, frame: bytes) -> None:
        """Send a frame after those before it."""
        data = LENGTH.pack(len(frame)) + frame
        with self._changed:
            if self._ended:
                return
            if not self._unsent:
                data = self._send_now(data)
            if data:
                self._unsent.append(data)
                self._unsent_bytes += len(data)
                self._changed.notify_all()

    def close(self, timeout_s: float) -> None:
        """Wait until all is sent, as long as may be, and end; the other side reads the end of the connection."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._unsent, timeout_s)
            self._end()
        with contextlib.suppress(OSError):  # it may be gone; this also wakes a thread that waits for it
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _send_now(self, data: bytes) -> bytes:
        """Send what the socket takes without waiting and return the rest."""
        try:
            return data[self._connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except BlockingIOError:
            return data
        except OSError:
            self._end()
            return b""

    def _send_rest(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._unsent)
                if self._ended:
                    return
                data = self._unsent[0]
            try:
                self._connection.sendall(data, socket.MSG_NOSIGNAL)
            except OSError:
                data = b""
            with self._changed:
                if not data:
                    self._end()
                if self._unsent:
                    self._unsent_bytes -= len(self._unsent.popleft())
                self._changed.notify_all()

    def _end(self) -> None:
        self._ended = True
        self._unsent.clear()
        self._unsent_bytes = 0
        self._changed.notify_all()
