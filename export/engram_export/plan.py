"""What an export will write and need, told before it starts."""

from collections import Counter
from dataclasses import dataclass
from math import prod

from engram_export.formats import WeightFormat
from engram_export.source import ModelSource
from engram_export.table_writer import written_format
from engram_runtime.manifest import StateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePlan:
    """One Engram site."""

    site: str
    rows: int
    record_bytes: int
    rows_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Sizes in bytes; ``formats`` counts the weight matrices of each format."""

    model: str
    family: str
    context_length: int
    parameters: int
    weights_bytes: int
    formats: dict[str, int]
    tables_bytes: int
    tables_mode: str
    cache_bytes_per_token: int
    state_bytes: int
    peak_memory_bytes: int
    tokenizer: bool
    sites: tuple[SitePlan, ...]


def plan_export(source: ModelSource, chosen: WeightFormat, tables_mode: str, table_dtype: str | None) -> ExportPlan:
    """Work out sizes from shapes alone."""
    skeleton = source.skeleton(chosen)
    states = skeleton.state_specs()
    sites = tuple(
        SitePlan(
            site=table.site,
            rows=table.num_rows,
            record_bytes=written_format(table.record, table_dtype).record_bytes,
            rows_per_token=table.keyer.columns,
        )
        for table in source.tables
    )
    return ExportPlan(
        model=source.checkpoint.source,
        family=source.architecture.text.family,
        context_length=source.context_length,
        parameters=source.weights.count(),
        weights_bytes=sum(parameter.nbytes for parameter in skeleton.parameters()),
        formats=dict(Counter(str(module.label) for module in skeleton.modules() if hasattr(module, "label"))),
        tables_bytes=sum(site.rows * site.record_bytes for site in sites),
        tables_mode=tables_mode,
        cache_bytes_per_token=sum(_bytes(state) // source.context_length for state in states if state.rolls_back),
        state_bytes=sum(_bytes(state) for state in states if not state.rolls_back),
        peak_memory_bytes=0,
        tokenizer=source.checkpoint.tokenizer_json is not None,
        sites=sites,
    )


def _bytes(state: StateSpec) -> int:
    return prod(state.shape) * 4
