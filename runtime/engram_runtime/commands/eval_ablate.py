"""``engram eval ablate``: what a bundle's tables are worth."""

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from engram_runtime.commands.eval_options import (
    TextToScore,
    limit_option,
    scoring_options,
    text_options,
    to_json,
    what_ran,
)
from engram_runtime.commands.loading import Loading
from engram_runtime.commands.options import bundle_argument, executor_option, json_option
from engram_runtime.errors import RequestError
from engram_runtime.evaluation.ablation import (
    OFF,
    ON,
    Condition,
    Figures,
    ablate,
    conditions,
    question_figures,
    text_figures,
)
from engram_runtime.evaluation.answers import FIGURES, answers
from engram_runtime.evaluation.questions import Question, read_questions
from engram_runtime.evaluation.texts import text_losses
from engram_runtime.llm import LLM


@click.command("ablate")
@bundle_argument
@text_options(required=False)
@click.option("--choices", type=click.Path(path_type=Path), help="Questions to ask, as for engram eval choices.")
@limit_option
@executor_option
@scoring_options
@json_option
def ablate_command(
    bundle: Path,
    text: TextToScore | None,
    choices: Path | None,
    limit: int | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Measure what BUNDLE's tables are worth: on a text, or by questions.

    The same is scored with tables off, all and each site's alone; with rows that n-grams took from one another; and
    with rows quantised anew. Differences are of the same tokens or questions, with intervals of their own.
    """
    if (text is None) == (choices is None):
        raise RequestError(
            "what are its tables to be worth something for? give either --text FILE or --choices FILE.jsonl"
        )
    if choices is None:
        _refuse_options("--choices", ("limit",))
    else:
        _refuse_options("--text", ("tokens", "window"))
    questions = read_questions(choices, limit) if choices is not None else []
    with loading.load(bundle) as llm:
        if not llm.session.sites:
            raise RequestError(f"bundle {bundle} has no tables to do without; score it with: engram eval ppl")
        found = _on_text(llm, text) if text is not None else _on_questions(llm, questions)
        ran = what_ran(loading, llm)
    click.echo(to_json({"conditions": found, **ran}) if as_json else "\n".join([*map(_line, found), _meaning(found)]))


def _refuse_options(given_with: str, names: Sequence[str]) -> None:
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise RequestError(f"--{name} is for {given_with}, which isn't given; leave it out")


def _on_text(llm: LLM, text: TextToScore) -> list[Figures]:
    session = llm.session
    windows = text.windows(llm.tokenizer, session.model.context_length)
    changed = list(conditions(session.sites, [((), token_ids) for token_ids in windows.token_ids]))
    with click.progressbar(length=_steps(windows.tokens, changed), label="scoring", file=sys.stderr) as bar:
        return text_figures(ablate(session, changed, lambda: text_losses(session, windows, bar.update)))


def _on_questions(llm: LLM, questions: Sequence[Question]) -> list[Figures]:
    session = llm.session
    prompts = [question.encode(llm.tokenizer, session.model.context_length) for question in questions]
    changed = list(conditions(session.sites, [run for prompt in prompts for run in prompt.runs()]))
    with click.progressbar(length=_steps(len(questions), changed), label="asking", file=sys.stderr) as bar:
        return question_figures(ablate(session, changed, lambda: answers(session, questions, prompts, bar.update)))


def _steps(each: int, changed: Sequence[Condition]) -> int:
    return each * (1 + sum(condition.reason is None for condition in changed))


def _line(figures: Figures) -> str:
    """Write what is known of a condition."""
    if "not_measured" in figures:
        return f"{figures['condition']}: {figures['not_measured']}"
    name, changed = figures["condition"], figures["condition"] != ON
    if "perplexity" in figures:
        ratio = f", {figures['ratio']:.5f} times" if changed else ""
        return f"{name}: perplexity {figures['perplexity']:.4f}{ratio}"
    kinds = [(kind, figures[kind]) for kind in FIGURES if kind in figures]
    parts = (f"{kind} {of['right']:.1%} right" + f", {of['difference']:+.1%}" * changed for kind, of in kinds)
    return f"{name}: {'; '.join(parts)}"


def _meaning(found: Sequence[Figures]) -> str:
    """Say in a line what it comes to without tables."""
    (off,) = (figures for figures in found if figures["condition"] == OFF)
    if "ratio" in off:
        return f"on this text tables {_effect(off['ratio'].excludes(1), worse=off['ratio'].value > 1)}"
    differences = [(kind, off[kind]["difference"]) for kind in FIGURES if kind in off]
    return "; ".join(f"by {kind} tables {_effect(of.excludes(0), worse=of.value < 0)}" for kind, of in differences)


def _effect(differs: bool, *, worse: bool) -> str:
    """Say what tables do where it differs without them, or may not."""
    if not differs:
        return "may help or harm: what changes without them may be nothing, its interval says"
    return "help: without them it gets worse" if worse else "harm: without them it gets better"
