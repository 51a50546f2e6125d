"""Train models of one size whose parameters are divided differently between experts and a table, and compare them.

python -m examples.allocation
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from engram_runtime.command_line import run_command
from examples.allocation.plot import plot
from examples.allocation.report import report
from examples.allocation.sizes import Sizes
from examples.allocation.sweep import sweep
from examples.allocation.text import read_corpus
from examples.allocation.training import Recipe, Run
from examples.retrofit.whole_files import write_text

FOLDER = Path(__file__).parent
EXPERTS = (34, 30, 26, 18, 10, 6, 2)  # 0, 12.5, 25, 50, 75, 87.5 and 100 % of the sparse budget in the table
STEPS, SEEDS, PROCESSES = 2000, 2, 2


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/allocation"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, help="Folder of the results.")
@click.option("--steps", type=click.IntRange(min=100), default=STEPS, show_default=True, help="Of every model.")
@click.option("--seeds", type=click.IntRange(min=1), default=SEEDS, show_default=True, help="Models per division.")
@click.option("--processes", type=click.IntRange(min=1), default=PROCESSES, show_default=True, help="One thread each.")
def main(work: Path, out: Path, steps: int, seeds: int, processes: int) -> None:
    """Train all models, or those that are not in WORK yet, and write the figures and the plot."""
    work.mkdir(parents=True, exist_ok=True)
    sizes = Sizes()
    bytes_per_token = read_corpus(work, sizes.vocab_size).bytes_per_token  # fetched and tokenised once, not per process
    runs = [Run(sizes, Recipe(steps=steps), experts, seed) for seed in range(seeds) for experts in EXPERTS]
    with click.progressbar(length=len(runs) * steps, label="steps") as bar:
        outcomes = sweep(runs, work, processes, bar.update)
    results = report(runs, outcomes, bytes_per_token)
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    plot(results, out / "allocation.png")
    for line in table(results):
        click.echo(line)


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield one line per division, and one that says whether they make a U."""
    yield "table  experts  loss    less that without a table (95 %)"
    for division in results["divisions"]:
        against = division["against_no_table"]
        low, high = against["interval"]
        yield (
            f"{division['share']:5.1%} {division['experts']:8d}  {division['validation_loss']:.4f}  "
            f"{against['mean']:+.4f} ({low:+.4f} to {high:+.4f})"
        )
    best = results["best"]
    low, high = best["against_all_table"]["interval"]
    yield (
        f"best between the ends: {best['experts']} experts, {low:+.4f} to {high:+.4f} against all in the table; "
        f"{'a U' if best['is_u'] else 'no U'}"
    )


if __name__ == "__main__":
    run_command(main, "examples.allocation")
