"""The recipe of ``--tables-only``: tables, and each site as a graph by itself, without a decoder."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engram_export.checkpoint import open_checkpoint
from engram_export.families import read_tables_source
from engram_export.formats import FLOAT, WeightFormat, weight_format
from engram_export.golden import write_table_golden
from engram_export.onnx_graph import TracedGraph, trace_site
from engram_export.pipeline import (
    GRAPH_FOLDER,
    VERIFY_THREADS,
    ExportOptions,
    Reporter,
    check_scales,
    finish_manifest,
    write_tables,
    write_tokenizer,
)
from engram_export.plan import ExportPlan, SitePlan
from engram_export.repack import RowErrors
from engram_export.site_source import SiteSource, TablesSource
from engram_export.staging import staged_folder
from engram_export.streamed import BundleRows, EncodedRows, streamed_format
from engram_export.table_writer import WrittenTable, check_table_options, checkpoint_site, open_rows, written_format
from engram_export.verify import bundle_rows, exact_graph, verify_tokens
from engram_export.weights_file import SafetensorsWriter
from engram_runtime.bundle import Bundle
from engram_runtime.errors import CheckpointError, RequestError, VerificationError
from engram_runtime.manifest import SITE_GRAPH, GraphSpec, Manifest, ModelInfo

# Largest difference of a graph from torch, as a share of what the site adds: a gate jumps by 5e-4 of it where its score
# changes sign, which other summation orders may move over zero.
SITE_TOLERANCE = 1e-3

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteVerification:
    """Largest differences of a site's output over random streams and the rows of a text.

    Attributes:
        graph: the graph with exact activations against torch with the same weights and rows.
        model: the graph as it will run against the checkpoint's float32 weights and own rows.
        row_errors: of rows that were repacked.
    """

    site: str
    tokens: int
    graph: float
    model: float
    row_errors: RowErrors | None


def export_tables(options: ExportOptions, reporter: Reporter) -> list[SiteVerification]:
    """Export tables and site graphs and verify them; on any failure nothing is left at ``options.out``.

    Raises:
        CheckpointError: the checkpoint can't be exported.
        RequestError: options or a place that can't be.
        VerificationError: the bundle does not compute what the checkpoint's sites do.
    """
    check_options(options)
    source = read_tables_source(open_checkpoint(options.checkpoint))
    chosen = site_format(options.quant)
    check_scales([site.table for site in source.sites], reporter)
    with staged_folder(options.out, replace=options.replace) as folder:
        reporter.plan(plan_tables(source, chosen, options))
        graphs = write_graphs(source, chosen, folder, reporter)
        tables = [site.table for site in source.sites]
        written = write_tables(tables, options.tables, options.table_dtype, folder, reporter)
        write_tokenizer(source.checkpoint, folder)
        bundle = Bundle(folder, draft_manifest(source, options, graphs, written))
        verifications = verify_sites(source, bundle, chosen, written, reporter)
        finish_manifest(bundle, reporter)
    return verifications


def check_options(options: ExportOptions) -> None:
    """Refuse what has no effect without a decoder; raises RequestError."""
    check_table_options(options.tables, options.table_dtype)
    if options.engram is not None:
        raise RequestError("--engram adds a site to a decoder, --tables-only exports none; leave one of them out")
    if options.context is not None:
        raise RequestError("--context is the length of a decoder's caches, --tables-only exports none; leave it out")


def site_format(quant: str) -> WeightFormat:
    """Return the weight format of the sites' linear layers, which are never below int8."""
    if quant == "keep":
        raise CheckpointError("--quant keep takes over integers of a GGUF file, sites have none; use int8 or none")
    return weight_format("int8" if quant == "int4" else quant, lambda name: None)


def plan_tables(source: TablesSource, chosen: WeightFormat, options: ExportOptions) -> ExportPlan:
    """Work out sizes from shapes alone."""
    with FakeTensorMode():
        modules = nn.ModuleList(site.build(chosen.make_linear) for site in source.sites)
    plans = tuple(
        SitePlan(
            site=site.name,
            rows=site.table.num_rows,
            record_bytes=written_format(site.table.record, options.table_dtype).record_bytes,
            rows_per_token=site.config.table.columns,
        )
        for site in source.sites
    )
    return ExportPlan(
        model=source.checkpoint.source,
        family=source.text.family,
        context_length=source.text.max_positions,
        parameters=sum(site.weights.count() for site in source.sites),
        weights_bytes=sum(parameter.nbytes for parameter in modules.parameters()),
        formats=dict(Counter(str(module.label) for module in modules.modules() if hasattr(module, "label"))),
        tables_bytes=sum(plan.rows * plan.record_bytes for plan in plans),
        tables_mode=options.tables,
        cache_bytes_per_token=0,
        state_bytes=0,
        peak_memory_bytes=0,
        tokenizer=source.checkpoint.tokenizer_json is not None,
        sites=plans,
    )


def write_graphs(source: TablesSource, chosen: WeightFormat, folder: Path, reporter: Reporter) -> dict[str, GraphSpec]:
    """Write each site's graph and weights; returns them by their names in the manifest."""
    (folder / GRAPH_FOLDER).mkdir()
    graphs = {}
    for site in source.sites:
        name = f"{SITE_GRAPH}{site.name}"
        reporter.step(f"tracing {name}")
        graphs[name] = write_site(site, name, trace_site(partial(site.build, chosen.make_linear)), folder, reporter)
    return graphs


def write_site(site: SiteSource, name: str, graph: TracedGraph, folder: Path, reporter: Reporter) -> GraphSpec:
    """Stream a site's weights from the checkpoint into the bundle and write its graph beside them."""
    plans, weights = graph.weights(), f"{name}.safetensors"
    with (
        SafetensorsWriter(folder / GRAPH_FOLDER / weights, plans) as writer,
        reporter.stage(f"weights {site.name}", sum(plan.bytes for plan in plans)) as progress,
    ):
        for key, start, values in site.parameters(graph.skeleton):
            writer.write_rows(key, start, values)
            progress(values.nbytes)
    return graph.save(folder / GRAPH_FOLDER / f"{name}.onnx", weights, writer.offsets)


def draft_manifest(
    source: TablesSource, options: ExportOptions, graphs: dict[str, GraphSpec], written: Sequence[WrittenTable]
) -> Manifest:
    """Describe the bundle; its files are listed once they are all there."""
    text = source.text
    model = ModelInfo(
        name=source.checkpoint.source,
        family=text.family,
        quantisation=options.quant,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_layers=text.num_layers,
        context_length=text.max_positions,
    )
    tables = tuple(table.spec for table in written)
    return Manifest(
        producer=f"engram-edge {version('engram-edge')}", model=model, graphs=graphs, tables=tables, files=()
    )


def verify_sites(
    source: TablesSource,
    bundle: Bundle,
    chosen: WeightFormat,
    written: Sequence[WrittenTable],
    reporter: Reporter,
) -> list[SiteVerification]:
    """Hold rows and graphs against the checkpoint on a fixed text; the rows are kept as golden.

    Raises:
        VerificationError: rows that are not the checkpoint's, or a graph that is not its site.
    """
    token_ids = verify_tokens(source.checkpoint, source.text.vocab_size, source.text.max_positions)
    rows = bundle_rows(bundle, token_ids)
    verifications = []
    for site, table, site_rows in zip(source.sites, written, rows, strict=True):
        reporter.step(f"running {SITE_GRAPH}{site.name}")
        with open_rows(site.table) as store:
            own_rows = checkpoint_site(site.table, source.text.vocab_size, store).rows([], token_ids)
        if table.errors is None and not np.array_equal(site_rows, own_rows, equal_nan=True):
            raise VerificationError(f"rows of table {site.name} are not those of the checkpoint; export again")
        graph, model = compare_site(site, bundle, chosen, site_rows, own_rows)
        verifications.append(
            SiteVerification(site=site.name, tokens=len(token_ids), graph=graph, model=model, row_errors=table.errors)
        )
    write_table_golden(bundle, token_ids)
    return verifications


def compare_site(
    site: SiteSource, bundle: Bundle, chosen: WeightFormat, rows: Values, own_rows: Values
) -> tuple[float, float]:
    """Run a site's graph over random streams; returns the two differences of `SiteVerification`.

    Args:
        rows: ``[T, C, d]`` of the bundle. ``own_rows``: of the checkpoint.

    Raises:
        VerificationError: the graph does not compute what torch does with the same weights and rows.
    """
    graph = bundle.manifest.graphs[f"{SITE_GRAPH}{site.name}"]
    shape = (len(rows), site.config.num_streams, site.config.hidden_size)
    hidden = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    reference = site_output(site, FLOAT, site, hidden, own_rows)
    encoded: EncodedRows = site if chosen is FLOAT else BundleRows.open(site, bundle.file(graph.weights))
    with exact_graph(bundle.file(graph.file)) as exact:
        difference = _largest(site_output(site, chosen, encoded, hidden, rows), run_site(exact, site, hidden, rows))
    limit = SITE_TOLERANCE * _largest(reference, hidden)
    if difference > limit:
        raise VerificationError(
            f"the graph of site {site.name} differs from torch by {difference:.2e} with the same weights, at most "
            f"{limit:.2e} is rounding; this is another site"
        )
    return difference, _largest(reference, run_site(bundle.file(graph.file), site, hidden, rows))


def site_output(site: SiteSource, weights: WeightFormat, encoded: EncodedRows, hidden: Values, rows: Values) -> Values:
    """Run a site's torch module on hidden ``[T, G, D]`` and rows ``[T, C, d]``, its weights read as they are needed."""
    module = site.build(streamed_format(weights, encoded).make_linear)
    module.gain.data = torch.from_numpy(site.weights.read("gain"))
    with torch.no_grad():
        output: Values = module(torch.from_numpy(hidden), torch.from_numpy(rows)).numpy()
    return output


def run_site(path: Path, site: SiteSource, hidden: Values, rows: Values) -> Values:
    """Run a site's graph file on onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = VERIFY_THREADS, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"hidden": hidden, f"rows.{site.name}": rows})
    values: Values = output
    return values


def _largest(reference: Values, found: Values) -> float:
    difference = float(np.abs(reference - found).max())
    if not np.isfinite(difference):
        raise VerificationError("a site gives values that are not finite numbers; download the checkpoint again")
    return difference
