"""``engram bench``: how fast a bundle runs here, alone or beside a peer on the same weights."""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from engram_runtime.bench.bandwidth import read_bandwidth, working_set
from engram_runtime.bench.bundle_runner import TVM
from engram_runtime.bench.markdown import markdown
from engram_runtime.bench.plot import plot_speeds
from engram_runtime.bench.prompts import PROMPTS
from engram_runtime.bench.report import bytes_of_a_token, ratios, report, where
from engram_runtime.bench.rounds import MOST_ROUNDS, Contestant, Settings, measure
from engram_runtime.bundle import Bundle
from engram_runtime.commands.evaluate import read_text
from engram_runtime.commands.options import (
    bundle_argument,
    draft_options,
    executor_option,
    json_option,
    read_options,
    table_options,
    target_option,
    threads_option,
)
from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.errors import CheckpointError, RequestError, TargetError
from engram_runtime.lens.figures import check_png
from engram_runtime.new_file import check_place, new_file
from engram_runtime.planning.comparison import compare, compared_text
from engram_runtime.tables.policy import TableChoice
from engram_runtime.tokenizer import TextTokenizer

# Of the export extra, asked for with --against llama.cpp only; sizes need no more of it than gguf.
GGUF_WRITER, GGUF_SIZES = "engram_export.gguf_writer", "engram_export.gguf_sizes"
LLAMA_CPP_PACKAGE = "llama_cpp"
LLAMA_CPP, ONNXRUNTIME = "llama.cpp", "onnxruntime"
SUBCOMMANDS = {  # name -> module:attribute
    "tables": "engram_runtime.commands.bench_tables:tables",
    "compare": "engram_runtime.commands.bench_compare:compare",
}


class BundleOrSubcommand(click.Command):
    """``engram bench BUNDLE``, and those of `SUBCOMMANDS`, such as ``engram bench tables BUNDLE``."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse; a bundle in a folder called tables is ``./tables``."""
        if not args or args[0] not in SUBCOMMANDS:
            return super().make_context(info_name, args, parent, **extra)
        module, _, attribute = SUBCOMMANDS[args[0]].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)


@click.command(
    cls=BundleOrSubcommand,
    epilog="Its tables by themselves: engram bench tables BUNDLE. Two reports: engram bench compare A.json B.json",
)
@bundle_argument
@executor_option
@click.option("--against", type=click.Choice([LLAMA_CPP, ONNXRUNTIME]), help="Measure this peer as well, in turn.")
@click.option(
    "--gguf",
    type=click.Path(path_type=Path),
    help="What llama.cpp runs.  [default: the bundle's weights, written anew]",
)
@threads_option
@target_option
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--depth",
    "depths",
    type=click.IntRange(min=0),
    multiple=True,
    default=[0, 512],
    show_default=True,
    help="Tokens before those measured; may be given several times, the first one is the figure.",
)
@click.option("--rounds", type=click.IntRange(1, MOST_ROUNDS), default=7, show_default=True)
@click.option("--profile", is_flag=True, help="Say where the time goes, by kind of kernel.")
@draft_options
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="UTF-8 text to go on from with --draft and without, its first --prompt-tokens; may be given several times.  "
    f"[default: {', '.join(PROMPTS)}, which are built in]",
)
@table_options
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw speed against depth to this .png, which is replaced; needs engram-edge[plot].",
)
@json_option
def bench(
    bundle: Path,
    executor: str,
    against: str | None,
    gguf: Path | None,
    threads: int | None,
    target: str | None,
    prompt_files: tuple[Path, ...],
    tables: str,
    plot: Path | None,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Measure BUNDLE; figures are medians over the rounds, each of which takes the bundle and its peer in turn.

    They are of random tokens. With --draft, texts are continued as well, plainly and with drafts in turn.
    """
    _ = read_options(tables, sizes["table_io"], sizes["table_ram"])  # refuses what contradicts itself
    if plot is not None:
        check_png(plot)
        check_place(plot, replace=True)
    settings = Settings(**sizes, tables_on=tables == "on", prompts=_prompts(sizes["drafts"], prompt_files))
    opened = Bundle.open(bundle)
    _check(opened, settings)
    before = os.getloadavg()[0]
    with (
        _contestants(opened, executor, target, against, gguf) as contestants,
        click.progressbar(length=settings.steps, label="rounds", file=sys.stderr) as bar,
    ):
        results = measure(contestants, settings, threads=threads, progress=lambda: bar.update(1))
    bandwidth = read_bandwidth(results[0].facts["threads"], working_set(bytes_of_a_token(results[0], settings)))
    found = {**where(opened), **report(results, settings, bandwidth, (before, os.getloadavg()[0]))}
    if predicted := executor == TVM and target is None:
        found["predicted"] = compare(opened, found, settings)
    for choice in found["tables"]:
        click.echo(str(TableChoice(**choice)), err=True)
    if plot is not None:
        with new_file(plot, replace=True) as file:
            plot_speeds(file, found)
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(markdown(found, settings, ratios(results[0], results[1], settings) if against else None))
        if predicted:
            click.echo(f"\n{compared_text(found['predicted'])}")


def _prompts(drafts: DraftOptions, files: Sequence[Path]) -> Mapping[str, str]:
    """Return texts to draft for by name, none where nothing is drafted."""
    if drafts != NO_DRAFTS:
        return {str(path): read_text(path) for path in files} or PROMPTS
    if files:
        raise RequestError("--prompt-file is what drafts are made for; give --draft as well or leave it out")
    return {}


def _check(bundle: Bundle, settings: Settings) -> None:
    """Refuse what can't be measured before anything is."""
    _ = bundle.manifest.decoder  # refuses tables alone, which have no context to check
    settings.check_context(bundle.manifest.model.context_length)
    if settings.prompts:
        TextTokenizer.load(bundle.path)


@contextlib.contextmanager
def _contestants(
    bundle: Bundle, executor: str, target: str | None, against: str | None, gguf: Path | None
) -> Iterator[list[Contestant]]:
    """Yield the bundle and its peer; a GGUF file written for it is gone afterwards."""
    if gguf is not None and against != LLAMA_CPP:
        raise RequestError("--gguf is what llama.cpp runs with --against llama.cpp; give both or neither")
    own = Contestant(runner=executor, model=str(bundle.path), target=target)
    if against is None:
        yield [own]
    elif against == ONNXRUNTIME:
        yield [own, Contestant(runner=ONNXRUNTIME, model=str(bundle.path))]
    else:
        with _gguf_file(bundle, gguf) as file:
            yield [own, _llama_cpp(file)]


def _llama_cpp(file: Path) -> Contestant:
    sizes = _of_export(GGUF_SIZES)
    return Contestant(
        runner=LLAMA_CPP,
        model=str(file),
        weight_bytes=sizes.weight_bytes_of_a_token(file),
        types=sizes.types_of_tensors(file),
        drafts=False,
    )


@contextlib.contextmanager
def _gguf_file(bundle: Bundle, given: Path | None) -> Iterator[Path]:
    """Yield what llama.cpp runs, which is looked for before anything is written for it."""
    if importlib.util.find_spec(LLAMA_CPP_PACKAGE) is None:
        raise _needs(LLAMA_CPP_PACKAGE)
    if given is not None and not given.is_file():
        raise CheckpointError(f"{given} is not a file; give a .gguf file or leave out --gguf to have one written")
    if given is not None:
        yield given
        return
    beside = bundle.path.resolve()  # /tmp may be memory
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent) as folder:
        click.echo("writing the weights for llama.cpp ...", err=True)
        _of_export(GGUF_WRITER).write_gguf(bundle, file := Path(folder) / "model.gguf")
        yield file


def _of_export(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _needs(error.name) from error


def _needs(package: str | None) -> TargetError:
    return TargetError(f"--against llama.cpp needs {package}: pip install 'engram-edge[export,peers]'")
