"""What an export will write and need, told before it starts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engram_export.formats import WeightFormat
from engram_export.source import ModelSource
from engram_export.table_writer import written_format

LARGEST_WEIGHT_COPIES = 4  # a float weight, its scaled copy, its rounded copy and its codes are alive at once


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
    peak_memory_bytes: int
    tokenizer: bool
    sites: tuple[SitePlan, ...]


def plan_export(source: ModelSource, chosen: WeightFormat, tables_mode: str, table_dtype: str | None) -> ExportPlan:
    """Work out sizes from shapes alone."""
    config = source.config
    skeleton = source.skeleton(chosen)
    float_sizes = [int(shape.numel()) for shape in source.float_shapes()]
    sites = tuple(
        SitePlan(
            site=site.config.site,
            rows=site.config.num_rows,
            record_bytes=written_format(site.table().record, table_dtype).record_bytes,
            rows_per_token=site.config.num_columns,
        )
        for site in source.sites
    )
    return ExportPlan(
        model=source.checkpoint.source,
        family=config.family,
        context_length=source.context_length,
        parameters=sum(float_sizes),
        weights_bytes=sum(parameter.nbytes for parameter in skeleton.parameters()),
        formats=dict(Counter(str(module.label) for module in skeleton.modules() if hasattr(module, "label"))),
        tables_bytes=sum(site.rows * site.record_bytes for site in sites),
        tables_mode=tables_mode,
        cache_bytes_per_token=config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4,
        peak_memory_bytes=_peak_memory(float_sizes),
        tokenizer=source.checkpoint.tokenizer_json is not None,
        sites=sites,
    )


def _peak_memory(float_sizes: Sequence[int]) -> int:
    """Return the larger of the two moments that hold most: quantising the largest weight, verifying the model."""
    return max(max(float_sizes) * 4 * LARGEST_WEIGHT_COPIES, sum(float_sizes) * 4)
