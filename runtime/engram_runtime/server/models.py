"""The engines a server has, as they come."""

from collections.abc import Iterable

from engram_runtime.serving.engine_protocol import Engine


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

    @property
    def status(self) -> str:
        """``loading`` until all are loaded, then ``ok``, or ``failed`` once one has died."""
        engines = dict(self.engines)
        if engines.keys() != self._names:
            return "loading"
        return "ok" if all(engine.failure is None for engine in engines.values()) else "failed"
