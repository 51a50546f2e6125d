"""``engram serve``: answer OpenAI's requests over HTTP."""

import contextlib
import json
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from engram_runtime.bench.bundle_runner import TVM
from engram_runtime.bundle import Bundle
from engram_runtime.commands.loading import Loading, loading_options
from engram_runtime.errors import RequestError, TargetError
from engram_runtime.sampling import SamplingOptions
from engram_runtime.server.access import KEY_VARIABLE, access_for, read_keys
from engram_runtime.serving.engine_protocol import Engine
from engram_runtime.serving.options import DEFAULT_QUEUE, DEFAULT_SLOTS, MOST_SLOTS
from engram_runtime.serving.worker.process import WorkerProcess
from engram_runtime.serving.worker.settings import WorkerSettings
from engram_runtime.tokenizer import TextTokenizer
from engram_runtime.trust.library import trusted_library

DEFAULT_PORT = 8080
SECRETS = (KEY_VARIABLE,)  # variables of the environment that a worker has no use for
WORKERS_NEED = "pydantic"  # before they can say in one sentence what they lack
SAMPLING_KINDS = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}
Command = TypeVar("Command", bound=Callable[..., Any])


def _default_options(command: Command) -> Command:
    """Add how texts are drawn whose requests don't say."""
    for name, kind in reversed(SAMPLING_KINDS.items()):
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=kind,
            help="Where a request doesn't say.  [default: the bundle's generation_config.json's, else OpenAI's]",
        )(command)
    return command


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; one that others can reach needs a key.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0 takes a free one."
)
@click.option(
    "--parallel",
    "slots",
    type=click.IntRange(1, MOST_SLOTS),
    default=DEFAULT_SLOTS,
    show_default=True,
    help="Texts that grow at once, of each bundle.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=DEFAULT_QUEUE,
    show_default=True,
    help="Requests that may wait, of each bundle; further ones are told to come back.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="Keys, one a line, one of which every request but /health and the page's files must bring; beside them "
    "$ENGRAM_API_KEY.",
)
@click.option("--verbose", is_flag=True, help="Log each request as a line of JSON, without its text, to stderr.")
@_default_options
@loading_options
def serve(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    slots: int,
    queue: int,
    api_key_file: Path | None,
    verbose: bool,
    loading: Loading,
    **sampling: float | None,
) -> None:
    """Serve the models in BUNDLE... over HTTP as OpenAI does, each under its folder's name without .engram.

    Answers /v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize, /health and /metrics; at / is a
    page to chat.
    """
    paths = _paths(bundles)
    if find_spec(WORKERS_NEED) is None:
        raise _lacking(WORKERS_NEED)
    with contextlib.ExitStack() as started:
        # They import what they need while this process does, and checks what it was given.
        workers = {name: started.enter_context(contextlib.closing(WorkerProcess(hidden=SECRETS))) for name in paths}
        _check(paths.values(), loading)
        access = access_for(host, read_keys(api_key_file, os.environ))
        defaults = {name: value for name, value in sampling.items() if value is not None}
        SamplingOptions(**defaults)  # type: ignore[arg-type]  # refuses what is out of range
        try:
            from engram_runtime.server.guard import access_log
            from engram_runtime.server.run import listen, serve_models
        except ModuleNotFoundError as error:
            raise _lacking(error.name) from error

        engines = _Engines(paths, workers, loading, slots, queue, defaults)
        with listen(host, port) as listener:
            url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            _introduce(url, next(iter(paths)), KEY_VARIABLE if access.keys else None)
            with _request_log(access_log) if verbose else contextlib.nullcontext():
                serve_models(
                    listener, paths, engines.open, access, loaded=lambda: click.echo(f"ready: {', '.join(paths)}")
                )


@dataclass(frozen=True, slots=True)
class _Engines:
    """What opens engines, all by the same options; ``workers`` are the first ones, already started."""

    paths: Mapping[str, Path]
    workers: Mapping[str, WorkerProcess]
    loading: Loading
    slots: int
    queue: int
    defaults: Mapping[str, float]

    def open(self, name: str, note_pass: Callable[[float], None]) -> AbstractContextManager[Engine]:
        """See `engram_runtime.server.run.OpenModel`."""
        from engram_runtime.serving.worker.remote import RemoteEngine  # after the workers were started

        bundle = Bundle.open(self.paths[name], self.loading.trust)
        tokenizer = TextTokenizer.load(bundle.path)
        tokenizer.sampling_defaults = {**tokenizer.sampling_defaults, **self.defaults}
        start = _starter(self.workers[name])
        return RemoteEngine(
            bundle, tokenizer, self._settings(bundle.path), start, lambda figures: note_pass(figures.seconds)
        )

    def _settings(self, path: Path) -> WorkerSettings:
        loading = self.loading
        return WorkerSettings(
            path=path,
            executor=loading.executor,
            slots=self.slots,
            queue=self.queue,
            tables_on=loading.tables_on,
            threads=loading.threads,
            target=loading.target,
            tables=loading.tables,
            drafts=loading.drafts,
            trust=loading.trust,
        )


def _lacking(module: str | None) -> TargetError:
    return TargetError(f"engram serve needs {module}: pip install 'engram-edge[serve]'")


def _starter(first: WorkerProcess) -> Callable[[], WorkerProcess]:
    """Return what starts workers, the first of which has been."""
    started = [first]
    return lambda: started.pop() if started else WorkerProcess(hidden=SECRETS)


def _paths(bundles: Sequence[Path]) -> dict[str, Path]:
    """Return bundles by the names of their models."""
    paths: dict[str, Path] = {}
    for bundle in map(Path.resolve, bundles):
        name = bundle.name.removesuffix(".engram")
        if name in paths:
            raise RequestError(f"{paths[name]} and {bundle} would both be model {name!r}; rename a folder")
        paths[name] = bundle
    return paths


def _check(paths: Iterable[Path], loading: Loading) -> None:
    """Refuse what can't be loaded before anybody is told where to ask."""
    for path in paths:
        bundle = Bundle.open(path, loading.trust)
        if loading.executor == TVM:
            trusted_library(bundle, loading.target)


def _introduce(url: str, model: str, key_variable: str | None) -> None:
    """Say where the server listens, and how to ask it."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = "" if key_variable is None else f' -H "authorization: Bearer ${key_variable}"'
    click.echo(f"listening at {url}; once it is ready:")
    click.echo(f"curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d {shlex.quote(body)}")


@contextlib.contextmanager
def _request_log(access_log: logging.Logger) -> Iterator[None]:
    """Write what is logged of requests to stderr."""
    handler = logging.StreamHandler()
    access_log.addHandler(handler)
    access_log.setLevel(logging.INFO)
    try:
        yield
    finally:
        access_log.removeHandler(handler)
