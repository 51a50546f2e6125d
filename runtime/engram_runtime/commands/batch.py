"""``engram batch``: the requests of a file."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from engram_runtime.batch.answering import answer_here
from engram_runtime.batch.lines import LineIndex
from engram_runtime.batch.result import Result
from engram_runtime.batch.results import Put, Tally, open_batch
from engram_runtime.batch.serving import Service
from engram_runtime.commands.announcing import announce_table
from engram_runtime.commands.loading import Loading, loading_options
from engram_runtime.commands.options import bundle_argument, json_option
from engram_runtime.errors import RequestError
from engram_runtime.serving.options import DEFAULT_SLOTS, MOST_SLOTS

INTERRUPTED = 130  # exit code that shells have for Ctrl-C
THIS_MACHINE = "this machine"

Answer = Callable[[LineIndex, Put], None]


@click.command()
@bundle_argument
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--errors",
    type=click.Path(path_type=Path),
    help="Write lines that tell of an error to this file instead of OUT; once it is deleted they are tried again.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, MOST_SLOTS),
    default=DEFAULT_SLOTS,
    show_default=True,
    help="Texts that grow at once.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=3600.0,
    show_default=True,
    help="Seconds after which a text ends as it is.",
)
@click.option(
    "--ray",
    "address",
    is_flag=False,
    flag_value=THIS_MACHINE,
    metavar="[ADDRESS]",
    help="Share the lines among the workers of a Ray cluster, on all machines of which BUNDLE and IN are at the same "
    "place; without ADDRESS of one on this machine that ends with the batch.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="With --ray: processes that load BUNDLE, each with --threads cores of its own, or one.  "
    "[default: as many as there are cores for]",
)
@loading_options
@json_option
def batch(
    bundle: Path,
    source: Path,
    output: Path,
    errors: Path | None,
    parallel: int,
    time_limit: float,
    address: str | None,
    workers: int | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Answer the requests in IN, a file of OpenAI's batch format, into OUT.

    OUT gets a line for each as soon as it is answered, in any order; what is wrong with a request is its answer. The
    same command goes on where an earlier one was interrupted.
    """
    service = Service(bundle=bundle, loading=loading, parallel=parallel, time_limit_s=time_limit)
    if address is not None:
        answer = _answer_on_ray(service, address, workers)
    elif workers is not None:
        raise RequestError("--workers share the lines with --ray; give both or neither")
    else:
        answer = partial(answer_here, open_responder=partial(service.open, announce_table), at_once=service.at_once)
    with open_batch(source, output, errors) as (pending, tally, put):
        started = time.perf_counter()
        interrupted = _run(answer, pending, tally, put)
        seconds = time.perf_counter() - started
    if as_json:
        ran = {"executor": loading.executor, "tables_on": loading.tables_on, "parallel": parallel}
        click.echo(json.dumps({**figures(tally, seconds), "interrupted": interrupted, **ran}))
    else:
        click.echo(f"{output}: {summary(tally, seconds)}")
    if interrupted:
        sys.exit(INTERRUPTED)


def _answer_on_ray(service: Service, address: str, workers: int | None) -> Answer:
    from engram_runtime.batch.ray_pipeline import Cluster, answer_on_ray  # of the extra ray

    threads = service.loading.threads or 1
    overlays = tuple(path.absolute() for path in service.loading.tables.overlays)
    loading = replace(service.loading, threads=threads, tables=replace(service.loading.tables, overlays=overlays))
    there = replace(service, bundle=service.bundle.absolute(), loading=loading)
    cluster = Cluster(address=None if address == THIS_MACHINE else address, workers=workers, threads=threads)
    return partial(answer_on_ray, open_responder=there.open, at_once=there.at_once, cluster=cluster)


def _run(answer: Answer, pending: LineIndex, tally: Tally, put: Put) -> bool:
    """Answer what is left with a bar on stderr; returns whether Ctrl-C ended it."""
    if not len(pending):
        return False
    started = time.perf_counter()

    def rate(_: object) -> str:
        return f"{tally.completion_tokens / (time.perf_counter() - started):.1f} tok/s"

    try:
        with click.progressbar(
            length=len(pending), label="answering", file=sys.stderr, item_show_func=rate, show_pos=True
        ) as bar:

            def show(result: Result) -> None:
                put(result)
                bar.update(1)

            answer(pending, show)
    except KeyboardInterrupt:
        return True
    return False


def figures(tally: Tally, seconds: float) -> dict[str, Any]:
    """Return what a run came to, as JSON values; its seconds include loading."""
    return {
        **asdict(tally),
        "seconds": round(seconds, 3),
        "completion_tok_s": round(tally.completion_tokens / seconds, 1),
    }


def summary(tally: Tally, seconds: float) -> str:
    """Return what a run came to, in one line."""
    before = f" {tally.before} were before," if tally.before else ""
    left = tally.lines - tally.before - tally.answered
    rest = f"; {left} are left, the same command goes on with them" if left else ""
    return (
        f"{tally.answered} of {tally.lines} lines answered,{before} {tally.failed} with an error; "
        f"{tally.completion_tokens:,} tokens in {seconds:.1f} s, {tally.completion_tokens / seconds:.1f} tok/s{rest}"
    )
