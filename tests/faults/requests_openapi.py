"""Row D1: what schemathesis makes of the server's own OpenAPI document, sound requests and unsound ones."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.generation.case import Case
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from tests.faults.requests_asgi import toy_app
from tests.faults.row import Outcome, Row

from engram_runtime.server.openapi import openapi_document

CHECKS = [
    *(not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance),
    negative_data_rejection,
]
HERE = "http://127.0.0.1"
WEIGHT = 10  # of a route with a body, over one without


def schema_cases(count: int) -> Outcome:
    """Send so many requests that follow the document, or break it in one place."""
    failures: list[str] = []
    statuses: Counter[int] = Counter()
    with toy_app() as app:
        schema = schemathesis.openapi.from_dict(_document())
        schema.app = app
        operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
        weights = [WEIGHT if operation.method == "post" else 1 for operation in operations]
        for operation, weight in zip(operations, weights, strict=True):
            share = count * weight // (2 * sum(weights)) + 1
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _send(operation, mode, share, statuses, failures)
    tried = statuses.total()
    figure = ", ".join(f"{times:,} x {status}" for status, times in sorted(statuses.items()))
    return Outcome(tried=tried, survived=tried - len(failures), figure=figure, failures=tuple(failures[:10]))


def _document() -> dict[str, Any]:
    """Return the server's document, which names the only model there is: else all but all answers were 404."""
    document = openapi_document()
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            required = "model" in schema.get("required", ())
            schema["properties"]["model"] = {"enum": ["toy"] if required else ["toy", None]}
    return document


def _send(
    operation: APIOperation[Any, Any, Any, Any],
    mode: GenerationMode,
    count: int,
    statuses: Counter[int],
    failures: list[str],
) -> None:
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case[Any]) -> None:
        response = case.call(base_url=HERE)
        statuses[response.status_code] += 1
        try:
            case.validate_response(response, checks=CHECKS)
        except (Failure, FailureGroup) as error:
            failures.append(f"{operation.label} {_told(error)}: {case.as_curl_command()[:400]}")

    send()


def _told(error: Failure | FailureGroup) -> str:
    each: Sequence[BaseException] = error.exceptions if isinstance(error, FailureGroup) else [error]
    return "; ".join(str(part).replace("\n", " ")[:300] for part in each)


ROWS = (
    Row(
        name="D1 schemathesis",
        fault="what schemathesis makes of the OpenAPI document, sound or broken in one place",
        expected="answers as documented, 0 of 5xx, unsound bodies refused",
        quick=600,
        full=50_000,
        run=schema_cases,
    ),
)
