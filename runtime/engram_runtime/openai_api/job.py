"""A body made into what the engine is asked and what becomes of its answer."""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engram_runtime.errors import EngramError
from engram_runtime.openai_api.answer import Answer, Heading
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
    prompt_ids = encode_messages(engine.tokenizer, body.messages, tools)
    names = {"prompt_param": "messages", "param": "max_tokens" if body.max_tokens else "max_completion_tokens"}
    max_tokens = token_limit(len(prompt_ids), body.asked_tokens, engine, **names)
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    more = {"max_tokens": max_tokens, "top_logprobs": top_logprobs, "grammar": answer_grammar(body)}
    heading = _heading(engine, "chatcmpl-")
    choices = [
        ChatChoice(
            engine.tokenizer,
            call_id=f"call_{heading.id[-24:]}_{index}",
            calls=bool(tools),
            logprobs=body.logprobs,
            activity=body.engram.activity,
        )
        for index in range(body.n)
    ]
    return Job(
        engine=engine,
        requests=_requests(body, engine, tuple(prompt_ids), more),
        answer=Answer(
            heading,
            kind="chat.completion",
            chunk_kind="chat.completion.chunk",
            choices=choices,
            per_prompt=body.n,
            include_usage=body.include_usage,
            tell_engram=body.engram.usage,
        ),
        stream=body.stream,
    )


def _prepare_completion(engines: Engines, raw: Mapping[str, Any]) -> Job:
    body = CompletionBody.parse(raw)
    engine = find_engine(engines, body.model)
    prompts = [_prompt_ids(prompt, engine) for prompt in body.prompt]
    asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    requests: list[TextRequest] = []
    choices = []
    for prompt_ids in prompts:
        max_tokens = token_limit(len(prompt_ids), asked, engine, prompt_param="prompt", param="max_tokens")
        more = {"max_tokens": max_tokens, "top_logprobs": body.logprobs}
        requests += _requests(body, engine, prompt_ids, more)
        echoed = engine.tokenizer.decode(prompt_ids, skip_special_tokens=False) if body.echo else ""
        choices += [
            CompletionChoice(
                engine.tokenizer,
                echoed=echoed,
                logprobs=body.logprobs is not None,
                activity=body.engram.activity,
            )
            for _ in range(body.n)
        ]
    return Job(
        engine=engine,
        requests=tuple(requests),
        answer=Answer(
            _heading(engine, "cmpl-"),
            kind="text_completion",
            chunk_kind="text_completion",
            choices=choices,
            per_prompt=body.n,
            include_usage=body.include_usage,
            tell_engram=body.engram.usage,
        ),
        stream=body.stream,
    )


def _prompt_ids(prompt: str | list[int], engine: Engine) -> tuple[int, ...]:
    token_ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
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


def _heading(engine: Engine, prefix: str) -> Heading:
    return Heading(
        id=prefix + secrets.token_hex(12),
        created=int(time.time()),
        model=engine.name,
        fingerprint=engine.fingerprint,
    )


PREPARATIONS: Mapping[str, Callable[[Engines, Mapping[str, Any]], Job]] = {
    "/v1/chat/completions": _prepare_chat,
    "/v1/completions": _prepare_completion,
}
