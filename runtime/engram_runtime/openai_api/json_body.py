"""JSON of clients, read strictly and with bounds."""

import re
from collections.abc import Iterator
from typing import Any

from engram_runtime.errors import BundleError
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.strict_json import parse_json_object

MAX_DEPTH = 64
MAX_KEYS = 4096  # of an object; each unknown one is an error that takes half a kilobyte
MAX_CONTAINERS = 32_768  # objects and lists; 300 000 take half a second to read, in which other threads hardly run
STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # one that doesn't end goes to the end: linear in any case
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_body(body: bytes | str, where: str = "the body") -> dict[str, Any]:
    """Return the object a text is.

    Args:
        where: how errors call the text.

    Raises:
        ApiError: not UTF-8, not JSON, not an object, a key twice, an object of more than ``MAX_KEYS`` keys, more than
            ``MAX_DEPTH`` levels or ``MAX_CONTAINERS`` objects and lists, or half a surrogate pair.
    """
    try:
        text = body if isinstance(body, str) else body.decode("utf-8-sig")
        _check_containers(text, where)
        parsed = parse_json_object(text, where)
    except UnicodeDecodeError as error:
        raise _invalid(f"{where} is not UTF-8: byte {error.start} is wrong; send a JSON object in UTF-8") from error
    except BundleError as error:
        raise _invalid(f"{error}; send a JSON object in UTF-8") from error
    _check_levels(parsed, where)
    if LONE_SURROGATE.search(text) or (SURROGATE_ESCAPE.search(text) and any(map(_is_broken, _texts(parsed)))):
        raise _invalid(f"{where} has half of a surrogate pair, wanted whole characters")
    return parsed


def _invalid(message: str) -> ApiError:
    return ApiError(message, code="invalid_json")


def _check_containers(text: str, where: str) -> None:
    if text.count("{") + text.count("[") <= MAX_CONTAINERS:
        return
    bare = STRING.sub("", text)
    if (count := bare.count("{") + bare.count("[")) > MAX_CONTAINERS:
        raise _invalid(f"{where} has {count} objects and lists, wanted at most {MAX_CONTAINERS}")


def _check_levels(body: dict[str, Any], where: str) -> None:
    """Check objects and lists level by level; nothing else is kept of a level, as bodies may be wide."""
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        widest = max((len(each) for each in level if type(each) is dict), default=0)
        if widest > MAX_KEYS:
            raise _invalid(f"{where} has an object of {widest} keys, wanted at most {MAX_KEYS}")
        level = [
            part
            for each in level
            for part in (each.values() if type(each) is dict else each)
            if type(part) is dict or type(part) is list
        ]
    if level:
        raise _invalid(f"{where} is nested more than {MAX_DEPTH} levels deep; flatten it")


def _texts(value: object) -> Iterator[str]:
    """Yield all texts of a value of bounded depth, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _is_broken(text: str) -> bool:
    return LONE_SURROGATE.search(text) is not None
