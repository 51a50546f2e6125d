"""One line of a batch: a request, or why it is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engram_runtime.batch.lines import Line, key
from engram_runtime.errors import BundleError
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.openai_api.json_body import parse_body
from engram_runtime.strict_json import Fields

MAX_LINE_BYTES = 1 << 20  # what the server takes as a body
MAX_ID_CHARS = 512
URLS = ("/v1/chat/completions", "/v1/completions")
METHOD = "POST"


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a line asks for; ``body`` is as it was sent, and not looked at yet."""

    custom_id: str
    url: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request; ``custom_id`` is None where it has none."""

    custom_id: str | None
    reason: str


def parse_request(line: Line) -> BatchRequest | BadLine:
    """Return what a line of a batch says."""
    custom_id = None
    where = f"line {line.number}"
    try:
        if len(line.text) > MAX_LINE_BYTES:
            raise BundleError(f"{where} has more than {MAX_LINE_BYTES} bytes, the most that is allowed")
        fields = Fields(parse_body(line.text, where), where)
        custom_id = _custom_id(fields, where)
        url, body = _url(fields, where), fields.fields("body").remaining()
        fields.finish()
    except (ApiError, BundleError) as error:
        return BadLine(custom_id, str(error))
    return BatchRequest(custom_id, url, body)


def request_key(line: Line) -> bytes:
    """Return what tells the request of a line from others."""
    return key(parse_request(line).custom_id, line.number)


def _custom_id(fields: Fields, where: str) -> str:
    custom_id = fields.take("custom_id", str)
    if not 1 <= len(custom_id) <= MAX_ID_CHARS:
        raise BundleError(f"{where}.custom_id has {len(custom_id)} characters, expected 1 to {MAX_ID_CHARS}")
    return custom_id


def _url(fields: Fields, where: str) -> str:
    method, url = fields.take("method", str), fields.take("url", str)
    if method != METHOD:
        raise BundleError(f"{where}.method is {method!r}, expected {METHOD!r}")
    if url not in URLS:
        raise BundleError(f"{where}.url is {url[:100]!r}, expected one of {list(URLS)}")
    return url
