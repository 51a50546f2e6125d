"""One line of a batch's output."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engram_runtime.batch.lines import Line, key
from engram_runtime.errors import BundleError
from engram_runtime.strict_json import parse_json_object

BEGINNING = b'{"id": "batch_req_'
RESULT_ID = re.compile("batch_req_([0-9]{1,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer to a line.

    Attributes:
        text: the line of the output, with its newline.
        failed: whether it tells of an error.
    """

    text: bytes
    failed: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0


def result_text(
    number: int, custom_id: str | None, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None
) -> bytes:
    """Return the answer to line ``number`` as a line."""
    result = {"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": error}
    # JSON spells a lone surrogate, which UTF-8 can't hold, as backslashreplace does.
    return json.dumps(result, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def result_key(line: Line) -> bytes:
    """Return what tells the request that a line answers from others; raises BundleError where it answers none."""
    custom_id, number = answered(line)
    return key(custom_id, number)


def answered(line: Line) -> tuple[str | None, int]:
    """Return the id of the request that a line answers, and where it has none, the number of the line.

    Raises:
        BundleError: it is no line of a batch's output.
    """
    where = f"line {line.number}"
    result = parse_json_object(line.text, where)
    if not {"id", "custom_id", "response", "error"} <= result.keys():
        raise BundleError(f"{where} has keys {sorted(result)[:8]}")
    custom_id = result["custom_id"]
    if isinstance(custom_id, str):
        return custom_id, 0
    number = RESULT_ID.fullmatch(str(result["id"]))
    if custom_id is not None or number is None:
        raise BundleError(f"{where} has neither a custom_id nor the id of an answer to a line")
    return None, int(number[1])
