"""Recall with each cartridge, with none, with rows that have changed places or have other formats, and in torch."""

from collections.abc import Iterator, Sequence

import click

from engram_runtime.tokenizer import TextTokenizer
from examples.retrofit.conditions import OFF, Condition, read_rows, shuffled, write_float32, write_int8
from examples.retrofit.evaluated import CARTRIDGES, EXECUTORS, FIRST, UNTRAINED, Evaluation, Figures
from examples.retrofit.facts import HELD_OUT_QUESTIONS, ORDINARY_QUESTIONS
from examples.retrofit.recall import ask, recall


def measure_recall(evaluation: Evaluation) -> list[Figures]:
    """Ask for facts with each cartridge, with none and with rows that have changed places, of every executor."""
    report: list[Figures] = []
    for executor in EXECUTORS:
        asked = Interview(evaluation, executor)
        for name in CARTRIDGES:
            shipped = evaluation.cartridge(name)
            report += asked.facts_of(name, shipped, "int4", HELD_OUT_QUESTIONS)
            if executor == "tvm":
                report += asked.facts_of(name, shipped, "int4", ORDINARY_QUESTIONS)
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
    """Ask the float32 model for the facts that the executors are asked for."""
    from examples.retrofit.backbone import load_backbone  # torch is loaded where it is needed
    from examples.retrofit.torch_reference import TorchSite, recall_in_torch, site_block

    (table,) = evaluation.bundle.manifest.tables
    keyer, tokenizer = evaluation.bundle.keyer(table.keyer), TextTokenizer.load(evaluation.bundle.path)
    backbone = load_backbone(evaluation.checkpoint, block=site_block(evaluation.asset))
    report = []
    for name in CARTRIDGES:
        rows = read_rows(evaluation.bundle, evaluation.cartridge(name).overlays)
        site = TorchSite(evaluation.asset, keyer, rows)
        for wording in HELD_OUT_QUESTIONS:
            share = recall_in_torch(backbone, site, [ask(tokenizer, fact, wording) for fact in evaluation.facts(name)])
            click.echo(f"  {name}: {share.known} of {share.asked}: {wording}")
            where = {"facts": name, "cartridge": name, "rows": "int4", "executor": "torch", "wording": wording}
            report.append({**where, **share.figures()})
    return report
