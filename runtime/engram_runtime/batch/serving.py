"""What answers a batch: an engine of one bundle, asked as its server would be."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_runtime.batch.answering import Respond
from engram_runtime.commands.loading import Loading
from engram_runtime.errors import TargetError
from engram_runtime.openai_api.errors import TOO_MANY, ApiError
from engram_runtime.serving.engine_protocol import Engine, EngineError
from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.tables.opening import Announce, silently


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How a bundle is to answer.

    Attributes:
        bundle: its folder.
        parallel: how many texts grow at once.
        time_limit_s: seconds after which a text ends as it is.
    """

    bundle: Path
    loading: Loading
    parallel: int
    time_limit_s: float

    @property
    def at_once(self) -> int:
        """How many requests are to be under way: those that grow, and as many to take their places at once."""
        return 2 * self.parallel

    @contextlib.contextmanager
    def open(self, announce: Announce = silently) -> Iterator[Respond]:
        """Yield what answers requests.

        Raises:
            EngramError: as `open_engine`, or an extra is missing.
        """
        options = EngineOptions(slots=self.parallel, queue=self.at_once, tables_on=self.loading.tables_on)
        with open_engine(
            self.bundle.resolve(),  # a model is called by its folder
            self.loading.executor,
            options=options,
            threads=self.loading.threads,
            target=self.loading.target,
            tables=self.loading.tables,
            drafts=self.loading.drafts,
            announce=announce,
        ) as engine:
            yield responder(engine, self.time_limit_s)


def responder(engine: Engine, time_limit_s: float) -> Respond:
    """Return what answers requests with an engine; it raises EngineError for what is no fault of theirs.

    Raises:
        TargetError: an extra is missing.
    """
    try:
        from engram_runtime.openai_api.respond import respond
    except ModuleNotFoundError as error:
        raise TargetError(f"engram batch needs {error.name}: pip install 'engram-edge[serve]'") from error

    async def answer(url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return await respond({engine.name: engine}, url, body, time_limit_s=time_limit_s)
        except ApiError as error:
            if engine.failure is not None or error.status == TOO_MANY:
                raise EngineError(str(error)) from error
            raise

    return answer
