"""Decode with one thread and with two, on a quiet machine and while another process burns a core.

    python benchmarks/contention.py build/demo.engram [--gguf SmolLM2-135M-Instruct.Q4_1.gguf]

Executors and numbers of threads run in turn under each load, so other processes slow them alike; ratios are taken round
by round. llama.cpp takes part where a GGUF file is given and llama_cpp is installed.
"""

import contextlib
import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from engram_runtime import Bundle, Session
from engram_runtime.cpu import available_cpus
from engram_runtime.executor import load_executor

THREADS = (1, 2)
EXECUTORS = ("tvm", "onnxruntime")
QUIET, UNPINNED = "quiet", "unpinned"
BURN = "import os, sys; os.sched_setaffinity(0, map(int, sys.argv[1:])); print(flush=True)\nwhile True: pass"
PROMPT = list(range(100, 116))

Decode = Callable[[], None]


def decoder(name: str, bundle: Bundle, threads: int, tokens: int, opened: contextlib.ExitStack) -> Decode:
    """Return what decodes ``tokens`` one by one after a short prompt."""
    session = opened.enter_context(Session.open(bundle, load_executor(name, bundle, threads=threads)))
    session.prefill(PROMPT)

    def decode() -> None:
        for token_id in range(1000, 1000 + tokens):
            session.decode([token_id])
        session.trim(tokens)

    return decode


def llama_decoder(gguf: Path, threads: int, tokens: int) -> Decode:
    """Return what decodes as many tokens by llama.cpp."""
    llama = importlib.import_module("llama_cpp").Llama(
        str(gguf), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def decode() -> None:
        llama.n_tokens = len(PROMPT)
        for token_id in range(1000, 1000 + tokens):
            llama.eval([token_id])

    llama.eval(PROMPT)
    return decode


@contextlib.contextmanager
def load_on(place: str) -> Iterator[None]:
    """Burn a core while the context is open: a number, any of them, or none."""
    if place == QUIET:
        yield
        return
    cpus = map(str, available_cpus()) if place == UNPINNED else [place]
    with subprocess.Popen([sys.executable, "-c", BURN, *cpus], stdout=subprocess.PIPE) as burner:
        assert burner.stdout is not None
        burner.stdout.readline()  # it has begun
        try:
            yield
        finally:
            burner.kill()


def seconds(decode: Decode) -> float:
    """Time one run."""
    started = time.perf_counter()
    decode()
    return time.perf_counter() - started


def report(place: str, name: str, tokens: int, times: dict[int, list[float]]) -> None:
    """Print an executor's speeds under one load, and the ratio of two threads to one with its least and largest."""
    one, two = (times[threads] for threads in THREADS)
    ratios = sorted(a / b for a, b in zip(one, two, strict=True))
    speeds = "  ".join(f"{tokens / statistics.median(each):7.1f}" for each in (one, two))
    click.echo(
        f"{place:9} {name:12} tok/s, 1 and 2 threads: {speeds}   2 over 1: {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--gguf", type=click.Path(path_type=Path), help="Measure llama.cpp on this file too.")
@click.option("--executor", "executors", multiple=True, default=EXECUTORS)
@click.option("--rounds", default=7, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Decoded in each run.")
def main(bundle: Path, gguf: Path | None, executors: tuple[str, ...], rounds: int, tokens: int) -> None:
    """Measure BUNDLE."""
    click.echo(f"{platform.machine()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}")
    with contextlib.ExitStack() as opened:
        runs = {(name, n): decoder(name, Bundle.open(bundle), n, tokens, opened) for name in executors for n in THREADS}
        if gguf is not None:
            runs |= {("llama.cpp", threads): llama_decoder(gguf, threads, tokens) for threads in THREADS}
        times: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        places = [QUIET, *map(str, available_cpus()), UNPINNED]
        for round_ in range(rounds + 1):  # the first one warms up
            for place in places:
                with load_on(place):
                    for (name, threads), decode in runs.items():
                        took = seconds(decode)
                        if round_:
                            times[place, name][threads].append(took)
    for (place, name), by_threads in times.items():
        report(place, name, tokens, by_threads)
    click.echo(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
