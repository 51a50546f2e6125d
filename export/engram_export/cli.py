"""The ``engram-export`` command: parse, export, print."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engram_runtime.bundle import MANIFEST_NAME
from engram_runtime.command_line import run_command
from engram_runtime.errors import TargetError
from engram_runtime.new_folder import check_new_folder
from engram_runtime.workplace import workplace

if TYPE_CHECKING:
    from engram_export.calibration_report import CalibrationReport
    from engram_export.pipeline import Progress
    from engram_export.plan import ExportPlan
    from engram_export.site_verify import SiteVerification
    from engram_export.verify import Verification

MIB = 1 << 20


class TerminalReporter:
    """Shows the plan and a bar with bytes and remaining time per stage on stderr; ``shown`` is the plan."""

    def __init__(self) -> None:
        self.shown: dict[str, Any] = {}

    def plan(self, plan: "ExportPlan") -> None:
        """See `engram_export.pipeline.Reporter`."""
        self.shown = asdict(plan)
        click.echo(f"{plan.model}: {plan.family}, {plan.parameters / 1e6:.1f}M parameters", err=True)
        formats = ", ".join(f"{count} {name}" for name, count in plan.formats.items())
        click.echo(f"  weights      {plan.weights_bytes / MIB:9.1f} MiB: {formats}", err=True)
        click.echo(f"  tables       {plan.tables_bytes / MIB:9.1f} MiB, {plan.tables_mode}", err=True)
        for site in plan.sites:
            click.echo(
                f"    {site.site}: {site.rows:,} rows of {site.record_bytes} bytes, {site.rows_per_token} a token",
                err=True,
            )
        click.echo(f"  cache        {plan.cache_bytes_per_token / 1024:9.1f} KiB a token", err=True)
        if plan.peak_memory_bytes is not None:
            click.echo(f"  peak memory  {plan.peak_memory_bytes / MIB:9.1f} MiB above the libraries", err=True)
        click.echo(f"  context      {plan.context_length:9,d} tokens", err=True)
        if not plan.tokenizer:
            click.echo(
                "  tokenizer         none: LLM.logits takes token ids, engram run and chat will not work", err=True
            )

    def step(self, title: str) -> None:
        """See `engram_export.pipeline.Reporter`."""
        click.echo(f"{title} ...", err=True)

    @contextlib.contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator["Progress"]:
        """See `engram_export.pipeline.Reporter`."""
        done = 0

        def position(_: object) -> str:
            return f"{done / MIB:.0f}/{total_bytes / MIB:.0f} MiB"

        with click.progressbar(
            length=total_bytes, label=f"{title:16}", file=sys.stderr, item_show_func=position, show_eta=True
        ) as bar:

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.update(count)

            yield advance


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Bundle folder to write.")
@click.option(
    "--quant",
    type=click.Choice(["none", "int8", "int4", "keep"]),
    default="int8",
    show_default=True,
    help="Weight format; keep takes over Q4_0 and Q8_0 of a GGUF exactly.",
)
@click.option(
    "--calibration",
    default="built-in",
    show_default=True,
    help="UTF-8 text that --quant int4 is calibrated on, 5,120 tokens at most; none rounds without.",
)
@click.option(
    "--tables",
    type=click.Choice(["copy", "reference", "repack"]),
    default="copy",
    show_default=True,
    help="Copy tables into the bundle, read them in place, or quantise their rows anew.",
)
@click.option("--table-dtype", type=click.Choice(["int8", "int4", "fp8"]), help="What --tables repack makes of rows.")
@click.option("--context", type=int, help="Tokens a sequence may have.  [default: what the model was trained for]")
@click.option("--engram", type=click.Path(path_type=Path), help="Folder with an Engram site or a draft head to add.")
@click.option(
    "--embeddings", is_flag=True, help="Have positions given as input embeddings, too, and tell hidden states."
)
@click.option(
    "--tables-only",
    is_flag=True,
    help="Export tables, and the sites that read them, without the decoder: all there is of deepseek_v41.",
)
@click.option("--force", is_flag=True, help="Replace a bundle that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    checkpoint: Path,
    out: Path,
    quant: str,
    calibration: str,
    tables: str,
    table_dtype: str | None,
    context: int | None,
    engram: Path | None,
    embeddings: bool,
    tables_only: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT, a Hugging Face folder or a GGUF file, to a bundle."""
    check_new_folder(out, MANIFEST_NAME, "a bundle", replace=force)  # before torch is loaded, which takes seconds
    try:
        from engram_export.pipeline import ExportOptions, export_bundle
        from engram_export.tables_only import export_tables
    except ModuleNotFoundError as error:
        raise TargetError(f"engram-export needs {error.name}: pip install 'engram-edge[export]'") from error
    options = ExportOptions(
        checkpoint=checkpoint,
        out=out,
        quant=quant,
        calibration=calibration,
        tables=tables,
        table_dtype=table_dtype,
        context=context,
        engram=engram,
        embeddings=embeddings,
        replace=force,
    )
    started = time.monotonic()
    reporter = TerminalReporter()
    try:
        if tables_only:
            sites = export_tables(options, reporter)
            results: dict[str, Any] = {"sites": [asdict(site) for site in sites]}
        else:
            verification = export_bundle(options, reporter)
            results = _parities(verification)
    except (KeyboardInterrupt, OSError):
        if (kept := workplace(out)).exists():
            click.echo(f"\nfinished files are kept in {kept}; run the same command again to resume", err=True)
        raise
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps({"bundle": str(out), "seconds": round(seconds, 2), "plan": reporter.shown, **results}))
        return
    if tables_only:
        _print_sites(sites)
    else:
        _print_verification(verification)
    click.echo(f"{out} written in {seconds:.1f} s")


def _parities(verification: "Verification") -> dict[str, Any]:
    return {
        "graph_parity": asdict(verification.graph),
        "parity": asdict(verification.model),
        "draft_parity": None if verification.draft is None else asdict(verification.draft),
        "row_errors": {site: asdict(errors) for site, errors in verification.rows.items()},
        "calibration": None if verification.calibration is None else asdict(verification.calibration),
    }


def _print_sites(sites: Sequence["SiteVerification"]) -> None:
    for site in sites:
        click.echo(f"site {site.site} over {site.tokens} tokens    max |difference|")
        click.echo(f"  {'graph, torch, same weights':30}  {site.graph:16.2e}")
        click.echo(f"  {'bundle, float32 checkpoint':30}  {site.model:16.2e}")
        if site.row_errors is not None:
            errors = site.row_errors
            click.echo(f"  repacked rows are off by {errors.mean:.2%}, at most {errors.max:.2%}")


def _print_verification(verification: "Verification") -> None:
    tokens = verification.model.tokens
    click.echo(f"logits over {tokens} tokens          max |difference|  mean |difference|  argmax agreement")
    for title, parity in verification.parities.items():
        click.echo(_row(title, parity.max_abs, parity.mean_abs, parity.argmax_agreement))
    if verification.calibration is not None:
        _print_calibration(verification.calibration)
    for site, errors in verification.rows.items():
        click.echo(f"{errors.num_rows} repacked rows of {site} are off by {errors.mean:.3%}, at most {errors.max:.3%}")


def _print_calibration(report: "CalibrationReport") -> None:
    if report.reason is not None:
        click.echo(f"int4 by plain rounding: {report.reason}")
        return
    click.echo(
        f"int4 calibrated on {report.tokens} tokens of the {report.text} text: KL(float32 || bundle) is "
        f"{report.chosen:.4f} nats on {report.held_out_tokens} others"
    )
    click.echo(f"  {report.int4:.4f} with all layers in int4, and    format  planes  KL in int8  KL in one plane")
    for role in report.roles:
        click.echo(f"    {role.role:34}  {role.format:>6}  {role.planes:6}  {role.int8:10.4f}  {role.one_plane:15.4f}")


def _row(title: str, largest: float, mean: float, agreement: float) -> str:
    return f"  {title:30}  {largest:16.2e}  {mean:17.2e}  {agreement:16.1%}"


def main() -> None:
    """Run the command."""
    run_command(export, "engram-export")
