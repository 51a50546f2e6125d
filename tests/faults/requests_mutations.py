"""Requests that are nearly right: bodies whose structure is changed, spelled wrongly, with odd headers and paths."""

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from tests.faults.requests_asgi import LOCAL, Asked, Headers

from engram_runtime.openai_api.chat_body import ChatBody
from engram_runtime.openai_api.completion_body import CompletionBody

Json = Any
Place = tuple[Any, Any]  # a list or an object, and an index or a key of it

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3, "pattern": "^[a-z]+$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 9, "multipleOf": 3},
        "kind": {"enum": ["sea", "land", None]},
        "tags": {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/t"}]}, "maxItems": 2},
        "when": {"type": "string", "format": "date-time"},
    },
    "$defs": {"t": {"type": "number", "exclusiveMinimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL: Json = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": SCHEMA}}
CALL: Json = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"name": "a"}'}}
COMMON: Json = {
    "model": "toy",
    "max_tokens": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "seed": 7,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"97": 5, "98": -100},
    "n": 2,
    "stop": ["ab", "é"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "engram": {"usage": True, "activity": True},
    "user": "u",
}
MESSAGES: Json = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "Über"}, {"type": "text", "text": "日本"}], "name": "n"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "42", "tool_call_id": "c1"},
]
SHORT_CHAT: Json = {"model": "toy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
SEEDS: list[tuple[str, Json]] = [
    (CHAT, {**COMMON, "messages": MESSAGES, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {**SHORT_CHAT, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False}),
    (CHAT, {**SHORT_CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look_up"}}}),
    (CHAT, {**SHORT_CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}}),
    (CHAT, {**SHORT_CHAT, "response_format": {"type": "json_object"}, "stream": True, "modalities": ["text"]}),
    (CHAT, {**SHORT_CHAT, "max_completion_tokens": 3, "metadata": {"a": "b"}}),
    (COMPLETIONS, {**COMMON, "prompt": ["Hi", [72, 105]], "logprobs": 2}),
    (COMPLETIONS, {"model": "toy", "prompt": "Hi", "max_tokens": 2, "echo": True}),
    (COMPLETIONS, {"model": "toy", "prompt": [72, 105], "max_tokens": 1}),
    (TOKENIZE, {"model": "toy", "prompt": "Hi", "add_special_tokens": False}),
    (TOKENIZE, {"messages": MESSAGES}),
    (DETOKENIZE, {"model": "toy", "tokens": [72, 105, 200]}),
]
NUMBERS: list[Json] = [
    *(0, 1, -1, 2, 3.0, 0.5, -0.0, 127, 255, 256, 257, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 2**64),
    *(10**30, 1e-320, 1e308, -1e308, 1e16, 5e-324),
]
TEXTS = [
    *(
        "",
        " ",
        "0",
        "toy",
        "null",
        "\0",
        "\x7f",
        "\u202e",
        "\ufeff",
        "\ufffd",
        "é",
        "e\u0301",
        "日本",
        "🏳️‍🌈",
        "\U0010ffff",
    ),
    *(
        "<|im_end|>",
        "<|end|>",
        "<tool_call>",
        "{{ 7*7 }}",
        "{% for %}",
        "../../etc/passwd",
        "%s%n",
        "a" * 300,
        "a" * 9000,
    ),
    *("^(a+)+$", "(?=a)", "[", "#/$defs/none", "#", "date-time", "http://127.0.0.1:9/", "\r\nx: y", "ﷺ" * 40, "̈" * 200),
]
NAMES = sorted(
    {
        *(*ChatBody.model_fields, *CompletionBody.model_fields, *ChatBody.REFUSED, *ChatBody.IGNORED),
        *(*CompletionBody.REFUSED, "tokens", "role", "content", "type", "text", "function", "name", "schema", "strict"),
        *("$ref", "pattern", "minimum", "maxLength", "minItems", "enum", "const", "allOf", "oneOf", "not", "items"),
        *("if", "x-guidance", "patternProperties", "dependentRequired", "uniqueItems", "__proto__", "__class__", ""),
    }
)
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "CONNECT", "get", "BREW"]
PATHS = [
    *("/", "/health", "/metrics", "/v1/models", "/v1/models/toy", "/openapi.json", "/page.js", CHAT, COMPLETIONS),
    *(TOKENIZE, DETOKENIZE, "/v1/models/none", "/v1/models/\ufffd", "/v1/models/a/b", "//v1/models", "/v1/models/"),
    *("/v1", "/../run.py", "/page.js/..", "/\0", "*", "", "/%2e%2e/", "/" + "a" * 4000, "/v1/models?a=b&a=%00", "/é"),
]
HEADERS: Headers = [
    *(
        (b"host", value)
        for value in (b"localhost", b"evil.example", b"", b"127.0.0.1:80", b"[::1]:1", b"\xff", b"a:b:c")
    ),
    *((b"origin", value) for value in (b"null", b"http://127.0.0.1", b"://", b"http://evil.example", b"\xff\xfe")),
    *(
        (b"content-type", value)
        for value in (b"text/plain", b"application/json; charset=utf-16", b"multipart/form-data")
    ),
    *((b"content-length", value) for value in (b"0", b"1", b"99999999999999999999", b"1048577", b"\xb2")),
    *(
        (b"range", value)
        for value in (b"bytes=0-1", b"bytes=9-", b"bytes=-5,1-2", b"lines=1", b"bytes=" + b"0-1," * 500)
    ),
    *((b"authorization", value) for value in (b"Bearer x", b"Basic \xff", b"")),
    *((b"accept", b"text/event-stream"), (b"accept-encoding", b"gzip"), (b"content-encoding", b"gzip")),
    *((b"expect", b"100-continue"), (b"if-none-match", b"*"), (b"if-range", b'"x"'), (b"cookie", b"a=b; \xe9")),
    *((b"x-forwarded-for", b"1.2.3.4"), (b"x-long", b"a" * 17_000), (b"upgrade", b"websocket"), (b"te", b"trailers")),
]


def places(value: Json) -> list[Place]:
    """Return all places of a value, its own not."""
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def odd_value(random: Random) -> Json:
    """Return a value that seldom belongs where it is put."""
    kinds: list[Callable[[], Json]] = [
        lambda: random.choice(NUMBERS),
        lambda: random.choice(TEXTS),
        lambda: random.choice([None, True, False, [], {}, [[]], [None], {"": {}}]),
        lambda: random.choice([value for _, value in (*SEEDS, ("", SCHEMA), ("", TOOL), ("", CALL))]),
        lambda: [random.choice(NUMBERS) for _ in range(random.choice((2, 20, 300)))],
        lambda: {random.choice((*NAMES, *TEXTS)): random.choice(NUMBERS) for _ in range(random.choice((1, 3, 300)))},
        lambda: _nested(random.choice((5, 30, 70)), random.random() < 0.5),
    ]
    return random.choice(kinds)()


def _nested(depth: int, objects: bool) -> Json:
    value: Json = 1
    for _ in range(depth):
        value = {"items": value} if objects else [value]
    return value


def mutate(random: Random, body: Json) -> None:
    """Change one thing of a body in place."""
    found = places(body)
    if not found:
        return
    within, key = random.choice(found)
    match random.randrange(7):
        case 0 | 1:
            within[key] = copy.deepcopy(odd_value(random))
        case 2:
            del within[key]
        case 3:  # what stands elsewhere
            other, name = random.choice(found)
            within[key] = copy.deepcopy(other[name])
        case 4:
            within[key] = [within[key]] if random.random() < 0.5 else {random.choice(NAMES): within[key]}
        case 5 if isinstance(within, dict):
            within[random.choice(NAMES)] = copy.deepcopy(odd_value(random))
        case 5:
            within.append(copy.deepcopy(odd_value(random)))
        case _:
            within[key] = _grown(random, within[key])


def _grown(random: Random, value: Json) -> Json:
    times = random.choice((2, 20, 200))
    if isinstance(value, str | list):
        return value * times
    if isinstance(value, dict):
        return {**value, **{f"{name}{index}": each for name, each in value.items() for index in range(times // 10)}}
    return value * times if isinstance(value, int | float) else [value] * times


def spelled(random: Random, body: Json) -> bytes:
    """Return a body as JSON, one time of eight damaged."""
    text = json.dumps(body, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    if random.random() < 7 / 8:
        return text
    at = random.randrange(len(text) + 1)
    odd = random.choice(
        (
            b"NaN",
            b"-Infinity",
            b"1e999",
            b'"\\ud800"',
            b"\xff",
            b"\0",
            b"9" * 5000,
            b",",
            b"}",
            b"[" * 9000,
            b'{"a":' * 3000,
        )
    )
    match random.randrange(8):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + odd + text[at:]
        case 2:
            return text.replace(b": 2", b": " + odd)
        case 3:
            return random.choice(
                (b"\xef\xbb\xbf" + text, text.decode("utf-8", "replace").encode("utf-16"), text + text)
            )
        case 4:
            return text.replace(b'"model"', b'"model": "toy", "model"')
        case 5:
            return bytes(byte ^ (1 << random.randrange(8)) if random.random() < 0.02 else byte for byte in text)
        case 6:
            return b" " * random.choice((1, 70_000, (1 << 20) + 1)) + text
        case _:
            return random.randbytes(random.choice((0, 1, 100)))


def random_request(random: Random) -> Asked:
    """Return a request: mostly a mutated body at its route, else any method, path, headers and body."""
    path, seed = random.choice(SEEDS)
    body = copy.deepcopy(seed)
    for _ in range(random.choice((0, 1, 1, 1, 2, 3, 5))):
        mutate(random, body)
    if random.random() < 0.85:
        return Asked(method="POST", path=path, body=spelled(random, body))
    local = LOCAL if random.random() < 0.8 else []
    headers = [*local, *random.choices(HEADERS, k=random.choice((0, 1, 2, 5, 70)))]
    body_bytes = spelled(random, body) if random.random() < 0.5 else b""
    return Asked(method=random.choice(METHODS), path=random.choice((*PATHS, path)), headers=headers, body=body_bytes)
