"""Messages and tools as a chat template takes them."""

import json
from collections.abc import Sequence
from typing import Any

from engram_runtime.errors import BundleError
from engram_runtime.openai_api.chat_body import CalledFunction, Message, Tool
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.openai_api.grammars import CALL_END, CALL_START
from engram_runtime.strict_json import parse_json_object
from engram_runtime.tokenizer import TextTokenizer

# In the words that models with tools are trained on, those of Hermes and Qwen.
TOOLS_TEXT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def encode_messages(
    tokenizer: TextTokenizer, messages: Sequence[Message], tools: Sequence[Tool], *, most_tokens: int
) -> list[int]:
    """Return the ids of a chat up to where the answer begins; ``most_tokens`` as for `TextTokenizer.encode`.

    A template that knows nothing of tools, or writes calls in another way than `grammars.answer_grammar` demands them,
    gets tools, calls and their results as text.

    Raises:
        RequestError: the bundle has no template, or it refuses the messages.
        ApiError: arguments of a call that are no JSON object.
    """
    described = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]
    if tokenizer.chat_template.describes_tools:
        told = [_message(message) for message in messages]
        return tokenizer.encode_chat(told, tools=described or None, most_tokens=most_tokens)
    plain = [_plain_message(message) for message in messages]
    return tokenizer.encode_chat(_with_tools_text(plain, described), most_tokens=most_tokens)


def _message(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": _call(call.function)} for call in message.tool_calls
        ]
    return fields


def _call(function: CalledFunction) -> dict[str, Any]:
    try:
        arguments = parse_json_object(function.arguments, f"the arguments of {function.name}")
    except BundleError as error:
        raise ApiError(str(error), param="messages", code="invalid_value") from error
    return {"name": function.name, "arguments": arguments}


def _plain_message(message: Message) -> dict[str, str]:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.content}\n</tool_response>"}
    fields = _message(message)
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in fields.pop("tool_calls", [])]
    texts = [fields["content"], *(f"{CALL_START}\n{call}{CALL_END}" for call in calls)]
    return {**fields, "content": "\n".join(filter(None, texts))}


def _with_tools_text(messages: list[dict[str, str]], tools: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    if not tools:
        return messages
    text = TOOLS_TEXT.format(signatures="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    first, *others = messages
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *others]
