"""JSON of clients, read strictly and with bounds."""

import re
from typing import Any

from engram_runtime.errors import BundleError
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.strict_json import parse_json_object

MAX_DEPTH = 64
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_body(text: bytes | str, where: str = "the body") -> dict[str, Any]:
    """Return the object a text is.

    Args:
        where: how errors call the text.

    Raises:
        ApiError: not JSON, not an object, a key twice, more than ``MAX_DEPTH`` levels, or half a surrogate pair.
    """
    try:
        body = parse_json_object(text, where)
    except BundleError as error:
        raise ApiError(f"{error}; send a JSON object in UTF-8", code="invalid_json") from error
    _check_values(body, where)
    return body


def _check_values(body: dict[str, Any], where: str) -> None:
    level: list[object] = [body]
    for _ in range(MAX_DEPTH):
        level = [part for value in level for part in _parts(value, where)]
    if level:
        raise ApiError(f"{where} is nested more than {MAX_DEPTH} levels deep; flatten it", code="invalid_json")


def _parts(value: object, where: str) -> list[object]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, str) and LONE_SURROGATE.search(value):
        raise ApiError(f"{where} has half of a surrogate pair, wanted whole characters", code="invalid_json")
    return value if isinstance(value, list) else []
