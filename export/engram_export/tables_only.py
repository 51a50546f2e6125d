"""The recipe of ``--tables-only``: tables, and each site as a graph by itself, without a decoder."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engram_export.calibration_text import check_calibration
from engram_export.checkpoint import open_checkpoint
from engram_export.families import read_tables_source
from engram_export.formats import WeightFormat, count_formats, weight_format
from engram_export.graph_writer import GRAPH_FOLDER
from engram_export.journal import Journal
from engram_export.model_card import site_parity, write_card
from engram_export.onnx_graph import TracedGraph, trace_site
from engram_export.pipeline import (
    ExportOptions,
    Progress,
    Reporter,
    check_scales,
    export_fingerprint,
    finish_manifest,
    producer,
    report_resumption,
    write_tables,
    write_tokenizer,
)
from engram_export.plan import ExportPlan, SitePlan
from engram_export.site_source import SiteSource, TablesSource
from engram_export.site_verify import SiteVerification, verify_sites
from engram_export.staging import staged_folder
from engram_export.table_writer import WrittenTable, check_table_options, written_format
from engram_export.weights_file import WEIGHTS_ALIGNMENT, SafetensorsWriter
from engram_runtime.bundle import Bundle
from engram_runtime.disk_space import check_space
from engram_runtime.errors import CheckpointError, RequestError
from engram_runtime.manifest import SITE_GRAPH, GraphSpec, Manifest, ModelInfo
from engram_runtime.safetensors_layout import SafetensorsLayout


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
    plan = plan_tables(source, chosen, options)
    place = staged_folder(
        options.out, export_fingerprint(options), replace=options.replace, num_bytes=plan.bundle_bytes
    )
    with place as journal:
        reporter.plan(plan)
        check_space(options.out, plan.bundle_bytes - journal.kept_bytes)
        report_resumption(journal, reporter)
        graphs = write_graphs(source, chosen, journal, reporter)
        tables = [site.table for site in source.sites]
        written = write_tables(tables, options.tables, options.table_dtype, journal, reporter)
        write_tokenizer(source.checkpoint, journal.folder)
        bundle = Bundle(journal.folder, draft_manifest(source, options, graphs, written))
        verifications = verify_sites(source, bundle, chosen, written, reporter)
        write_card(bundle, source.checkpoint, None, plan.formats, site_parity(verifications))
        finish_manifest(bundle, journal, reporter)
    return verifications


def check_options(options: ExportOptions) -> None:
    """Refuse what has no effect without a decoder; raises RequestError."""
    check_table_options(options.tables, options.table_dtype)
    check_calibration(options.quant, options.calibration)
    if options.engram is not None:
        raise RequestError("--engram adds a site to a decoder, --tables-only exports none; leave one of them out")
    if options.context is not None:
        raise RequestError("--context is the length of a decoder's caches, --tables-only exports none; leave it out")
    if options.embeddings:
        raise RequestError("--embeddings adds an input to a decoder, --tables-only exports none; leave one of them out")
    if options.quant == "int4":
        raise RequestError("--quant int4 is for layers of a decoder, sites have none below int8; use int8 or none")


def site_format(quant: str) -> WeightFormat:
    """Return the weight format of the sites' linear layers, which are never below int8."""
    if quant == "keep":
        raise CheckpointError("--quant keep takes over integers of a GGUF file, sites have none; use int8 or none")
    return weight_format(quant, lambda name: None)


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
        formats=count_formats([modules]),
        tables_bytes=sum(plan.rows * plan.record_bytes for plan in plans),
        tables_mode=options.tables,
        cache_bytes_per_token=0,
        state_bytes=0,
        peak_memory_bytes=None,
        tokenizer=source.checkpoint.tokenizer_json is not None,
        sites=plans,
    )


def write_graphs(
    source: TablesSource, chosen: WeightFormat, journal: Journal, reporter: Reporter
) -> dict[str, GraphSpec]:
    """Write each site's graph and weights; returns them by their names in the manifest."""
    (journal.folder / GRAPH_FOLDER).mkdir(exist_ok=True)
    graphs = {}
    for site in source.sites:
        name = f"{SITE_GRAPH}{site.name}"
        reporter.step(f"tracing {name}")
        graphs[name] = write_site(site, name, trace_site(partial(site.build, chosen.make_linear)), journal, reporter)
    return graphs


def write_site(site: SiteSource, name: str, graph: TracedGraph, journal: Journal, reporter: Reporter) -> GraphSpec:
    """Stream a site's weights from the checkpoint into the bundle and write its graph beside them."""
    folder, plans = journal.folder / GRAPH_FOLDER, graph.weights()
    path = folder / f"{name}.safetensors"
    with reporter.stage(f"weights {site.name}", sum(plan.bytes for plan in plans)) as progress:
        journal.once(path, lambda: write_site_weights(site, graph, path, progress), progress)
    layout = SafetensorsLayout.of(plans, alignment=WEIGHTS_ALIGNMENT)
    return graph.save(folder / f"{name}.onnx", path.name, layout.offsets)


def write_site_weights(site: SiteSource, graph: TracedGraph, path: Path, progress: Progress) -> None:
    """Write the weights of a site's graph."""
    with SafetensorsWriter(path, graph.weights()) as writer:
        for key, start, values in site.parameters(graph.skeleton):
            writer.write_rows(key, start, values)
            progress(values.nbytes)


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
    return Manifest(producer=producer(), model=model, graphs=graphs, tables=tables, files=())
