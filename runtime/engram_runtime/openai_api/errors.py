"""Errors in OpenAI's shape."""

from typing import Any

from engram_runtime.errors import EngramError, LengthError, NumericError, RequestError
from engram_runtime.serving.engine_protocol import BusyError, EngineError, UnavailableError, WorkerError

BAD_REQUEST, UNAUTHORISED, NOT_FOUND, TOO_LARGE, TOO_MANY = 400, 401, 404, 413, 429
INTERNAL, BAD_GATEWAY, UNAVAILABLE = 500, 502, 503
TYPES = {
    TOO_MANY: "rate_limit_error",
    INTERNAL: "server_error",
    BAD_GATEWAY: "server_error",
    UNAVAILABLE: "server_error",
}


class ApiError(EngramError):
    """A request that isn't answered.

    Attributes:
        status: of HTTP.
        param: the field that is at fault.
        code: for programs, such as ``context_length_exceeded``.
        retry_after_s: when asking again may help.
    """

    exit_code = RequestError.exit_code

    def __init__(
        self,
        message: str,
        *,
        status: int = BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return what is sent of it, as JSON values."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: EngramError) -> ApiError:
    """Return what a client is told of an error of the engine."""
    match error:
        case ApiError():
            return error
        case BusyError():
            return ApiError(str(error), status=TOO_MANY, code="rate_limit_exceeded", retry_after_s=error.retry_after_s)
        case UnavailableError():
            return ApiError(str(error), status=UNAVAILABLE, code="model_restarting", retry_after_s=error.retry_after_s)
        case WorkerError():
            return ApiError(str(error), status=BAD_GATEWAY, code="worker_died")
        case LengthError():
            return ApiError(str(error), code="context_length_exceeded")
        case RequestError():
            return ApiError(str(error))
        case NumericError():
            return ApiError(str(error), status=INTERNAL, code="numeric_error")
        case EngineError():
            return ApiError(str(error), status=UNAVAILABLE, code="engine_failed")
        case _:
            return ApiError(str(error), status=INTERNAL, code=type(error).__name__)
