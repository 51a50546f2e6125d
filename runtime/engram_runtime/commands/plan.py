"""``engram plan``: what a model takes and gives on a machine, before anything is read, written or bought."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from engram_runtime.bench.bandwidth import read_bandwidth, working_set
from engram_runtime.bundle import MANIFEST_NAME, Bundle
from engram_runtime.commands.options import json_option, threads_option
from engram_runtime.cpu import available_cores
from engram_runtime.errors import UNFIT_EXIT_CODE, RequestError, TargetError
from engram_runtime.executor import MOST_THREADS
from engram_runtime.memory import FreeMemory, free_memory
from engram_runtime.planning.bundle_outline import outline_bundle
from engram_runtime.planning.comparison import check, check_settings, compared_text
from engram_runtime.planning.disks import DISKS, MEASURED
from engram_runtime.planning.figures import plan_figures
from engram_runtime.planning.machine import Disk, Machine, kind_of_disk, measured_disk, place_on
from engram_runtime.planning.money import Prices
from engram_runtime.planning.outline import Outline, half_caches, tables_on
from engram_runtime.planning.plan import fits, make_plan
from engram_runtime.planning.targets import Target, read_target
from engram_runtime.planning.text import plan_text
from engram_runtime.sizes import parse_size

CHECKPOINT_OUTLINE = "engram_export.outlines.checkpoint"  # of another package; only asked for on checkpoints
MOST_POSITIONS = 8192  # of the text that is planned for where no --context is given
ABOVE_ZERO = click.FloatRange(min=0, min_open=True)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--ram", type=parse_size, metavar="SIZE", help="Memory it may take, such as 8GiB.  [default: what is free]"
)
@click.option(
    "--disk",
    type=click.Choice([*DISKS, MEASURED]),
    default=MEASURED,
    show_default=True,
    help="What tables, and experts that don't fit, are read from; this machine's is measured in half a second.",
)
@click.option("--target", default="native", show_default=True, help="Target it is compiled for.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help=f"Tokens of a text.  [default: the model's context, {MOST_POSITIONS:,} at most]",
)
@click.option(
    "--quant",
    type=click.Choice(["none", "int8", "int4"]),
    help="Weight format to export a checkpoint in.  [default: int8]",
)
@click.option("--table-dtype", type=click.Choice(["int8", "int4", "fp8"]), help="What an export makes of table rows.")
@click.option("--bandwidth", type=ABOVE_ZERO, metavar="GB/S", help="Memory bandwidth.  [default: measured here]")
@threads_option
@click.option("--watts", type=ABOVE_ZERO, help="Power the machine takes, for a price per million tokens.")
@click.option("--electricity", type=ABOVE_ZERO, metavar="PRICE", help="Price of a kWh, in any currency.")
@click.option("--price-hour", type=ABOVE_ZERO, metavar="PRICE", help="Price of an hour of the machine.")
@click.option("--check", "checking", is_flag=True, help="Run a bundle for some seconds and compare.")
@json_option
def plan(
    path: Path,
    ram: int | None,
    disk: str,
    target: str,
    context: int | None,
    quant: str | None,
    table_dtype: str | None,
    bandwidth: float | None,
    threads: int | None,
    watts: float | None,
    electricity: float | None,
    price_hour: float | None,
    checking: bool,
    as_json: bool,
) -> None:
    """Tell what PATH will take and give: a bundle, a Hugging Face folder or a GGUF file.

    Only headers and configs are read; of a folder without its shards config.json and the index do. The exit code is 4
    where it won't fit.
    """
    prices = Prices(watts=watts, electricity=electricity, hour=price_hour)
    chosen = read_target(target)
    outline = _outline(path, quant=quant, table_dtype=table_dtype, context=context)
    outline = half_caches(outline) if chosen.half_caches else outline
    outline = outline if disk == MEASURED else tables_on(outline, place_on(disk))
    if context is not None and context > outline.context_length:
        raise RequestError(f"--context is {context}, {outline.model} takes 1 to {outline.context_length} tokens")
    machine = _machine(outline, chosen, ram=ram, disk=disk, bandwidth=bandwidth, threads=threads)
    positions = context or min(outline.context_length, MOST_POSITIONS)
    made = make_plan(outline, machine, positions=positions, prices=prices)
    if not as_json:
        click.echo(plan_text(made))
    compared = _check(path, outline, threads) if checking else None
    if as_json:
        click.echo(json.dumps({**plan_figures(made), **({} if compared is None else {"check": compared})}))
    elif compared is not None:
        click.echo(compared_text(compared))
    if not fits(made):
        click.get_current_context().exit(UNFIT_EXIT_CODE)


def _outline(path: Path, **options: Any) -> Outline:
    if (path / MANIFEST_NAME).is_file():
        if options["quant"] or options["table_dtype"]:
            raise RequestError(
                f"{path} is a bundle, its weights and tables are as they are; leave out --quant and --table-dtype"
            )
        return outline_bundle(Bundle.open(path))
    if not path.exists():
        raise RequestError(f"{path} does not exist; give a bundle, a folder with config.json or a .gguf file")
    try:
        checkpoint = importlib.import_module(CHECKPOINT_OUTLINE)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"{path} is no bundle, and reading checkpoints needs {error.name}: pip install 'engram-edge[export]'"
        ) from error
    outline: Outline = checkpoint.outline_checkpoint(path, **options)
    return outline


def _machine(
    outline: Outline, target: Target, *, ram: int | None, disk: str, bandwidth: float | None, threads: int | None
) -> Machine:
    count = threads or target.threads or min(available_cores(), MOST_THREADS)
    if bandwidth is None:
        read = working_set(outline.whole_bytes + outline.expert_bytes if outline.runs else None)
        measured = read_bandwidth(count, read).gb_s
    here = disk == MEASURED
    return Machine(
        memory=free_memory() if ram is None else FreeMemory(num_bytes=ram),
        bandwidth_gb_s=measured if bandwidth is None else bandwidth,
        measured_bandwidth=bandwidth is None,
        threads=count,
        target=target.name,
        kernels=target.kernels,
        chunk=target.chunk,
        disk=_measured(outline) if here else kind_of_disk(disk),
        free_disk_bytes=shutil.disk_usage(Path()).free if here else None,
    )


def _measured(outline: Outline) -> Disk:
    """Measure the disk of what is read from one."""
    largest = max(outline.tables, key=lambda table: table.num_bytes, default=None)
    return measured_disk(outline.weights_file if largest is None else largest.facts.path)


def _check(path: Path, outline: Outline, threads: int | None) -> Any:
    if outline.export is not None or outline.target is None:
        raise RequestError(f"--check runs a compiled bundle, {path} is none; export and compile it first")
    settings = check_settings(outline.context_length)
    with click.progressbar(length=settings.steps, label="rounds", file=sys.stderr) as bar:
        return check(Bundle.open(path), threads, lambda: bar.update(1), settings)
