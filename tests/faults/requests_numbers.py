"""Row D2: every number a request may have, with values at and beyond its range."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp
from tests.faults.requests_asgi import Answered, Asked, ask, fault_of, running, toy_app
from tests.faults.requests_mutations import CHAT, COMPLETIONS, DETOKENIZE, SHORT_CHAT
from tests.faults.requests_toy import CONTEXT, VOCAB
from tests.faults.row import Outcome, Row

from engram_runtime.server.openapi import BODIES

INTEGER, NUMBER = "integer", "number"
# As they stand in the body: some can't be said otherwise.
VALUES = (
    *("-1", "-2", "0", "1", "2", "3", "5", "21", "100.5", "0.5", "1.0", "-0.0", "1e-320", "2.0000001", "-2.0000001"),
    *("32768", "2147483647", "2147483648", "4294967296", "9007199254740993", "9223372036854775807"),
    *("9223372036854775808", "-9223372036854775809", "18446744073709551616", "1e30", "1e308", "-1e308", "1e400"),
    *("NaN", "Infinity", "-Infinity", "true", "false", '"1"', '""', "[]", "[1]", "{}", "9" * 5000),
)


@dataclass(frozen=True, slots=True)
class Range:
    """What a field takes; written down here apart from the models, which are what is tested.

    Attributes:
        place: names down to the field, ``[]`` for the items of a list.
        integer: whether a number with a decimal point is refused.
        else_taken: values that aren't numbers and are taken too.
    """

    path: str
    place: tuple[str, ...]
    low: float
    high: float
    integer: bool = True
    else_taken: tuple[str, ...] = ()

    def takes(self, value: str) -> bool:
        """Whether a value, as JSON spells it, is to be taken."""
        if value in self.else_taken:
            return True
        try:
            number = json.loads(value)
        except ValueError:  # digits beyond what Python reads
            return False
        sort = int if self.integer else (int, float)
        return type(number) is not bool and isinstance(number, sort) and self.low <= number <= self.high

    def body(self, value: str) -> bytes:
        """Return a sound body but for this field."""
        base: Any = {CHAT: SHORT_CHAT, DETOKENIZE: {"model": "toy"}}.get(self.path) or COMPLETION
        *parents, name = self.place
        inner: Any = {name: "VALUE"} if name != "[]" else ["VALUE"]
        for parent in reversed(parents):
            inner = {parent: inner}
        more = {"logprobs": True} if name == "top_logprobs" else {}
        return json.dumps({**base, **inner, **more}).replace('"VALUE"', value).encode()


COMPLETION: Any = {"model": "toy", "prompt": "Hi", "max_tokens": 1}
BOTH = [
    (("max_tokens",), 1, CONTEXT, True),
    (("temperature",), 0, 2, False),
    (("top_p",), 0, 1, False),
    (("top_k",), 0, 1 << 20, True),
    (("min_p",), 0, 1, False),
    (("repetition_penalty",), 0.01, 100, False),
    (("seed",), -(2**63), 2**63 - 1, True),
    (("frequency_penalty",), -2, 2, False),
    (("presence_penalty",), -2, 2, False),
    (("logit_bias", "97"), -100, 100, False),
    (("n",), 1, 4, True),
]
RANGES = [
    *(Range(path, place, low, high, integer) for path in (CHAT, COMPLETIONS) for place, low, high, integer in BOTH),
    Range(CHAT, ("max_completion_tokens",), 1, CONTEXT),
    Range(CHAT, ("top_logprobs",), 0, 20),
    Range(COMPLETIONS, ("logprobs",), 0, 5),
    Range(
        COMPLETIONS, ("prompt", "[]"), 0, VOCAB - 1, else_taken=('"1"', "[1]")
    ),  # a text, and token ids, among several prompts
    Range(DETOKENIZE, ("tokens", "[]"), 0, VOCAB - 1),
]


def numbers(count: int) -> Outcome:
    """Send ``count`` values of each field, and check that no field was forgotten."""
    failures = [f"{path} {'.'.join(place)} has no range here" for path, place in sorted(_fields() - _known())]
    cases = [(known, value) for known in RANGES for value in VALUES[:count]]
    with toy_app() as app:
        failures += asyncio.run(_faults(app, cases))
    figure = f"{len(RANGES)} fields x {len(VALUES[:count])} values"
    return Outcome(tried=len(cases), survived=len(cases) - len(failures), figure=figure, failures=tuple(failures[:10]))


async def _faults(app: ASGIApp, cases: list[tuple[Range, str]]) -> list[str]:
    async with running(app):
        return [fault for known, value in cases if (fault := await _fault(app, known, value)) is not None]


async def _fault(app: ASGIApp, known: Range, value: str) -> str | None:
    asked = Asked(method="POST", path=known.path, body=known.body(value))
    answered = await ask(app, asked)
    wanted = 200 if known.takes(value) else 400
    fault = fault_of(asked, answered) or (None if answered.status == wanted else _shown(answered, wanted))
    return fault and f"{known.path} {'.'.join(known.place)} = {value[:30]}: {fault}"


def _shown(answered: Answered, wanted: int) -> str:
    return f"status {answered.status}, wanted {wanted}: {answered.body[:200]!r}"


def _known() -> set[tuple[str, tuple[str, ...]]]:
    return {(known.path, ("logit_bias",) if known.place[0] == "logit_bias" else known.place) for known in RANGES}


def _fields() -> set[tuple[str, tuple[str, ...]]]:
    """Return the places of all numbers that bodies may have, by the models that check them."""
    return {(path, place) for path, body in BODIES.items() for place in _numbers(body.model_json_schema())}


def _numbers(schema: Any) -> Iterator[tuple[str, ...]]:
    for name, field in schema["properties"].items():
        yield from ((name, *place) for place in _kinds(field, schema.get("$defs", {})))


def _kinds(schema: Any, defined: Any) -> Iterator[tuple[str, ...]]:
    """Yield the places of numbers within a value, ``[]`` for the items of a list."""
    if schema.get("type") in (INTEGER, NUMBER):
        yield ()
    for alternative in schema.get("anyOf", ()):
        yield from _kinds(alternative, defined)
    if schema.get("type") == "array":
        yield from {("[]",) for place in _kinds(schema["items"], defined) if place in ((), ("[]",))}
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _kinds(schema["additionalProperties"], defined)
    if "$ref" in schema:
        inner = defined[schema["$ref"].rpartition("/")[2]]
        for name, field in inner.get("properties", {}).items():
            yield from ((name, *place) for place in _kinds(field, defined))


ROWS = (
    Row(
        name="D2",
        fault="values at and beyond the range of every number of a request",
        expected="400 outside, 200 inside; no number of the models left out",
        quick=len(VALUES),
        full=len(VALUES),
        run=numbers,
    ),
)
