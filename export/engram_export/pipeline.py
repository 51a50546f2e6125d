"""The recipe of an export, in reading order."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_export.calibration import CALIBRATION_FILE, Calibrated, calibrate, read_calibration
from engram_export.calibration_text import BUILT_IN, NONE, Windows, check_calibration
from engram_export.checkpoint import Checkpoint
from engram_export.exact_graph import GraphLogits, exact_drafts, exact_logits
from engram_export.export_memory import compared_rows
from engram_export.families.reading import text_part
from engram_export.formats import FLOAT, KEPT_BITS, count_formats, weight_format
from engram_export.golden import write_golden
from engram_export.graph_writer import trace_graphs, write_graphs, write_vocabulary
from engram_export.host_table import TableSource
from engram_export.journal import Journal, fingerprint
from engram_export.model_card import decoder_parity, write_card
from engram_export.plan import ExportPlan, plan_export
from engram_export.source import ModelSource, has_experts, open_source
from engram_export.staging import staged_folder
from engram_export.streamed import BundleRows, ReportedRows
from engram_export.table_writer import (
    WrittenTable,
    check_table_options,
    copy_table,
    reference_table,
    repack_table,
    write_token_map,
    written_format,
)
from engram_export.verify import (
    Parity,
    Verification,
    bundle_rows,
    check_parity,
    compare,
    reference_drafts,
    reference_logits,
    verify_tokens,
)
from engram_runtime.bundle import MANIFEST_NAME, Bundle, manifest_bytes
from engram_runtime.disk_space import check_space
from engram_runtime.errors import CheckpointError
from engram_runtime.manifest import FileEntry, GraphSpec, Manifest, ModelInfo
from engram_runtime.table_spec import TableSpec

Progress = Callable[[int], None]
TABLE_FOLDER = "tables"
VERIFY_THREADS = 1  # each decodes an expert of its own to float32
PLACES = ("checkpoint", "engram", "out", "replace")  # options that don't decide what is in the bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What the user asked for."""

    checkpoint: Path
    out: Path
    quant: str
    tables: str
    table_dtype: str | None = None
    context: int | None
    engram: Path | None
    replace: bool
    calibration: str = BUILT_IN
    embeddings: bool = False


class Reporter(Protocol):
    """Is told how an export goes."""

    def plan(self, plan: ExportPlan) -> None:
        """Show what is about to happen, before anything is written."""
        ...

    def step(self, title: str) -> None:
        """Show that something without a measure begins."""
        ...

    def stage(self, title: str, total_bytes: int) -> AbstractContextManager[Progress]:
        """Show a stage's progress; the callable is told the bytes of each step."""
        ...


def export_bundle(options: ExportOptions, reporter: Reporter) -> Verification:
    """Export a checkpoint into a bundle and verify it; on any failure nothing is left at ``options.out``.

    What an interrupted export had finished is taken over where the checkpoint and the options are the same.

    Raises:
        CheckpointError: the checkpoint can't be exported.
        RequestError: a place or context that can't be.
        VerificationError: the bundle does not compute what the checkpoint's model does.
    """
    check_table_options(options.tables, options.table_dtype)
    check_calibration(options.quant, options.calibration)
    source = open_source(
        options.checkpoint, engram=options.engram, context=options.context, embeddings=options.embeddings
    )
    chosen = weight_format(options.quant, source.kept_type)
    text = read_calibration(source, options.quant, options.calibration)
    calibrating = isinstance(text, Windows)
    plan = plan_export(source, chosen, options.tables, options.table_dtype, calibrated=calibrating)
    check_kept(options.quant, plan)
    token_ids = verify_tokens(source.checkpoint, source.architecture.text.vocab_size, source.context_length)
    check_scales(source.tables, reporter)
    place = staged_folder(
        options.out, export_fingerprint(options), replace=options.replace, num_bytes=plan.bundle_bytes
    )
    with place as journal:
        reporter.plan(plan)
        check_space(options.out, plan.bundle_bytes - journal.kept_bytes)
        report_resumption(journal, reporter)
        calibrated = calibrate(source, chosen, text, journal, reporter)
        reporter.step("tracing the graph")
        traced = trace_graphs(calibrated.source, calibrated.weights)
        graphs = write_graphs(calibrated.source, traced, journal, reporter.stage)
        vocabulary = write_vocabulary(source, journal)
        written = write_tables(source.tables, options.tables, options.table_dtype, journal, reporter)
        write_tokenizer(source.checkpoint, journal.folder)
        manifest = draft_manifest(source, options.quant, graphs, vocabulary, tuple(table.spec for table in written))
        bundle = Bundle(journal.folder, manifest)
        repacked = options.table_dtype is not None
        verification = verify_bundle(source, bundle, calibrated, token_ids, reporter, repacked=repacked)
        if calibrated.report is not None:
            calibrated.report.write(bundle.path)
        errors = {table.spec.site: table.errors for table in written if table.errors is not None}
        verification = dataclasses.replace(verification, rows=errors, calibration=calibrated.report)
        formats = count_formats(graph.skeleton for graph in traced.values())
        write_card(bundle, source.checkpoint, options.engram, formats, decoder_parity(verification))
        finish_manifest(bundle, journal, reporter)
        (journal.folder / CALIBRATION_FILE).unlink(missing_ok=True)
    return verification


def export_fingerprint(options: ExportOptions) -> str:
    """Return what tells whether another export writes the same bundle."""
    places = [options.checkpoint, *([options.engram] if options.engram is not None else [])]
    if options.calibration not in (BUILT_IN, NONE):
        places.append(Path(options.calibration))
    files = itertools.chain.from_iterable(_files(place) for place in places)
    asked = {key: str(value) for key, value in dataclasses.asdict(options).items() if key not in PLACES}
    return fingerprint({"producer": producer(), **asked}, files)


def _files(place: Path) -> Iterator[Path]:
    return (path for path in place.iterdir() if path.is_file()) if place.is_dir() else iter([place])


def report_resumption(journal: Journal, reporter: Reporter) -> None:
    """Say what becomes of what an interrupted export left."""
    if journal.kept:
        reporter.step(f"resuming an interrupted export, {len(journal.kept)} files are finished")
    if journal.dropped:
        reporter.step("starting anew: an interrupted export was of another checkpoint or had other options")


def check_kept(quant: str, plan: ExportPlan) -> None:
    """Refuse ``keep`` where there is nothing to keep, rather than make an int8 bundle under another name."""
    if quant == "keep" and not set(KEPT_BITS) & set(plan.formats):
        raise CheckpointError(f"{plan.model} has no linear layer in {' or '.join(KEPT_BITS)} to keep; use --quant int8")


def check_scales(tables: Sequence[TableSource], reporter: Reporter) -> None:
    """Read every scale of the tables: one that is no number must be found before anything is written."""
    for table in tables:
        if table.scales_bytes:
            with reporter.stage(f"scales {table.site}", table.scales_bytes) as progress:
                table.check_scales(progress)


def write_tables(
    tables: Sequence[TableSource], mode: str, dtype: str | None, journal: Journal, reporter: Reporter
) -> list[WrittenTable]:
    """Copy the tables, repack them as ``dtype``, or refer to them."""
    if not tables:
        return []
    folder = journal.folder / TABLE_FOLDER
    folder.mkdir(exist_ok=True)
    written = []
    for table in tables:
        keyer = write_token_map(table, folder, journal.once)
        if mode == "reference":
            written.append(WrittenTable(spec=reference_table(table, keyer), errors=None))
            continue
        total = table.num_rows * written_format(table.record, dtype).record_bytes
        with reporter.stage(f"table {table.site}", total) as progress:
            if dtype is None:
                written.append(copy_table(table, keyer, folder, progress, journal.once))
            else:
                written.append(repack_table(table, keyer, dtype, folder, progress, journal.once))
    return written


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer and its settings as the checkpoint has them."""
    generation_config = dict(checkpoint.generation_config)
    text_config = text_part(checkpoint).config
    if "eos_token_id" in text_config:
        generation_config.setdefault("eos_token_id", text_config["eos_token_id"])
    if checkpoint.tokenizer_json is not None:
        (folder / "tokenizer.json").write_bytes(checkpoint.tokenizer_json)
    for name, values in (
        ("tokenizer_config.json", checkpoint.tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        if values:
            (folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
    if checkpoint.chat_template is not None:
        (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")


def producer() -> str:
    """Return the program and version that writes a bundle."""
    return f"engram-edge {version('engram-edge')}"


def draft_manifest(
    source: ModelSource,
    quant: str,
    graphs: Mapping[str, GraphSpec],
    draft_vocabulary: str | None,
    tables: tuple[TableSpec, ...],
) -> Manifest:
    """Describe the bundle; its files are listed once they are all there."""
    config = source.architecture.text
    model = ModelInfo(
        name=source.checkpoint.source,
        family=config.family,
        quantisation=quant,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        context_length=source.context_length,
    )
    return Manifest(
        producer=producer(),
        model=model,
        graphs=graphs,
        tables=tables,
        draft_vocabulary=draft_vocabulary,
        files=(),
    )


def verify_bundle(
    source: ModelSource,
    bundle: Bundle,
    calibrated: Calibrated,
    token_ids: NDArray[np.int64],
    reporter: Reporter,
    *,
    repacked: bool,
) -> Verification:
    """Hold the graph against torch with the same weights, and the bundle against the float32 model, on a text.

    What the bundle said is kept as golden.

    Args:
        repacked: the bundle's rows are not the checkpoint's, so the graph is held against torch with those rows.

    Raises:
        VerificationError: the graph is not the model.
    """
    last = compared_rows(bundle.manifest.model.vocab_size, len(token_ids))
    with reporter.stage("verify", source.weights.count() * 4) as progress:
        reference = reference_logits(source, token_ids, encoded=ReportedRows(source, progress), last=last)
    reporter.step("running the graph")
    same_weights = reference
    stored = BundleRows.open(calibrated.source, bundle.file(bundle.manifest.decoder.weights))
    if repacked or calibrated.weights is not FLOAT:
        rows = bundle_rows(bundle, token_ids) if repacked else None
        same_weights = reference_logits(
            calibrated.source, token_ids, calibrated.weights, encoded=stored, rows=rows, last=last
        )
    found = exact_logits(bundle, token_ids, rows=last, threads=VERIFY_THREADS)
    graph, model = compare(same_weights, found.last), compare(reference, found.last)
    check_parity(graph, routed=has_experts(source))
    drafts, draft = None, None
    if source.draft is not None and len(token_ids) > 1:
        drafts, draft = verify_drafts(calibrated, bundle, token_ids[1:], found.hidden[:-1], stored)
    write_golden(bundle, token_ids, found, model, drafts)
    return Verification(graph=graph, model=model, draft=draft)


def verify_drafts(
    calibrated: Calibrated,
    bundle: Bundle,
    token_ids: NDArray[np.int64],
    hidden: NDArray[np.float32],
    stored: BundleRows,
) -> tuple[GraphLogits, Parity]:
    """Hold the draft head's graph against torch with the same weights, for ``[T]`` tokens and ``hidden [T, D]``.

    Raises:
        VerificationError: the graph is not the head.
    """
    last = compared_rows(bundle.manifest.model.vocab_size, len(token_ids))
    expected = reference_drafts(calibrated.source, token_ids, hidden, calibrated.weights, encoded=stored, last=last)
    found = exact_drafts(bundle, token_ids, hidden, rows=last, threads=VERIFY_THREADS)
    parity = compare(expected, found.last)
    check_parity(parity, routed=False)
    return found, parity


def finish_manifest(bundle: Bundle, journal: Journal, reporter: Reporter) -> None:
    """List every file with size and digest, and write the manifest last; the calibration is no part of a bundle."""
    others = bundle.path / CALIBRATION_FILE
    paths = sorted(path for path in bundle.path.rglob("*") if path.is_file() and path != others)
    with reporter.stage("digests", sum(path.stat().st_size for path in paths)) as progress:
        files = tuple(
            FileEntry(
                path=path.relative_to(bundle.path).as_posix(),
                bytes=path.stat().st_size,
                sha256=journal.sha256(path, progress),
            )
            for path in paths
        )
    manifest = dataclasses.replace(bundle.manifest, files=files)
    manifest.check()
    (bundle.path / MANIFEST_NAME).write_bytes(manifest_bytes(manifest))
    Bundle.open(bundle.path)  # what was written must be what a runtime accepts
