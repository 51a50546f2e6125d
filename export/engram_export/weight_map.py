"""Weights of a module by name: which tensors of the checkpoint each one is made of, and none left over."""

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_export.checkpoint import TensorSource
from engram_runtime.errors import CheckpointError

LISTED_NAMES = 8  # names shown in an error before it says how many more there are
SLICE_BYTES = 64 << 20  # of a float32 weight in memory at a time; quantising it needs about five times as much

Floats = NDArray[np.float32]
Slice = tuple[str, int, NDArray[Any]]  # a parameter's name, the first of its rows that these are, their values
ReadRows = Callable[[int, int], NDArray[Any]]  # rows of a parameter's first axis


class Recipe(Protocol):
    """How a weight is made of tensors; rows are those of the weight's first axis."""

    def tensors(self, rows: int) -> list[str]:
        """Name the tensors a weight of so many rows is made of."""
        ...

    def shape(self, source: TensorSource, rows: int) -> tuple[int, ...] | None:
        """Return the weight's shape, or None where the tensors don't fit together."""
        ...

    def read(self, source: TensorSource, start: int, stop: int) -> Floats:
        """Read rows; nothing else of the tensors is read."""
        ...


@dataclass(frozen=True, slots=True, init=False)
class Joined:
    """Tensors joined along the first axis."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def tensors(self, rows: int) -> list[str]:
        """See `Recipe`."""
        return list(self.names)

    def shape(self, source: TensorSource, rows: int) -> tuple[int, ...] | None:
        """See `Recipe`."""
        shapes = [source.shape(name) for name in self.names]
        if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
            return None
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def read(self, source: TensorSource, start: int, stop: int) -> Floats:
        """See `Recipe`."""
        parts, first = [], 0
        for name in self.names:
            end = first + source.shape(name)[0]
            if start < end and first < stop:
                parts.append(source.read_rows(name, max(start, first) - first, min(stop, end) - first))
            first = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class Stacked:
    """One row per expert: the expert's own tensors joined along their first axis; ``{expert}`` is its number."""

    names: tuple[str, ...]

    def tensors(self, rows: int) -> list[str]:
        """See `Recipe`."""
        return [name for expert in range(rows) for name in self._of(expert).names]

    def shape(self, source: TensorSource, rows: int) -> tuple[int, ...] | None:
        """See `Recipe`."""
        shapes = {self._of(expert).shape(source, 0) for expert in range(rows)}
        shape = shapes.pop()
        return None if shapes or shape is None else (rows, *shape)

    def read(self, source: TensorSource, start: int, stop: int) -> Floats:
        """See `Recipe`."""
        rows = [source.shape(name)[0] for name in self._of(start).names]
        weight = np.empty((stop - start, sum(rows), *source.shape(self._of(start).names[0])[1:]), dtype=np.float32)
        for expert, values in enumerate(weight, start):
            for name, part in zip(self._of(expert).names, np.split(values, np.cumsum(rows)[:-1]), strict=True):
                for first, last in row_slices(part.shape):
                    part[first:last] = source.read_rows(name, first, last)
        return weight

    def _of(self, expert: int) -> Joined:
        return Joined(*(name.format(expert=expert) for name in self.names))


@dataclass(frozen=True, slots=True)
class HeadPart:
    """Of each head's rows, laid out as ``parts`` equal parts, the part number ``part``."""

    name: str
    head_dim: int
    parts: int
    part: int

    def tensors(self, rows: int) -> list[str]:
        """See `Recipe`."""
        return [self.name]

    def shape(self, source: TensorSource, rows: int) -> tuple[int, ...] | None:
        """See `Recipe`."""
        shape = source.shape(self.name)
        return (shape[0] // self.parts, *shape[1:]) if shape and shape[0] % (self.parts * self.head_dim) == 0 else None

    def read(self, source: TensorSource, start: int, stop: int) -> Floats:
        """See `Recipe`."""
        first, last = start // self.head_dim, -(-stop // self.head_dim)
        period = self.parts * self.head_dim
        rows = source.read_rows(self.name, first * period, last * period)
        wanted = rows.reshape(last - first, self.parts, self.head_dim, *rows.shape[1:])[:, self.part]
        flat = wanted.reshape(-1, *rows.shape[1:])
        return np.ascontiguousarray(flat[start - first * self.head_dim : stop - first * self.head_dim])


@dataclass(frozen=True, slots=True)
class Chained:
    """Weights of other recipes joined along the first axis; ``parts`` are recipes and their rows."""

    parts: tuple[tuple[Recipe, int], ...]

    def tensors(self, rows: int) -> list[str]:
        """See `Recipe`."""
        return [name for recipe, count in self.parts for name in recipe.tensors(count)]

    def shape(self, source: TensorSource, rows: int) -> tuple[int, ...] | None:
        """See `Recipe`."""
        shapes = [recipe.shape(source, count) for recipe, count in self.parts]
        if any(shape is None or shape[0] != count for shape, (_, count) in zip(shapes, self.parts, strict=True)):
            return None
        inner = {shape[1:] for shape in shapes if shape}
        return (sum(count for _, count in self.parts), *inner.pop()) if len(inner) == 1 else None

    def read(self, source: TensorSource, start: int, stop: int) -> Floats:
        """See `Recipe`."""
        found, first = [], 0
        for recipe, count in self.parts:
            if start < first + count and first < stop:
                found.append(recipe.read(source, max(start - first, 0), min(stop - first, count)))
            first += count
        return found[0] if len(found) == 1 else np.concatenate(found)


@dataclass(frozen=True, slots=True)
class Mapped:
    """A weight whose values, or whose rows' shape, are changed as they are read."""

    recipe: Recipe
    change: Callable[[Floats], Floats]

    def tensors(self, rows: int) -> list[str]:
        """See `Recipe`."""
        return self.recipe.tensors(rows)

    def shape(self, source: TensorSource, rows: int) -> tuple[int, ...] | None:
        """See `Recipe`."""
        return self.recipe.shape(source, rows)

    def read(self, source: TensorSource, start: int, stop: int) -> Floats:
        """See `Recipe`."""
        return self.change(self.recipe.read(source, start, stop))


def row_slices(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return row ranges of a weight of this shape, each of about `SLICE_BYTES` as float32."""
    rows, *inner = shape
    step = max(1, SLICE_BYTES // (prod(inner) * 4))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def one_plus(name: str) -> Mapped:
    """Return a norm's gain that the checkpoint stores as its distance from one."""
    return Mapped(Joined(name), lambda gain: 1 + gain)


NameMap = Mapping[str, Recipe]


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """Factors ``rows [N]``, and ``columns [K]`` of a matrix, that a weight is multiplied by as it is read."""

    rows: Floats
    columns: Floats | None

    def apply(self, values: Floats, start: int, stop: int) -> Floats:
        """Scale ``values``, rows ``start`` to ``stop`` of the weight."""
        if self.columns is None:
            return values * self.rows[start:stop]
        return values * self.rows[start:stop, None] * self.columns


class WeightSource:
    """The weights a module wants, read from the checkpoint when asked for."""

    def __init__(
        self,
        tensors: TensorSource,
        wanted: Mapping[str, tuple[int, ...]],
        name_map: NameMap,
        *,
        ignored: Sequence[str] = (),
        ignored_names: Collection[str] = (),
    ) -> None:
        """Resolve every wanted name.

        Args:
            wanted: shapes of the module's weights by name, such as ``layers.3.attention.qkv.weight``.
            ignored: regular expressions of tensors that may stay unused.
            ignored_names: tensors that may stay unused as well, by name.

        Raises:
            CheckpointError: tensors are missing, would be dropped or have another shape, by name.
        """
        self._tensors = tensors
        self._shapes = dict(wanted)
        self._scales: Mapping[str, Scale] = {}
        self._recipes = {name: name_map[name] for name in wanted}
        available = set(tensors.names())
        used = {tensor for name in wanted for tensor in self.tensor_names(name)}
        if missing := sorted(used - available):
            raise CheckpointError(f"the checkpoint lacks {_listed(missing)}; it is incomplete")
        known = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or "(?!)")
        unused = sorted(name for name in available.difference(used, ignored_names) if not known.fullmatch(name))
        if unused:
            raise CheckpointError(f"the checkpoint has {_listed(unused)} that this family doesn't know")
        for name in wanted:
            self._check_shape(name)

    def scaled(self, scales: Mapping[str, Scale]) -> "WeightSource":
        """Return a source of the same weights, those of these names scaled."""
        source = copy.copy(self)
        source._scales = scales
        return source

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape."""
        return self._shapes[name]

    def count(self) -> int:
        """Return the number of parameters."""
        return sum(prod(shape) for shape in self._shapes.values())

    def tensor_names(self, name: str) -> list[str]:
        """Return the tensors a weight is made of."""
        return self._recipes[name].tensors(self._shapes[name][0])

    def read(self, name: str) -> Floats:
        """Read a whole weight."""
        return self.read_rows(name, 0, self._shapes[name][0])

    def row_slices(self, name: str) -> list[tuple[int, int]]:
        """Return row ranges of a weight, see `row_slices`."""
        return row_slices(self._shapes[name])

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Read ``[stop - start, ...]`` rows of a weight's first axis; only their bytes are read."""
        values = self._recipes[name].read(self._tensors, start, stop).reshape(stop - start, *self._shapes[name][1:])
        return self._scales[name].apply(values, start, stop) if name in self._scales else values

    def _check_shape(self, name: str) -> None:
        wanted = self._shapes[name]
        shape = self._recipes[name].shape(self._tensors, wanted[0])
        if shape != wanted:
            found = " and ".join(f"{tensor} {list(self._tensors.shape(tensor))}" for tensor in self._telling(name))
            raise CheckpointError(
                f"the checkpoint has {found}, its config wants {list(wanted)}; they don't belong together"
            )

    def _telling(self, name: str) -> list[str]:
        """Return the tensors of a weight, or of many the first one of each shape."""
        tensors = self.tensor_names(name)
        if len(tensors) <= LISTED_NAMES:
            return tensors
        first = {self._tensors.shape(tensor): tensor for tensor in reversed(tensors)}
        return sorted(first.values(), key=tensors.index)[:LISTED_NAMES]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return f"{len(names)} tensors: {', '.join(names[:LISTED_NAMES])}{more}"
