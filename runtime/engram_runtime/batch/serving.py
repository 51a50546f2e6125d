"""What answers a batch: an engine of one bundle, asked as its server would be."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram_runtime.batch.answering import Respond
from engram_runtime.commands.loading import Loading
from engram_runtime.errors import TargetError
from engram_runtime.openai_api.errors import TOO_MANY, ApiError
from engram_runtime.serving.engine_protocol import EngineError
from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.tables.opening import Announce, silently


@contextlib.contextmanager
def open_responder(
    bundle: Path, loading: Loading, *, parallel: int, announce: Announce = silently
) -> Iterator[Respond]:
    """Yield what answers requests to a bundle, ``parallel`` texts and `lines_at_once` requests at a time.

    Raises:
        EngramError: as `open_engine`, an extra is missing, or, when answering, the engine has died.
    """
    try:
        from engram_runtime.openai_api.respond import respond
    except ModuleNotFoundError as error:
        raise TargetError(f"engram batch needs {error.name}: pip install 'engram-edge[serve]'") from error
    options = EngineOptions(slots=parallel, queue=lines_at_once(parallel), tables_on=loading.tables_on)
    with open_engine(
        bundle,
        loading.executor,
        options=options,
        threads=loading.threads,
        tables=loading.tables,
        drafts=loading.drafts,
        announce=announce,
    ) as engine:

        async def answer(url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
            try:
                return await respond({engine.name: engine}, url, body)
            except ApiError as error:
                if engine.failure is not None or error.status == TOO_MANY:  # no fault of the request's
                    raise EngineError(str(error)) from error
                raise

        yield answer


def lines_at_once(parallel: int) -> int:
    """Return how many requests are to be under way: those that grow, and as many to take their places at once."""
    return 2 * parallel
