"""``engram eval choices``: multiple choice and cloze questions."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from engram_runtime.commands.eval_options import limit_option, scoring_options, to_json, what_ran
from engram_runtime.commands.loading import Loading
from engram_runtime.commands.options import (
    bundle_argument,
    executor_option,
    force_option,
    json_option,
    on_or_off_option,
)
from engram_runtime.evaluation.answers import SCORES, answers, figures
from engram_runtime.evaluation.questions import read_questions
from engram_runtime.new_file import new_file


@click.command()
@bundle_argument
@click.argument("file", metavar="FILE.jsonl", type=click.Path(path_type=Path))
@limit_option
@click.option("--items", type=click.Path(path_type=Path), help="Write what came of each question to this JSONL file.")
@force_option
@executor_option
@on_or_off_option
@scoring_options
@json_option
def choices(
    bundle: Path, file: Path, limit: int | None, items: Path | None, force: bool, loading: Loading, as_json: bool
) -> None:
    """Ask BUNDLE the questions of a file by the likelihood of their answers.

    A line is one of these; an answer is a choice or its place, from 0. A choice follows a prompt, a target its text as
    they stand. A question is asked as "Question: ...", a line "Answer:" after it, and choices follow after a space.

    \b
        {"prompt": "Paris is in", "choices": [" France", " Peru"], "answer": 0}
        {"question": "Where is Paris?", "choices": ["France", "Peru"], "answer": "France"}
        {"text": "Paris is in", "target": " France"}

    The likeliest choice is taken: by its sum of log-probabilities, that per token and that per byte. A target is right
    where each of its tokens is the likeliest one.
    """
    questions = read_questions(file, limit)
    with (
        contextlib.nullcontext() if items is None else new_file(items, replace=force) as out,
        loading.load(bundle) as llm,
    ):
        prompts = [question.encode(llm.tokenizer, llm.session.model.context_length) for question in questions]
        with click.progressbar(length=len(questions), label="asking", file=sys.stderr) as bar:
            found = answers(llm.session, questions, prompts, bar.update)
        ran = what_ran(loading, llm)
        if out is not None:
            out.writelines(json.dumps(answer.figures()).encode() + b"\n" for answer in found)
    report = figures(found)
    click.echo(to_json({**report, "file": str(file), **ran}) if as_json else "\n".join(_lines(report)))


def _lines(report: dict[str, Any]) -> list[str]:
    lines = []
    if multiple := report.get("choices"):
        lines.append(f"{multiple['questions']} questions with choices, by chance {multiple['chance']:.1%} right")
        lines += [f"  {score.replace('_', ' ')} {multiple[score]:.1%}" for score in SCORES]
    if cloze := report.get("cloze"):
        lines.append(f"{cloze['questions']} clozes")
        lines += [f"  said word for word {cloze['exact']:.1%}", f"  perplexity of targets {cloze['perplexity']:.4g}"]
    return lines
