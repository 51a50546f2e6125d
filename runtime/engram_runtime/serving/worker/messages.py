"""What the server and the process of an engine say to each other, as JSON: read strictly, by the types below."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from engram_runtime import errors
from engram_runtime.errors import EngramError, RequestError
from engram_runtime.serving import engine_protocol
from engram_runtime.serving.engine_protocol import STATUSES, BusyError, EngineError, Health, Load, UnavailableError
from engram_runtime.serving.events import Finished, Token
from engram_runtime.serving.figures import StepFigures
from engram_runtime.serving.request import TextRequest
from engram_runtime.serving.worker.frames import MAX_FRAME_BYTES, ProtocolError
from engram_runtime.serving.worker.settings import WorkerSettings

ERRORS = {
    name: kind
    for module in (errors, engine_protocol)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, EngramError)
}


def _require_finite(what: str, seconds: float | None) -> None:
    """Refuse what can't be written into a response."""
    if seconds is not None and not math.isfinite(seconds):
        raise ProtocolError(f"{what} is {seconds}, wanted a finite number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorNote:
    """An `EngramError`: the name of its class, its text, and what two of the classes have beside it."""

    name: str
    message: str
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        _require_finite("a time to come again", self.retry_after_s)

    @classmethod
    def of(cls, error: EngramError) -> Self:
        """Return the note of an error; one of a class that is unknown to others becomes an `EngineError`."""
        name = type(error).__name__
        retry_after_s = error.retry_after_s if isinstance(error, BusyError | UnavailableError) else None
        return cls(name=name if name in ERRORS else "EngineError", message=str(error), retry_after_s=retry_after_s)

    def error(self) -> EngramError:
        """Return the error again."""
        kind = ERRORS.get(self.name, EngineError)
        if issubclass(kind, BusyError | UnavailableError):
            return kind(self.message, self.retry_after_s or 0.0)
        return kind(self.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How the engine does, sent along with what changes it; ``passes`` are those since the last one."""

    load: Load
    health: Health
    passes: tuple[StepFigures, ...] = ()

    def __post_init__(self) -> None:
        if self.health.status not in STATUSES:
            raise ProtocolError(f"an engine is {self.health.status[:40]!r}, wanted one of {list(STATUSES)}")
        _require_finite("a time since when", self.health.since)


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """The first message: open this bundle; answered by `Opened` or `Refused`."""

    settings: WorkerSettings
    kind: Literal["open"] = "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Generate; answered by `Accepted` or `Refused`, and then told of text by text."""

    job: int
    client: str
    requests: tuple[TextRequest, ...]
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """See `engram_runtime.serving.engine_protocol.Ticket.cancel`."""

    job: int
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The bundle is open."""

    fingerprint: str
    state: State
    kind: Literal["opened"] = "opened"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The job is queued."""

    job: int
    state: State
    kind: Literal["accepted"] = "accepted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The job isn't taken; where there is none, the bundle can't be opened."""

    job: int | None
    error: ErrorNote
    kind: Literal["refused"] = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A text of a job has a token more."""

    job: int
    index: int
    token: Token
    kind: Literal["said"] = "said"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A text of a job has ended."""

    job: int
    index: int
    end: Finished
    state: State
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A text of a job has failed."""

    job: int
    index: int
    error: ErrorNote
    state: State
    kind: Literal["lost"] = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The process lives."""

    state: State
    kind: Literal["beat"] = "beat"


ToWorker = Open | Submit | Cancel
FromWorker = Opened | Accepted | Refused | Said | Ended | Lost | Beat

_CONFIG = ConfigDict(strict=True, ser_json_inf_nan="constants")
_TO_WORKER: TypeAdapter[Any] = TypeAdapter(Annotated[ToWorker, Field(discriminator="kind")], config=_CONFIG)
_FROM_WORKER: TypeAdapter[Any] = TypeAdapter(Annotated[FromWorker, Field(discriminator="kind")], config=_CONFIG)
# By itself, as it is written once a token; None as a dataclass alone takes no configuration.
_SAID: TypeAdapter[Any] = TypeAdapter(Said | None, config=_CONFIG)


def encode_to_worker(message: ToWorker) -> bytes:
    """Return a message as bytes; raises RequestError where it holds half a character, or too much."""
    return _encode(_TO_WORKER, message)


def decode_to_worker(frame: bytes) -> ToWorker:
    """Return what bytes say; raises ProtocolError where they are no such message."""
    message: ToWorker = _decode(_TO_WORKER, frame)
    return message


def encode_from_worker(message: FromWorker) -> bytes:
    """Return a message as bytes; see `encode_to_worker`."""
    return _encode(_SAID if isinstance(message, Said) else _FROM_WORKER, message)


def decode_from_worker(frame: bytes) -> FromWorker:
    """Return what bytes say; raises ProtocolError where they are no such message."""
    message: FromWorker = _decode(_FROM_WORKER, frame)
    return message


def _encode(adapter: TypeAdapter[Any], message: object) -> bytes:
    try:
        frame = adapter.dump_json(message)
    except ValueError as error:
        raise RequestError(f"the request has text that isn't unicode: {error}; send whole characters") from error
    if len(frame) > MAX_FRAME_BYTES:
        raise RequestError(f"the request makes a message of {len(frame)} bytes, wanted at most {MAX_FRAME_BYTES}")
    return frame


def _decode(adapter: TypeAdapter[Any], frame: bytes) -> Any:
    try:
        return adapter.validate_json(frame)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ProtocolError(f"a message can't be understood: {where}: {first['msg']}") from error
    except RequestError as error:
        raise ProtocolError(f"a message can't be understood: {error}") from error
