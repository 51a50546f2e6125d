"""Turn chat messages into a prompt with the model's own template, which is code from whoever made the model."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from engram_runtime.chat_limits import MAX_PROMPT_CHARS, MAX_TEMPLATE_BYTES
from engram_runtime.chat_sandbox import Meter, Sandbox, TemplateRefusal, metered_rendering
from engram_runtime.errors import BundleError, RequestError

# Whatever running someone else's template can raise.
TEMPLATE_FAILURES = (
    *(TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(NameError, RecursionError, SyntaxError, TypeError, ValueError),  # {{ 1e999 }} becomes the name inf
)


class ChatTemplate:
    """A compiled chat template.

    It renders what transformers' ``apply_chat_template`` renders for messages of text and for tools, or fails.
    Templates run in jinja2's sandbox: no attribute with an underscore, nothing changed in place, no other template, and
    of jinja2's functions only ``dict``, ``namespace`` and ``range``.

    What the limits are worth: time and work are checked at every turn of a loop, every call, every piece of output and
    before every operation that can make a large value, so no loop, recursion or doubling runs away. A single operation
    of Python, such as ``title``, can't be interrupted, but works on ``MAX_VALUE_SIZE`` characters at most: some seconds
    and some hundred megabytes. Compiling is bounded by the size of the template alone, to some seconds again. Whoever
    renders templates of strangers for others needs a process with limits of its own.

    A template can be used from several threads.

    Attributes:
        describes_tools: whether it tells the model of tools, and that it calls one by the JSON object of ``name`` and
            ``arguments`` between ``<tool_call>`` and ``</tool_call>``.
    """

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, now: Callable[[], datetime] = datetime.now
    ) -> None:
        num_bytes = len(source.encode("utf-8", "surrogatepass"))
        if num_bytes > MAX_TEMPLATE_BYTES:
            raise BundleError(f"the chat template has {num_bytes} bytes, at most {MAX_TEMPLATE_BYTES} are allowed")
        try:
            self._template = Sandbox(now).compile_metered(source)
        except TEMPLATE_FAILURES as error:
            raise BundleError(f"the chat template can't be compiled: {_reason(error)}; give a plain prompt") from error
        self._special_tokens = dict(special_tokens)
        # Templates of models that spell calls in XML have <function= in them.
        self.describes_tools = "tools" in source and "<tool_call>" in source and "<function=" not in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt for messages, each with the strings ``role`` and ``content``.

        Args:
            messages: at most ``MAX_PROMPT_CHARS`` characters together with the tools; beside strings a message may have
                ``tool_calls``, a list of JSON objects.
            tools: JSON objects as OpenAI spells them, whose arguments are objects, not strings.
            add_generation_prompt: end with what the model's answer follows.

        Raises:
            RequestError: messages of another form, too long, or refused by the template.
            BundleError: the template has an error, does something forbidden or takes too long.
        """
        _check_messages(messages, tools)
        variables = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with metered_rendering() as meter:
                return _limited_text(self._template.generate(variables), meter)
        except TemplateRefusal as error:
            raise RequestError(f"the chat template refuses the messages: {error}") from error
        except TEMPLATE_FAILURES as error:
            raise BundleError(f"the chat template failed: {_reason(error)}; give a plain prompt") from error


def _check_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> None:
    if not messages:
        raise RequestError("there are no messages, wanted at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):  # requests come as JSON
            raise RequestError(f"message {index} is {str(message)[:60]}, wanted an object with role and content")
        for field in {"role": "", "content": "", **message}:
            if field != "tool_calls" and not isinstance(message.get(field), str):
                raise RequestError(f"{field} of message {index} is {str(message.get(field))[:60]}, wanted a string")
    num_chars = sum(_size(value) for message in messages for value in message.values()) + _size(tools or "")
    if num_chars > MAX_PROMPT_CHARS:
        raise RequestError(f"the messages have {num_chars} characters, wanted at most {MAX_PROMPT_CHARS}; shorten them")


def _size(value: object) -> int:
    return len(value if isinstance(value, str) else json.dumps(value))


def _limited_text(pieces: Iterable[str], meter: Meter) -> str:
    taken = []
    num_chars = 0
    for piece in pieces:
        meter.spend(1 + len(piece))
        num_chars += len(piece)
        if num_chars > MAX_PROMPT_CHARS:
            raise RequestError(
                f"the chat template makes a prompt of more than {MAX_PROMPT_CHARS} characters; shorten the messages"
            )
        taken.append(piece)
    return "".join(taken)


def _reason(error: BaseException) -> str:
    if isinstance(error, TemplateSyntaxError):
        return f"{error.message} (line {error.lineno})"
    return str(error) or type(error).__name__
