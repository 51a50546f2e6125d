"""A kernel family with other block sizes than its own."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from engram_compilers.kernels.isa import DotIsa, MatrixIsa
from engram_compilers.tuning.sizes import KINDS, Blocks


def tunable(family: ModuleType) -> dict[str, "partial[Any]"]:
    """Return the builders of linear layers that take an instruction set first, by kind of weights, if any."""
    builders = {kind: vars(family).get(f"linear_{kind}") for kind in KINDS}
    return {kind: found for kind, found in builders.items() if isinstance(found, partial) and _isa(found) is not None}


def own_sums(builder: "partial[Any]") -> int:
    """Return how many sums a family keeps where it is told nothing else."""
    isa = _isa(builder)
    assert isa is not None
    return isa.sums


def with_sums(builder: "partial[Any]", sums: int) -> "partial[Any]":
    """Return the builder of a linear layer that keeps another number of sums."""
    isa = _isa(builder)
    assert isa is not None
    return partial(builder.func, replace(isa, sums=sums), *builder.args[1:], **builder.keywords)


def blocked(family: ModuleType, blocks: Blocks) -> ModuleType:
    """Return a kernel family that cuts its linear layers as ``blocks`` say."""
    if not blocks.sizes:
        return family
    made = ModuleType(family.__name__, family.__doc__)
    vars(made).update(vars(family))
    for kind, builder in tunable(family).items():
        sums = {size.rows: size.sums for size in blocks.sizes if size.kind == kind}
        vars(made)[f"linear_{kind}"] = _by_rows(builder, sums)
    return made


def _by_rows(builder: "partial[Any]", sums: Mapping[int, int]) -> Callable[..., Any]:
    built = {rows: with_sums(builder, count) for rows, count in sums.items()}

    def linear(rows: int, out_features: int, in_features: int, planes: int) -> Any:
        return built.get(rows, builder)(rows, out_features, in_features, planes)

    return linear


def _isa(builder: "partial[Any]") -> DotIsa | MatrixIsa | None:
    return next((value for value in builder.args[:1] if isinstance(value, DotIsa | MatrixIsa)), None)
