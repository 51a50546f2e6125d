"""tvm against onnxruntime on one bundle: both run in turn, ratios are taken round by round.

python benchmarks/executors.py build/demo.engram
"""

import os
import platform
import statistics
from pathlib import Path

import click

from engram_runtime import Bundle
from engram_runtime.bench import BenchResult, measure


def ratio(slower: list[float], faster: list[float]) -> str:
    """Return the median, least and largest of the rounds' ratios."""
    ratios = sorted(a / b for a, b in zip(slower, faster, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def report(threads: int, tvm: BenchResult, peer: BenchResult) -> None:
    """Print both executors and how many times faster tvm is."""
    for result in (tvm, peer):
        click.echo(
            f"{threads} threads  {result.executor:12} prefill {result.prefill_tok_s:7.1f} tok/s  "
            f"decode {result.decode_tok_s:7.1f} tok/s"
        )
    click.echo(
        f"{threads} threads  tvm is faster by: prefill {ratio(peer.prefill_s, tvm.prefill_s)}, "
        f"decode {ratio(peer.decode_s, tvm.decode_s)}"
    )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--threads", "thread_counts", type=int, multiple=True, default=[1, 2])
@click.option("--rounds", default=9, show_default=True)
def main(bundle: Path, thread_counts: tuple[int, ...], rounds: int) -> None:
    """Measure BUNDLE."""
    click.echo(f"{platform.machine()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}")
    for threads in thread_counts:
        tvm, peer = measure(
            Bundle.open(bundle),
            ["tvm", "onnxruntime"],
            threads=threads,
            prompt_tokens=128,
            decode_tokens=32,
            rounds=rounds,
            tables_on=True,
            progress=lambda: None,
        )
        report(threads, tvm, peer)
    click.echo(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
