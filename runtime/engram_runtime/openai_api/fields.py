"""What fields of several bodies have in common: strict types, bounds, and errors that name the field."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engram_runtime.openai_api.errors import ApiError

MAX_TOKEN_ID = 2**31 - 1
MAX_NAME_CHARS = 256
SHOWN_CHARS = 60

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[
    list[TokenId], Field(fail_fast=True)
]  # else each of a hundred thousand wrong ones is an error of its own


class Fields(BaseModel):
    """An object of a request: no value is converted, no number is infinite, no key is unknown."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Body(Fields):
    """A whole request.

    ``IGNORED`` fields may hold anything: they don't change the answer. ``REFUSED`` ones would; their text says what
    to do. Null counts as not given.
    """

    IGNORED: ClassVar[frozenset[str]] = frozenset()
    REFUSED: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> Self:
        """Check the values of a JSON object; raises ApiError naming the first field that is wrong."""
        given = {name: value for name, value in raw.items() if value is not None and name not in cls.IGNORED}
        for name in given.keys() & cls.REFUSED.keys():
            raise ApiError(f"{name} is not supported; {cls.REFUSED[name]}", param=name, code="unsupported_parameter")
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise _api_error(first["type"], _place(first["loc"]), first["msg"], first["input"]) from error


def _api_error(kind: str, place: str, message: str, value: object) -> ApiError:
    match kind:
        case "missing":
            return ApiError(f"{place} is missing", param=place, code="missing_required_parameter")
        case "extra_forbidden":
            return ApiError(f"{place} is not a field that is known here", param=place, code="unknown_parameter")
    reason = message.removeprefix("Value error, ").replace("Input should be", "wanted")
    if not place:  # fields that don't fit each other
        return ApiError(reason, code="invalid_value")
    shown = repr(value)
    shown = shown if len(shown) <= SHOWN_CHARS else f"{shown[:SHOWN_CHARS]}..."
    return ApiError(f"{place} is {shown}, {reason[:1].lower()}{reason[1:]}", param=place, code="invalid_value")


def _place(location: tuple[int | str, ...]) -> str:
    """Spell a place as OpenAI does: ``messages[0].role``; what pydantic adds of unions is left out."""
    place = ""
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier() and part != "str" and not part[0].isupper():
            place += f".{part}" if place else part
    return place


def _strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


MAX_STOP, MAX_STOP_CHARS = 8, 256
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
SeveralStops = Annotated[list[StopString], Field(max_length=MAX_STOP)]
StopStrings = Annotated[SeveralStops, BeforeValidator(_strings, json_schema_input_type=StopString | SeveralStops)]
