"""What an export will write and need, told before it starts."""

from dataclasses import dataclass
from math import prod

from engram_export import verify, weight_map
from engram_export.calibration_text import MAX_WINDOWS, WINDOW
from engram_export.decoder import Decoder
from engram_export.formats import WeightFormat, count_formats
from engram_export.linear import Int4Linear
from engram_export.source import ModelSource
from engram_export.table_writer import written_format
from engram_runtime.manifest import StateSpec

# Of the peak, as measured by benchmarks/export_memory.py.
TRACING_BYTES, LAYER_BYTES = 120 << 20, 5 << 19  # what tracing takes, and the graph of a layer
SLICE_COPIES, EXPERT_COPIES = 4, 2.5  # of a float32 slice while it is quantised, less of a larger expert
LOGITS_COPIES = 6  # while they are compared
FLOAT_COPIES, PRODUCT_COPIES = 5, 4  # of a layer, and of the products of one linear layer's inputs, by calibration
TOKENIZER_COPIES = 10  # of tokenizer.json, once it is parsed


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
        peak_memory_bytes=max(peak_memory(source, skeleton), calibration_memory(source, skeleton) if calibrated else 0),
        tokenizer=source.checkpoint.tokenizer_json is not None,
        sites=sites,
    )


def peak_memory(source: ModelSource, skeleton: Decoder) -> int:
    """Predict the bytes of anonymous memory an export takes at most, above the interpreter and its imports."""
    names = [name for name, module in skeleton.named_modules() if hasattr(module, "label")]
    shapes = [source.weights.shape(f"{name}.weight") for name in names]
    slices = [min(prod(shape), max(weight_map.SLICE_BYTES // 4, prod(shape[1:]))) * 4 for shape in shapes]
    vocab_size, tokens = source.architecture.text.vocab_size, min(verify.VERIFY_TOKENS, source.context_length)
    logits = verify.compared_rows(vocab_size, tokens) * vocab_size * 4
    used = [tokens / state.shape[-2] if state.rolls_back else 1 for state in skeleton.state_specs()]
    states = sum(_bytes(state) * share for state, share in zip(skeleton.state_specs(), used, strict=True))
    scales = max(prod(shape) for shape in shapes) // 32 * 4  # onnxruntime decodes them a layer at a time
    verifying = LOGITS_COPIES * logits + 2 * states + 3 * scales + 2 * max(slices)
    encoding = max(SLICE_COPIES * min(max(slices), weight_map.SLICE_BYTES), EXPERT_COPIES * max(slices))
    tokenizer = TOKENIZER_COPIES * len(source.checkpoint.tokenizer_json or b"")
    always = TRACING_BYTES + LAYER_BYTES * source.architecture.text.num_layers + tokenizer
    return always + int(max(encoding, verifying))


def calibration_memory(source: ModelSource, skeleton: Decoder) -> int:
    """Predict the same of calibrating int4: one layer's weights, the products of its inputs and the streams."""
    names = [name for name, module in skeleton.named_modules() if isinstance(module, Int4Linear)]
    layer = [source.weights.shape(f"{name}.weight") for name in names if name.startswith("layers.0.")]
    products = [inputs * inputs * 8 for _, inputs in layer]
    tokens = WINDOW * MAX_WINDOWS * (1 + len(layer))  # every format of every role has a stream of the held-out windows
    vocab_size = source.architecture.text.vocab_size
    logits = verify.compared_rows(vocab_size, WINDOW) * vocab_size * 4
    matrices = FLOAT_COPIES * sum(map(prod, layer)) * 4 + 2 * sum(products) + PRODUCT_COPIES * max(products)
    return TRACING_BYTES + matrices + tokens * source.architecture.text.hidden_size * 4 + LOGITS_COPIES * logits


def _bytes(state: StateSpec) -> int:
    return prod(state.shape) * 4
