"""What OpenAI's own client is told by a server, held strictly against the client's types."""

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx2
import openai
import pydantic
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

Told = TypeVar("Told", bound=pydantic.BaseModel)
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Kiel"]}, "celsius": {"type": "boolean"}},
    "required": ["city", "celsius"],
    "additionalProperties": False,
}
LONG = "context_length_exceeded"
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": WEATHER}} for name in ("now", "later")]


class Place(pydantic.BaseModel):
    """An answer by a schema."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(max_length=12)
    capital: bool


class Asker:
    """A client that asks one model; what it is told is parsed strictly."""

    def __init__(self, client: openai.OpenAI) -> None:
        self.client = client
        (self.model,) = [model.id for model in client.models.list()]

    def given(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "messages": QUESTION, "max_tokens": 16, "temperature": 0, **fields}

    def whole(self, **fields: Any) -> ChatCompletion:
        told: ChatCompletion = self.client.chat.completions.create(**self.given(fields))
        return strict(told)

    def chunks(self, **fields: Any) -> list[ChatCompletionChunk]:
        return [strict(chunk) for chunk in self.client.chat.completions.create(**self.given(fields), stream=True)]


def strict(told: Told) -> Told:
    """Return what was told, of which the client itself checks nothing."""
    return type(told).model_validate_json(told.model_dump_json(exclude_unset=True), strict=True)


def answers(ask: Asker) -> None:
    told = ask.whole()
    assert told.choices[0].message.content is not None
    assert "Paris" in told.choices[0].message.content
    assert told.choices[0].finish_reason in ("stop", "length")
    assert abs(told.created - time.time()) < 60


def streams(ask: Asker) -> None:
    whole, chunks = ask.whole(), ask.chunks(stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * len(reasons)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def calls_tools(ask: Asker) -> None:
    fields = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
    choice = ask.whole(**fields).choices[0]
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments).keys() == {"city", "celsius"}
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    with ask.client.chat.completions.stream(**ask.given(fields)) as stream:
        gathered = stream.get_final_completion().choices[0]
    (same,) = gathered.message.tool_calls or []
    assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)
    assert gathered.finish_reason == "tool_calls"
    result: Any = {"role": "tool", "tool_call_id": same.id, "content": "12"}
    ask.whole(tools=TOOLS, messages=[*QUESTION, choice.message, result], max_tokens=4)


def follows_a_schema(ask: Asker) -> None:
    fields: dict[str, Any] = ask.given({"response_format": Place, "max_tokens": 60})
    parsed = ask.client.chat.completions.parse(**fields).choices[0].message.parsed
    assert isinstance(parsed, Place)
    with ask.client.chat.completions.stream(**fields) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed
    with pytest.raises(openai.LengthFinishReasonError):
        ask.client.chat.completions.parse(**{**fields, "max_tokens": 2})


def tells_logprobs(ask: Asker) -> None:
    said = ask.whole(logprobs=True, top_logprobs=20, max_tokens=4).choices[0].logprobs
    assert said is not None
    assert said.content is not None
    assert [len(token.top_logprobs) for token in said.content] == [20] * 4
    assert all(token.top_logprobs[0].logprob == token.logprob <= 0 for token in said.content)
    chunks = ask.chunks(logprobs=True, top_logprobs=20, max_tokens=4)
    told = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert [token for tokens in told for token in tokens or []] == said.content


def repeats_choices_by_seed(ask: Asker) -> None:
    fields = {"n": 2, "temperature": 1.5, "seed": 5}
    first, second = (ask.whole(**fields).choices for _ in range(2))
    assert [choice.index for choice in first] == [0, 1]
    assert [choice.message.content for choice in first] == [choice.message.content for choice in second]
    assert first[0].message.content != first[1].message.content
    assert ask.whole(**{**fields, "seed": 6, "n": 1}).choices[0].message.content == first[1].message.content


def stops(ask: Asker) -> None:
    text = ask.whole().choices[0].message.content or ""
    choice = ask.whole(stop=["Paris", "never"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text[: text.index("Paris")], "stop")


def takes_biases(ask: Asker) -> None:
    allowed = ask.whole(logit_bias={"40": 100}, max_tokens=3).choices[0].message.content or ""
    assert allowed == 3 * allowed[: len(allowed) // 3]
    assert ask.whole(max_tokens=3).choices[0].message.content != allowed


def completes(ask: Asker) -> None:
    fields: dict[str, Any] = {"model": ask.model, "max_tokens": 6, "temperature": 0}
    told: Completion = strict(ask.client.completions.create(**fields, prompt="The capital of France is", logprobs=2))
    text, columns = told.choices[0].text, told.choices[0].logprobs
    assert "Paris" in text
    assert columns is not None
    assert "".join(columns.tokens or []) == text
    assert [text[start] for start in columns.text_offset or []] == [token[0] for token in columns.tokens or []]
    assert [len(top) for top in columns.top_logprobs or []] == [2] * 6
    echoed = ask.client.completions.create(**fields, prompt="The capital of France is", echo=True)
    assert echoed.choices[0].text == f"The capital of France is{text}"


def leaves(ask: Asker) -> None:
    with ask.client.chat.completions.create(**ask.given({"max_tokens": 2000, "temperature": 2}), stream=True) as stream:
        next(iter(stream))
    metrics = str(ask.client.base_url).removesuffix("v1/") + "metrics"
    until = time.monotonic() + 20
    while f'{{kind="running",model="{ask.model}"}} 0.0' not in httpx2.get(metrics).text:
        assert time.monotonic() < until


def lists_models(ask: Asker) -> None:
    (listed,) = ask.client.models.list()
    assert strict(listed) == ask.client.models.retrieve(ask.model)
    assert isinstance(listed, Model)


def names_errors(ask: Asker) -> None:
    refused: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 9}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"extra_body": {"x": 1}}, openai.BadRequestError, "unknown_parameter", "x"),
        ({"messages": [{"role": "user", "content": "a b " * 9000}]}, openai.BadRequestError, LONG, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 2**21}]}, openai.APIStatusError, "request_too_large", None),
    ]
    for fields, kind, code, param in refused:
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                ask.client.chat.completions.create(**ask.given(fields), stream=stream)
            assert (caught.value.code, caught.value.param) == (code, param)
            assert caught.value.type == "invalid_request_error"
            assert caught.value.request_id


Behaviour = Callable[[Asker], None]
BEHAVIOURS: list[Behaviour] = [
    answers,
    streams,
    calls_tools,
    follows_a_schema,
    tells_logprobs,
    repeats_choices_by_seed,
    stops,
    takes_biases,
    completes,
    leaves,
    lists_models,
    names_errors,
]
