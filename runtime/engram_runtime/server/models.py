"""The engines a server has, as they come."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from engram_runtime.openai_api.errors import UNAVAILABLE, ApiError
from engram_runtime.serving.engine_protocol import DEGRADED, OK, STATUSES, Engine

LOADING = "loading"
SERVING = frozenset({OK, DEGRADED})
LOADING_RETRY_S = 5.0


class Models:
    """Engines by name, those that are still loading left out.

    Attributes:
        engines: that are loaded; the loading thread adds to it, so take what you need of it once.
        created: when the server began, in seconds since 1970.
    """

    def __init__(self, names: Iterable[str], created: int) -> None:
        self.engines: dict[str, Engine] = {}
        self.created = created
        self._names = frozenset(names)

    def engines_for(self, model: object) -> dict[str, Engine]:
        """Return the engines that are loaded; raises ApiError where ``model`` is one that isn't yet."""
        engines = dict(self.engines)
        if isinstance(model, str) and model in self._names - engines.keys():
            raise ApiError(
                f"model {model!r} is being loaded; ask again once /health says ok",
                status=UNAVAILABLE,
                code="model_loading",
                retry_after_s=LOADING_RETRY_S,
            )
        return engines

    @property
    def status(self) -> str:
        """``loading`` until all are loaded, then the worst `Health.status` of them."""
        engines = dict(self.engines)
        if engines.keys() != self._names:
            return LOADING
        return max((engine.health.status for engine in engines.values()), key=STATUSES.index, default=OK)

    @property
    def troubles(self) -> dict[str, dict[str, Any]]:
        """How those do that aren't ``ok``, as JSON values."""
        healths = {name: engine.health for name, engine in dict(self.engines).items()}
        return {name: asdict(health) for name, health in healths.items() if health.status != OK}
