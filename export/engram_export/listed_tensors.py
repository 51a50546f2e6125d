"""The tensors of a folder whose shards aren't all there: what its index says of them."""

from collections.abc import Sequence
from typing import NoReturn

from engram_runtime.errors import CheckpointError


class ListedTensors:
    """Names without shapes, and ``total_bytes`` of all tensors where the index tells."""

    def __init__(self, names: Sequence[str], total_bytes: int | None) -> None:
        self._names = names
        self.total_bytes = total_bytes

    def names(self) -> list[str]:
        """List the tensors in the order of the index."""
        return list(self._names)

    def shape(self, name: str) -> NoReturn:
        """Refuse, as all that would read a shard does."""
        raise CheckpointError(f"the file that holds {name!r} is not here; download the model's safetensors files")

    def read(self, name: str) -> NoReturn:
        """See `shape`."""
        self.shape(name)

    def read_rows(self, name: str, start: int, stop: int) -> NoReturn:
        """See `shape`."""
        self.shape(name)
