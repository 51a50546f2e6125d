"""A body made into what the engine is asked and what becomes of its answer."""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engram_runtime.errors import EngramError, LengthError
from engram_runtime.openai_api.answer import Answer, Choice, Heading
from engram_runtime.openai_api.chat_body import ChatBody
from engram_runtime.openai_api.chat_choice import ChatChoice
from engram_runtime.openai_api.chat_prompt import encode_messages
from engram_runtime.openai_api.completion_body import DEFAULT_MAX_TOKENS, CompletionBody
from engram_runtime.openai_api.completion_choice import CompletionChoice
from engram_runtime.openai_api.errors import NOT_FOUND, UNAVAILABLE, ApiError, as_api_error
from engram_runtime.openai_api.generation_body import GenerationBody, check_token_ids, token_limit
from engram_runtime.openai_api.grammars import answer_grammar
from engram_runtime.serving.engine_protocol import Engine
from engram_runtime.serving.request import DEFAULT_TIME_LIMIT_S, TextRequest

Engines = Mapping[str, Engine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The texts to ask an engine for, and the answer they make; ``requests[i]`` is choice i."""

    engine: Engine
    requests: tuple[TextRequest, ...]
    answer: Answer
    stream: bool


def find_engine(engines: Engines, model: str) -> Engine:
    """Return the engine of a model; raises ApiError where there is none, or it has died."""
    if model not in engines:
        raise ApiError(
            f"there is no model {model[:60]!r}, wanted one of {', '.join(sorted(engines)) or 'none: all are loading'}",
            status=NOT_FOUND,
            param="model",
            code="model_not_found",
        )
    engine = engines[model]
    if engine.failure is not None:
        raise ApiError(f"model {model!r} has failed: {engine.failure}", status=UNAVAILABLE, code="engine_failed")
    return engine


def prepare(engines: Engines, path: str, raw: Mapping[str, Any], time_limit_s: float = DEFAULT_TIME_LIMIT_S) -> Job:
    """Check a body and tokenise it, which may take seconds: not for the thread of an event loop.

    Args:
        path: ``/v1/chat/completions`` or ``/v1/completions``.
        time_limit_s: of each text, its time in the queue included.

    Raises:
        ApiError: the body can't be served.
    """
    if path not in PREPARATIONS:
        raise ApiError(f"there is nothing at {path}, wanted {' or '.join(PREPARATIONS)}", status=NOT_FOUND)
    try:
        job = PREPARATIONS[path](engines, raw)
    except EngramError as error:
        raise as_api_error(error) from error
    return replace(job, requests=tuple(replace(text, time_limit_s=time_limit_s) for text in job.requests))


def _prepare_chat(engines: Engines, raw: Mapping[str, Any]) -> Job:
    body = ChatBody.parse(raw)
    engine = find_engine(engines, body.model)
    tools = body.callable_tools
    with _prompt_in("messages"):
        prompt_ids = encode_messages(engine.tokenizer, body.messages, tools, most_tokens=engine.context_length)
    param = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_tokens = token_limit(len(prompt_ids), body.asked_tokens, engine, prompt_param="messages", param=param)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    more = {"max_tokens": max_tokens, "top_logprobs": top_logprobs, "grammar": answer_grammar(body)}
    number = secrets.token_hex(12)
    choices = [
        ChatChoice(
            engine.tokenizer,
            call_id=f"call_{number}_{index}",
            calls=bool(tools),
            logprobs=body.logprobs,
            activity=body.engram.activity,
        )
        for index in range(body.n)
    ]
    answer = _answer(body, engine, f"chatcmpl-{number}", choices, "chat.completion", "chat.completion.chunk")
    requests = _requests(body, engine, tuple(prompt_ids), more)
    return Job(engine=engine, requests=requests, answer=answer, stream=body.stream)


def _prepare_completion(engines: Engines, raw: Mapping[str, Any]) -> Job:
    body = CompletionBody.parse(raw)
    engine = find_engine(engines, body.model)
    asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    requests: list[TextRequest] = []
    choices: list[CompletionChoice] = []
    for prompt in body.prompt:
        prompt_ids = _prompt_ids(prompt, engine)
        max_tokens = token_limit(len(prompt_ids), asked, engine, prompt_param="prompt", param="max_tokens")
        requests += _requests(body, engine, prompt_ids, {"max_tokens": max_tokens, "top_logprobs": body.logprobs})
        echoed = engine.tokenizer.decode(prompt_ids, skip_special_tokens=False) if body.echo else ""
        told = {"logprobs": body.logprobs is not None, "activity": body.engram.activity}
        choices += [CompletionChoice(engine.tokenizer, echoed=echoed, **told) for _ in range(body.n)]
    name = f"cmpl-{secrets.token_hex(12)}"
    answer = _answer(body, engine, name, choices, "text_completion", "text_completion")
    return Job(engine=engine, requests=tuple(requests), answer=answer, stream=body.stream)


def _answer(
    body: GenerationBody, engine: Engine, name: str, choices: Sequence[Choice], kind: str, chunk_kind: str
) -> Answer:
    return Answer(
        Heading(id=name, created=int(time.time()), model=engine.name, fingerprint=engine.fingerprint),
        kind=kind,
        chunk_kind=chunk_kind,
        choices=choices,
        per_prompt=body.n,
        include_usage=body.include_usage,
        tell_engram=body.engram.usage,
    )


@contextlib.contextmanager
def _prompt_in(param: str) -> Iterator[None]:
    """Name the field of a prompt that is refused while it is read."""
    try:
        yield
    except LengthError as error:
        raise ApiError(str(error), param=param, code="context_length_exceeded") from error


def _prompt_ids(prompt: str | list[int], engine: Engine) -> tuple[int, ...]:
    most = engine.context_length
    with _prompt_in("prompt"):
        token_ids = engine.tokenizer.encode(prompt, most_tokens=most) if isinstance(prompt, str) else prompt
    if not token_ids:
        raise ApiError("the prompt is empty, wanted at least one token", param="prompt", code="invalid_value")
    check_token_ids(token_ids, engine, "prompt")
    return tuple(token_ids)


def _requests(
    body: GenerationBody, engine: Engine, prompt_ids: tuple[int, ...], more: Mapping[str, Any]
) -> tuple[TextRequest, ...]:
    biases = body.biases(engine)
    return tuple(
        TextRequest(
            prompt_ids=prompt_ids,
            sampling=body.sampling(engine, choice),
            stop=tuple(body.stop),
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            logit_bias=biases,
            activity=body.engram.activity,
            **more,
        )
        for choice in range(body.n)
    )


PREPARATIONS: Mapping[str, Callable[[Engines, Mapping[str, Any]], Job]] = {
    "/v1/chat/completions": _prepare_chat,
    "/v1/completions": _prepare_completion,
}
