"""What cartridges do to text: perplexity on statements and foreign text, and answers to ordinary questions."""

from collections.abc import Mapping, Sequence

import click

from engram_runtime.tokenizer import TextTokenizer
from examples.retrofit.answers import in_form_of_an_entry, questions, side_by_side, unchanged
from examples.retrofit.conditions import OFF, Condition, read_rows, shuffled, write_float32, write_int8
from examples.retrofit.evaluated import CARTRIDGES, FIRST, UNTRAINED, Evaluation, Figures
from examples.retrofit.facts import ORDINARY_QUESTIONS
from examples.retrofit.recall import ask
from examples.retrofit.text_perplexity import (
    FOREIGN,
    Losses,
    Passage,
    foreign_text,
    losses,
    passages,
    statement_passage,
)

ROUNDING = "none, onnxruntime"
NUM_UNTRAINED_ANSWERS, NUM_ASKED_ORDINARILY, NUM_STATEMENTS = 40, 20, 100


def measure_perplexity(evaluation: Evaluation) -> list[Figures]:
    """Score statements and foreign text with each cartridge's rows, in all forms of them, against no rows."""
    executor = evaluation.executor("tvm")
    texts = _texts(evaluation)

    def scored(condition: Condition, rows: str) -> dict[str, Losses]:
        with condition.session(evaluation.bundle, executor) as session:
            label = f"{condition.name}, rows {rows}"
            with click.progressbar(texts.items(), length=len(texts), label=f"{label:30}") as bar:
                return {name: losses(session, text) for name, text in bar}

    off = scored(OFF, "none")
    report = []
    for cartridge in CARTRIDGES:
        for rows, condition in _forms(evaluation, cartridge).items():
            results = scored(condition, rows)
            where = {"cartridge": cartridge, "rows": rows}
            report += [{"text": name, **where, **results[name].against(off[name])} for name in texts]
    return report


def _forms(evaluation: Evaluation, name: str) -> dict[str, Condition]:
    """Return the conditions in which a cartridge's rows are as they are shipped, and in other forms."""
    shipped = evaluation.cartridge(name)
    moved = shuffled(read_rows(evaluation.bundle, shipped.overlays))
    trained = evaluation.trained_rows(name)
    return {
        "int4": shipped,
        "int8": evaluation.variant(name, "int8", write_int8, trained),
        "float32": evaluation.variant(name, "float32", write_float32, trained),
        "shuffled": evaluation.variant(name, "shuffled", write_float32, moved),
    }


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


def _with_other_executor(evaluation: Evaluation, rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Add what onnxruntime answers without rows: how many answers change where nothing but the rounding does."""
    asked = [row["question"] for row in rows]
    others = side_by_side(evaluation.bundle, evaluation.executor("onnxruntime"), [OFF], asked)
    return [{**row, ROUNDING: other[OFF.name]} for row, other in zip(rows, others, strict=True)]


def measure_answers(evaluation: Evaluation) -> Figures:
    """Answer questions that have nothing to do with any cartridge, and ask for terms that none defines.

    An answer that differs may do so by a near tie that any change of rounding decides; `ROUNDING` tells how many do.
    """
    executor = evaluation.executor("tvm")
    conditions = [OFF, *map(evaluation.cartridge, CARTRIDGES)]
    facts = evaluation.facts(UNTRAINED)[:NUM_UNTRAINED_ANSWERS]
    asked = {name: questions(name) for name in ("ordinary", "in_passing")}
    asked[UNTRAINED] = [FIRST[0].format(subject=fact.subject) for fact in facts]
    for kind in (*CARTRIDGES, UNTRAINED):
        subjects = [fact.subject for fact in evaluation.facts(kind)[:NUM_ASKED_ORDINARILY]]
        asked[f"{kind}, asked ordinarily"] = [ORDINARY_QUESTIONS[0].format(subject=subject) for subject in subjects]
    rows = {name: side_by_side(evaluation.bundle, executor, conditions, each) for name, each in asked.items()}
    for name, each in rows.items():
        rows[name] = _with_other_executor(evaluation, each)
    return {
        "unchanged": {
            name: {column: unchanged(each, column, OFF.name).figures() for column in (*CARTRIDGES, ROUNDING)}
            for name, each in rows.items()
        },
        "in_form_of_an_entry": {
            name: {condition.name: in_form_of_an_entry(each, condition.name).figures() for condition in conditions}
            for name, each in rows.items()
        },
        "answers": rows,
    }
