"""Bundles against llama.cpp on their own weights, at several numbers of threads: one table of all.

python benchmarks/against_llama_cpp.py build/smol-int8.engram build/random-1b-int4.engram --json build/peer.json
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from engram_export.gguf_writer import write_gguf
from engram_runtime.bundle import Bundle

ENGRAM = (sys.executable, "-c", "from engram_runtime.cli import main; main()")
VERIFIED = ("2", "4", "8", "16")
HEADS = (
    "bundle",
    "threads",
    "",
    "decode, tok/s",
    "prefill, tok/s",
    "forward of 2, 4, 8, 16 over 1",
    "own + file MB",
    "start, ms",
    "outside kernels, ms (of a step)",
    "bandwidth",
    "load before, after",
)


def bench(bundle: Path, gguf: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Run ``engram bench`` in a process of its own and return its report."""
    options = ["--threads", str(threads), "--rounds", str(rounds), "--depth", "0", "--profile", "--json"]
    line = [*ENGRAM, "bench", str(bundle), "--against", "llama.cpp", "--gguf", str(gguf), *options]
    report: dict[str, Any] = json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return report


def lines(bundle: Path, report: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of the bundle, of the peer and of their ratios."""
    peer, load = report["against"], f"{report['load_average']:.2f}, {report['load_average_after']:.2f}"
    step = report["profile"]["decode"]
    outside = f"{step['outside_ms']:.2f} ({step['outside_ms'] / step['step_ms']:.0%})"
    first = [bundle.stem, str(report["threads"])]
    yield [*first, report["runner"], *_cells(report), outside, _share(report), load]
    yield ["", "", peer["runner"], *_cells(peer), "", _share(peer), ""]
    yield ["", "", "ratio", *_cells(peer["ratios"]), "", _share(peer["ratios"]), ""]


def _cells(figures: dict[str, Any]) -> list[str]:
    return [
        f"{figures['decode_tok_s']:.2f}",
        f"{figures['prefill_tok_s']:.2f}",
        ", ".join(f"{figures['verify_cost'][tokens]:.2f}" for tokens in VERIFIED),
        f"{figures['rss_anon_mb']:.2f} + {figures['rss_file_mb']:.2f}",
        f"{figures['start_ms']:.2f}",
    ]


def _share(figures: dict[str, Any]) -> str:
    return f"{figures['bandwidth_share']:.2f}"


@click.command()
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--threads", "thread_counts", type=int, multiple=True, default=[1, 2], show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Keep the reports here.")
def main(bundles: tuple[Path, ...], thread_counts: tuple[int, ...], rounds: int, json_file: Path | None) -> None:
    """Measure BUNDLES."""
    reports = []
    click.echo("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|")
    for bundle in bundles:
        with tempfile.TemporaryDirectory(dir=bundle.resolve().parent) as folder:  # /tmp may be memory
            gguf = Path(folder) / "model.gguf"
            write_gguf(Bundle.open(bundle), gguf)
            for threads in thread_counts:
                report = bench(bundle, gguf, threads, rounds)
                reports.append({"bundle": str(bundle), **report})
                for cells in lines(bundle, report):
                    click.echo("| " + " | ".join(cells) + " |")
    click.echo(f"\n{reports[0]['build']}\n{reports[0]['against']['build']}")
    if json_file is not None:
        json_file.write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
