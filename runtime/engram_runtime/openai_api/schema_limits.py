"""Schemas whose grammars llguidance would take minutes and gigabytes to make, which its own limits let pass."""

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from engram_runtime.openai_api.errors import ApiError

COMBINING = {"allOf", "anyOf", "oneOf", "$ref"}  # by which a string may have to match patterns of several places
MAX_COMBINED = 6  # to intersect n patterns takes time and memory of 2**n: 10 take up to 16 s, 20 more than 2 GB
MAX_MULTIPLES = 10_000  # states of an automaton: 0.1 s, and 100 times as many 16 s


def check_schema(schema: Mapping[str, Any]) -> None:
    """Check that a grammar of a schema is made in about a second; raises ApiError."""
    parts = list(_parts(schema))
    patterns = {value for key, value in parts if key in ("pattern", "format") and isinstance(value, str)}
    combining = sorted({key for key, _ in parts} & COMBINING)
    if combining and len(patterns) > MAX_COMBINED:
        raise ApiError(
            f"a schema has {len(patterns)} different patterns and formats, and {', '.join(combining)}, by which one "
            f"string may have to match all of them; wanted at most {MAX_COMBINED} of them then",
            code="invalid_json_schema",
        )
    given = (value for key, value in parts if key == "multipleOf" and not isinstance(value, bool))
    multiples = [_whole(value) for value in given if isinstance(value, int | float)]
    if sum(multiples) > MAX_MULTIPLES or math.lcm(*multiples) > MAX_MULTIPLES:
        raise ApiError(
            f"the values of multipleOf in a schema, without decimal points, have a sum or a common multiple above "
            f"{MAX_MULTIPLES}; choose smaller ones",
            code="invalid_json_schema",
        )


def _parts(schema: object) -> Iterator[tuple[str, object]]:
    """Yield all keys and values of a schema and of what is within it."""
    if isinstance(schema, list):
        for item in schema:
            yield from _parts(item)
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            yield key, value
            yield from _parts(value)


def _whole(value: float) -> int:
    """Return a number without its decimal point."""
    exact = abs(Decimal(str(value))).normalize()
    return int(exact.scaleb(max(0, -int(exact.as_tuple().exponent))))
