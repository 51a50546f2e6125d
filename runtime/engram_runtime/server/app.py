"""The application: which path is answered by what."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from anyio import to_thread
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from engram_runtime.errors import EngramError
from engram_runtime.openai_api.chat_prompt import encode_messages
from engram_runtime.openai_api.errors import INTERNAL, NOT_FOUND, UNAVAILABLE, ApiError, as_api_error
from engram_runtime.openai_api.generation_body import check_token_ids
from engram_runtime.openai_api.job import PREPARATIONS, Engines, find_engine
from engram_runtime.openai_api.json_body import parse_body
from engram_runtime.openai_api.token_body import DetokenizeBody, TokenizeBody
from engram_runtime.server.access import Access
from engram_runtime.server.body import Bodies
from engram_runtime.server.generating import Generating
from engram_runtime.server.guard import CLIENT_LEFT, Guard, error_response
from engram_runtime.server.limits import WORKER_THREADS
from engram_runtime.server.metrics import Metrics
from engram_runtime.server.models import SERVING, Models
from engram_runtime.server.openapi import openapi_document
from engram_runtime.serving.engine_protocol import Engine

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
HEALTH = "/health"
MOST_COUNTED = 1 << 17  # tokens of a text, whatever the model's context; twice as many are 50 MB while they are counted


def create_app(models: Models, access: Access, metrics: Metrics) -> ASGIApp:
    """Return the ASGI application of a server.

    Without a key, where there are keys, only ``/health`` and the page's files are served: they hold nothing of the
    models, and a browser can't send a key when it opens a page.
    """
    bodies = Bodies()
    routes = [*_page_routes(), *_model_routes(models), *_token_routes(models, bodies)]
    generating = Generating(models, metrics, bodies)
    routes += [Route(path, generating, methods=["POST"]) for path in PREPARATIONS]

    async def health(request: Request) -> Response:
        status = models.status
        troubles = {"models": models.troubles} if models.troubles and access.admits(request.headers) else {}
        return JSONResponse({"status": status, **troubles}, 200 if status in SERVING else UNAVAILABLE)

    async def tell_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    document = JSONResponse(openapi_document()).body

    async def tell_routes(request: Request) -> Response:
        return Response(document, media_type="application/json")

    routes += [Route(HEALTH, health), Route("/metrics", tell_metrics), Route("/openapi.json", tell_routes)]
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: _tell_error,
            ClientDisconnect: _tell_nobody,
            HTTPException: _tell_http,
            Exception: _tell_defect,
        },
        lifespan=_few_threads,
    )
    app.router.redirect_slashes = False
    return Guard(
        app,
        access=access,
        metrics=metrics,
        open_paths=frozenset({HEALTH, *(route.path for route in _page_routes())}),
        routes=frozenset(route.path for route in routes),
    )


@asynccontextmanager
async def _few_threads(app: Starlette) -> AsyncIterator[None]:
    to_thread.current_default_thread_limiter().total_tokens = WORKER_THREADS
    yield


def _page_routes() -> list[Route]:
    return [
        Route("/" if file.name == "index.html" else f"/{file.name}", _page_file(file))
        for file in sorted(PAGE.iterdir())
        if file.suffix in PAGE_TYPES
    ]


def _page_file(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()

    async def serve(request: Request) -> Response:
        return Response(content, headers=PAGE_HEADERS, media_type=PAGE_TYPES[file.suffix])

    return serve


def _model_routes(models: Models) -> list[Route]:
    def described(engine: Engine) -> dict[str, Any]:
        return {
            "id": engine.name,
            "object": "model",
            "created": models.created,
            "owned_by": "engram-edge",
            "max_model_len": engine.context_length,
        }

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(engine) for engine in dict(models.engines).values()]})

    async def retrieve_model(request: Request) -> Response:
        name = request.path_params["model"]
        return JSONResponse(described(find_engine(models.engines_for(name), name)))

    return [Route("/v1/models", list_models), Route("/v1/models/{model}", retrieve_model)]


def _token_routes(models: Models, bodies: Bodies) -> list[Route]:
    def route(path: str, answer: Callable[[Engines, Mapping[str, Any]], dict[str, Any]]) -> Route:
        def from_bytes(body: bytes) -> dict[str, Any]:
            raw = parse_body(body)
            try:
                return answer(models.engines_for(raw.get("model")), raw)
            except EngramError as error:
                raise as_api_error(error) from error

        async def endpoint(request: Request) -> Response:
            async with bodies.read(request) as body:
                return JSONResponse(await bodies.work(from_bytes, body))

        return Route(path, endpoint, methods=["POST"])

    return [route("/tokenize", _tokenize), route("/detokenize", _detokenize)]


def _tokenize(engines: Engines, raw: Mapping[str, Any]) -> dict[str, Any]:
    body = TokenizeBody.parse(raw)
    engine = _one_engine(engines, body.model)
    if body.messages is not None:
        tokens = encode_messages(engine.tokenizer, body.messages, [], most_tokens=MOST_COUNTED)
    else:
        special = body.add_special_tokens
        tokens = engine.tokenizer.encode(body.prompt or "", add_special_tokens=special, most_tokens=MOST_COUNTED)
    return {"count": len(tokens), "max_model_len": engine.context_length, "tokens": tokens}


def _detokenize(engines: Engines, raw: Mapping[str, Any]) -> dict[str, Any]:
    body = DetokenizeBody.parse(raw)
    engine = _one_engine(engines, body.model)
    check_token_ids(body.tokens, engine, "tokens")
    return {"prompt": engine.tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _one_engine(engines: Engines, model: str | None) -> Engine:
    """Return the engine of a model; it may be left unsaid where there is one."""
    if model is None and len(engines) == 1:
        return next(iter(engines.values()))
    if model is None:
        raise ApiError("model is missing", param="model", code="missing_required_parameter")
    return find_engine(engines, model)


async def _tell_http(request: Request, error: Exception) -> Response:
    """Say in OpenAI's shape what starlette refuses: an unknown path, another method."""
    assert isinstance(error, HTTPException)
    what = "there is nothing at this path" if error.status_code == NOT_FOUND else error.detail
    told = ApiError(what, status=error.status_code, code="not_found" if error.status_code == NOT_FOUND else None)
    return JSONResponse(told.body(), error.status_code, error.headers)


async def _tell_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _tell_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


async def _tell_defect(request: Request, error: Exception) -> Response:
    return error_response(ApiError("the server has a defect; its log says more", status=INTERNAL))
