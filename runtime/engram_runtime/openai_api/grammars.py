"""What an answer has to follow, as grammars of llguidance."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engram_runtime.openai_api.chat_body import ChatBody, ResponseFormat, Tool
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.openai_api.schema_limits import check_schema

MAX_CALLS = 16
CALL_START, CALL_END = "<tool_call>", "\n</tool_call>"
NAME_START, ARGUMENTS_START, ARGUMENTS_END = '\n{"name": "', '", "arguments": ', "}"
ANY_OBJECT = {"type": "object"}
# Of any white space a small model may never find its end.
SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
OPENING = rf"""
opening[lazy]: TEXT {json.dumps(CALL_START)}
TEXT: /(.|\n)*/"""


def answer_grammar(body: ChatBody) -> str | None:
    """Return the grammar of an answer, a Lark text; None where it may be any text.

    Raises:
        ApiError: parameters of a tool that aren't those of an object, or as for `check_schema`.
    """
    tools = body.callable_tools
    answer = _answer(body.response_format)
    if not tools:
        return None if answer is None else f"start: {answer}"
    required = body.tool_choice != "auto"
    start = "calls" if required else f"calls | {answer or 'TEXT'}"
    # Text may come before a call, if text is what may come at all.
    free = not required and answer is None
    first = "opening" if free else json.dumps(CALL_START)
    several = body.parallel_tool_calls and isinstance(body.tool_choice, str)
    more = f" ({json.dumps(chr(10) + CALL_START)} call){{0,{MAX_CALLS - 1}}}" if several else ""
    rules = [f"start: {start}", f"calls: {first} call{more}", *_call_rules(tools)]
    return "\n".join(rules) + (OPENING if free else "")


def _answer(form: ResponseFormat) -> str | None:
    if form.json_schema is not None:
        return _json_rule(form.json_schema.schema_)
    return _json_rule(ANY_OBJECT) if form.type == "json_object" else None


def _json_rule(schema: Mapping[str, Any]) -> str:
    check_schema(schema)
    return f"%json {json.dumps({**schema, 'x-guidance': SPELLING})}"


def _call_rules(tools: Sequence[Tool]) -> list[str]:
    names = " | ".join(f"call_{index}" for index in range(len(tools)))
    rules = [f"call: {json.dumps(NAME_START)} ({names}) {json.dumps(ARGUMENTS_END + CALL_END)}"]
    for index, tool in enumerate(tools):
        opening = json.dumps(tool.function.name + ARGUMENTS_START)
        rules.append(f"call_{index}: {opening} arguments_{index}")
        rules.append(f"arguments_{index}: {_json_rule(_parameters(tool, index))}")
    return rules


def _parameters(tool: Tool, index: int) -> Mapping[str, Any]:
    parameters = tool.function.parameters
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if parameters.get("type") != "object":
        raise ApiError(
            f"the parameters of {tool.function.name} have type {json.dumps(parameters.get('type'))}, wanted a JSON "
            'Schema of type "object"',
            param=f"tools[{index}].function.parameters",
            code="invalid_function_parameters",
        )
    return parameters
