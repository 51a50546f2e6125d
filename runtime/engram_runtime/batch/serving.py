"""What answers a batch: an engine of one bundle, asked as its server would be."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram_runtime.batch.answering import Respond
from engram_runtime.commands.loading import Loading
from engram_runtime.errors import TargetError
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.serving.engine import BundleEngine, EngineOptions
from engram_runtime.tables.opening import Announce, silently

try:
    from engram_runtime.openai_api.respond import respond
except ModuleNotFoundError as error:
    raise TargetError(f"batches need {error.name}: pip install 'engram-edge[serve]'") from error


@contextlib.contextmanager
def open_responder(
    bundle: Path, loading: Loading, *, parallel: int, announce: Announce = silently
) -> Iterator[Respond]:
    """Yield what answers requests to a bundle, ``parallel`` texts at once.

    Raises:
        EngramError: as `BundleEngine.open`; when answering, that the engine has died.
    """
    options = EngineOptions(slots=parallel, queue=at_once(parallel), tables_on=loading.tables_on)
    with BundleEngine.open(...) as engine:

        async def answer(url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
            try:
                return await respond({engine.name: engine}, url, body)
            except ApiError:
                if engine.failure is not None:
                    raise engine.failure from None
                raise

        yield answer
