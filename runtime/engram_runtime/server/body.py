"""Bodies of requests, counted as they come."""

from starlette.requests import Request

from engram_runtime.openai_api.errors import TOO_LARGE, ApiError
from engram_runtime.server.limits import MAX_BODY_BYTES


async def read_body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        ApiError: it has more than ``MAX_BODY_BYTES``, whatever its headers say.
        ClientDisconnect: the client went away before its end.
    """
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    pieces: list[bytes] = []
    size = 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        pieces.append(piece)
    return b"".join(pieces)


def _too_large() -> ApiError:
    return ApiError(
        f"the body has more than {MAX_BODY_BYTES} bytes; shorten it", status=TOO_LARGE, code="request_too_large"
    )
