"""The OpenAPI document of the server's routes, whose bodies are those that requests are checked by."""

from collections.abc import Mapping
from typing import Any

from pydantic.json_schema import models_json_schema

from engram_runtime.openai_api.chat_body import ChatBody
from engram_runtime.openai_api.completion_body import CompletionBody
from engram_runtime.openai_api.fields import Body
from engram_runtime.openai_api.token_body import DetokenizeBody, TokenizeBody

Json = dict[str, Any]

BODIES: Mapping[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
API_VERSION = "1"
EVENT: Json = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
EVENTS = {"text/event-stream": {"schema": EVENT}}
PLAIN = {"text/plain; version=1.0.0; charset=utf-8": {"schema": {"type": "string"}}}
ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
MODEL_NAME: Json = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def openapi_document() -> Json:
    """Return the document, as JSON values."""
    _, defined = models_json_schema([(body, "validation") for body in BODIES.values()], ref_template=_place("{model}"))
    schemas = defined["$defs"]
    for body in BODIES.values():
        _complete(schemas[body.__name__], body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "engram-edge", "version": API_VERSION},
        "paths": _paths(),
        "components": {
            "schemas": {**schemas, "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _paths() -> Json:
    page = {"text/html; charset=utf-8": {"schema": {"type": "string"}}}
    completion = ["id", "object", "created", "model", "choices", "usage"]
    return {
        "/v1/chat/completions": {"post": _post("The next message of a chat", ChatBody, completion, streams=True)},
        "/v1/completions": {"post": _post("Goes on with texts", CompletionBody, completion, streams=True)},
        "/tokenize": {"post": _post("Token ids of a text or of messages", TokenizeBody, ["count", "tokens"])},
        "/detokenize": {"post": _post("The text of token ids", DetokenizeBody, ["prompt"])},
        "/v1/models": {"get": _get("The models that are loaded", _object(["object", "data"]))},
        "/v1/models/{model}": {
            "get": _get("A model", _object(["id", "max_model_len"])) | {"parameters": [MODEL_NAME]},
        },
        "/health": {"get": _get("Whether all models are loaded and work", _object(["status"]), error=["status"])},
        "/metrics": {"get": _get("Figures for Prometheus", PLAIN)},
        "/openapi.json": {"get": _get("This document", _object(["openapi", "paths"]))},
        "/": {"get": _get("The page to chat", page)},
    }


def _post(summary: str, body: type[Body], required: list[str], *, streams: bool = False) -> Json:
    content = {"application/json": {"schema": {"$ref": _place(body.__name__)}}}
    told = _get(summary, _object(required) | (EVENTS if streams else {}))
    if streams:
        wrong = {"application/json": {"schema": {"$ref": _place("Error")}}}
        told["responses"]["502"] = {"description": "The model's process died while it generated", "content": wrong}
    return {**told, "requestBody": {"required": True, "content": content}}


def _get(summary: str, content: Json, error: list[str] | None = None) -> Json:
    wrong = {"application/json": {"schema": {"$ref": _place("Error")}}} if error is None else _object(error)
    errors = {"4XX": {"description": "A request that can't be answered", "content": wrong}}
    busy = {"503": {"description": "Loading, failed or too busy", "content": wrong}}
    answers = {"200": {"description": "The answer", "content": content}, **errors, **busy}
    return {"summary": summary, "responses": answers}


def _object(required: list[str]) -> Json:
    return {"application/json": {"schema": {"type": "object", "required": required}}}


def _place(name: str) -> str:
    return f"#/components/schemas/{name}"


def _complete(schema: Json, body: type[Body]) -> None:
    """Add what holds of every whole body: null counts as not given, and some fields change nothing."""
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        if name not in required:
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    schema["properties"] |= {name: {"description": "changes nothing"} for name in sorted(body.IGNORED)}
    schema["additionalProperties"] = {"type": "null"}
