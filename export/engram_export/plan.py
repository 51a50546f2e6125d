"""What an export will write and need, told before it starts."""

from dataclasses import dataclass
from math import prod

from engram_export.decoder import Decoder
from engram_export.export_memory import ExportSizes, calibration_memory, peak_memory
from engram_export.formats import WeightFormat, count_formats
from engram_export.linear import Int4Linear
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
    """Sizes in bytes.

    Attributes:
        formats: number of weight matrices by format.
        peak_memory_bytes: above the interpreter and its imports, or None where it was never measured.
    """

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
    peak_memory_bytes: int | None
    tokenizer: bool
    sites: tuple[SitePlan, ...]

    @property
    def bundle_bytes(self) -> int:
        """Least size of the bundle: its weights, and the tables that will be in it."""
        return self.weights_bytes + (0 if self.tables_mode == "reference" else self.tables_bytes)


def plan_export(
    source: ModelSource,
    chosen: WeightFormat,
    tables_mode: str,
    table_dtype: str | None,
    *,
    calibrated: bool = False,
) -> ExportPlan:
    """Work out sizes from shapes alone; calibration may then give a role of int4 layers int8."""
    skeleton = source.skeleton(chosen)
    graphs = (skeleton, *source.draft_skeletons(chosen))
    modules = {name: module for graph in graphs for name, module in graph.named_modules()}
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
        weights_bytes=sum(part.nbytes for module in modules.values() for part in module.parameters(recurse=False)),
        formats=count_formats(graphs),
        tables_bytes=sum(site.rows * site.record_bytes for site in sites),
        tables_mode=tables_mode,
        cache_bytes_per_token=sum(_bytes(state) // source.context_length for state in states if state.rolls_back),
        state_bytes=sum(_bytes(state) for state in states if not state.rolls_back),
        peak_memory_bytes=_peak_memory(source, skeleton, calibrated=calibrated),
        tokenizer=source.checkpoint.tokenizer_json is not None,
        sites=sites,
    )


def export_sizes(source: ModelSource, skeleton: Decoder) -> ExportSizes:
    """Return what the memory of an export goes by."""
    names = [name for name, module in skeleton.named_modules() if hasattr(module, "label")]
    text = source.architecture.text
    return ExportSizes(
        shapes=[source.weights.shape(f"{name}.weight") for name in names],
        states=skeleton.state_specs(),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_layers,
        context_length=source.context_length,
        tokenizer_bytes=len(source.checkpoint.tokenizer_json or b""),
    )


def _peak_memory(source: ModelSource, skeleton: Decoder, *, calibrated: bool) -> int:
    sizes = export_sizes(source, skeleton)
    if not calibrated:
        return peak_memory(sizes)
    names = [name for name, module in skeleton.named_modules() if isinstance(module, Int4Linear)]
    layer = [source.weights.shape(f"{name}.weight") for name in names if name.startswith("layers.0.")]
    return max(peak_memory(sizes), calibration_memory(sizes, layer))


def _bytes(state: StateSpec) -> int:
    return prod(state.shape) * 4
