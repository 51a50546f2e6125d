"""The body of POST /v1/chat/completions."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from engram_runtime.openai_api.fields import Fields, Name
from engram_runtime.openai_api.generation_body import GenerationBody, TokenCount

MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_TOP_LOGPROBS = 20  # OpenAI's
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _joined(content: object) -> object:
    """Make one text of a list of text parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"wanted parts of type text, this model takes no {str(kind or part)[:20]}")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("wanted parts with a type and a text")
        texts.append(part["text"])
    return "\n".join(texts)


class TextPart(Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


Content = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[TextPart])]


class CalledFunction(Fields):
    """``arguments`` is the JSON text of an object."""

    name: FunctionName
    arguments: str


class ToolCall(Fields):
    """A call the model made in an earlier answer."""

    id: Name
    type: Literal["function"]
    function: CalledFunction


class Message(Fields):
    """A message so far; ``refusal`` and all after it may come back from earlier answers."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    refusal: None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("wanted content")
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError(f"a {self.role} message has no tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id belongs to messages of the role tool, and only to them")
        return self


class Function(Fields):
    """``strict`` changes nothing: calls follow the schema always."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Fields):
    """The name of a function."""

    name: FunctionName


class ChosenTool(Fields):
    """The function that the model has to call."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Fields):
    """``strict`` changes nothing: the answer follows the schema always."""

    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _a_schema_where_it_belongs(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema belongs to the type json_schema, and only to it")
        return self


class ChatBody(GenerationBody):
    """A request for the next message of a chat."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "answers are text",
        "prediction": "drafts come from the server's --draft",
        "reasoning_effort": "say in a message how to reason",
        "verbosity": "say in a message how long the answer is to be",
        "web_search_options": "describe a search as a tool",
        "moderation": "nothing is moderated here",
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, default_factory=list)]
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True
    modalities: Annotated[list[Literal["text"]], Field(default_factory=list)]

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.tool_choice not in ("none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) != len(names):
            raise ValueError("tools have two functions of one name")
        if isinstance(self.tool_choice, ChosenTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is none of the tools")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """How many tokens may come at most; the newer spelling counts."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, ChosenTool):
            chosen = self.tool_choice.function.name
            return [tool for tool in self.tools if tool.function.name == chosen]
        return self.tools
