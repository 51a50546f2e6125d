"""Weights of a module by name: which tensors of the checkpoint each one is made of, and none left over."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engram_export.checkpoint import TensorSource
from engram_runtime.errors import CheckpointError

LISTED_NAMES = 8  # names shown in an error before it says how many more there are


class WeightSource:
    """The weights a module wants, read from the checkpoint when asked for."""

    def __init__(
        self,
        tensors: TensorSource,
        wanted: Mapping[str, tuple[int, ...]],
        name_map: Mapping[str, tuple[str, ...]],
        *,
        ignored: Sequence[str] = (),
    ) -> None:
        """Resolve every wanted name.

        Args:
            wanted: shapes of the module's weights by name, such as ``layers.3.qkv.weight``.
            name_map: patterns of wanted names to patterns of tensor names; ``{layer}`` stands for a number.
            ignored: patterns of tensors that may stay unused.

        Raises:
            CheckpointError: tensors are missing, would be dropped or have another shape, by name.
        """
        self._tensors = tensors
        self._sources = {name: _sources_of(name, name_map) for name in wanted}
        available = set(tensors.names())
        used = {source for sources in self._sources.values() for source in sources}
        if missing := sorted(used - available):
            raise CheckpointError(f"the checkpoint lacks {_listed(missing)}; it is incomplete")
        unused = sorted(name for name in available - used if not _matches_any(name, ignored))
        if unused:
            raise CheckpointError(f"the checkpoint has {_listed(unused)} that this family doesn't know")
        for name, shape in wanted.items():
            self._check_shape(name, shape)

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Return the tensors a weight is made of."""
        return self._sources[name]

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a weight: its tensors joined along the first axis."""
        parts = [self._tensors.read(source) for source in self._sources[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        shapes = {source: self._tensors.shape(source) for source in self._sources[name]}
        joinable = all(len(shape) == len(wanted) and shape[1:] == wanted[1:] for shape in shapes.values())
        if not joinable or sum(shape[0] for shape in shapes.values()) != wanted[0]:
            found = " and ".join(f"{source} {list(shape)}" for source, shape in shapes.items())
            raise CheckpointError(
                f"the checkpoint has {found}, its config wants {list(wanted)}; they don't belong together"
            )


def _sources_of(name: str, name_map: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    for pattern, sources in name_map.items():
        if match := _pattern(pattern).fullmatch(name):
            return tuple(source.format(**match.groupdict()) for source in sources)
    raise AssertionError(f"module weight {name} stands in no name map")


def _matches_any(name: str, patterns: Sequence[str]) -> bool:
    return any(_pattern(pattern).fullmatch(name) for pattern in patterns)


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)"))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return f"{len(names)} tensors: {', '.join(names[:LISTED_NAMES])}{more}"
