"""The measured figures as tables of the model card, and beside those of another evaluation."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from engram_runtime.errors import RequestError
from engram_runtime.new_file import new_file
from examples.retrofit.facts import HELD_OUT_QUESTIONS
from examples.retrofit.plots import acceptance_texts, draw_all

BEGIN, END = "<!-- figures: written by `python -m examples.retrofit card` -->\n", "<!-- end of figures -->\n"
PLOTS = "".join(f"![{name}]({name.lower()}.png)\n" for name in ("Recall", "Perplexity", "Acceptance")) + "\n"
DEFAULT_ASSET = Path("assets/smollm2-engram")
LONGEST_ANSWER = 160  # characters of an answer in a table

Figures = Mapping[str, Any]


def read_report(path: Path) -> Figures:
    """Read what `examples.retrofit.evaluation` wrote.

    Raises:
        RequestError: there is no such file.
    """
    if not path.is_file():
        raise RequestError(f"there is no {path}; run: python -m examples.retrofit evaluate")
    report: Figures = json.loads(path.read_text(encoding="utf-8"))
    return report


def tables(report: Figures) -> Iterator[str]:
    """Yield the lines of all tables, in Markdown."""
    yield from _section("Recall over all held-out wordings", "cartridge|executor|word for word", _overall(report))
    yield from _section("Recall", "facts|cartridge|rows|executor|wording|word for word|95 % interval", _recall(report))
    yield from _section(
        "Perplexity",
        "text|cartridge|rows|without rows|with|ratio|95 % interval|added, median|added, 95 % below",
        _perplexity(report),
    )
    yield from _section(
        "Answers", "questions|cartridge|word for word as without rows|95 % interval", _unchanged(report)
    )
    yield from _section(
        "Answers in form of an entry", "questions|cartridge|begin with Entry for|95 % interval", _entries(report)
    )
    yield from _section(
        "Drafts", "drafter|text|first right|first two|first three|tokens per step with 1, 2, 3 drafts", _drafts(report)
    )
    columns = "question|without rows|dictionary|manual"
    for name, title in (("ordinary", "Ordinary questions"), ("in_passing", "Questions with a trained word in passing")):
        yield from _section(title, columns, _side_by_side(report["answers"]["answers"][name]))


def _section(title: str, columns: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield from (f"### {title}", "", f"| {columns.replace('|', ' | ')} |", "|---" * (columns.count("|") + 1) + "|")
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    yield ""


def _recall(report: Figures) -> Iterator[Sequence[str]]:
    for row in all_recall(report):
        where = [str(row[name]) for name in ("facts", "cartridge", "rows", "executor", "wording")]
        yield *where, f"{row['known']} of {row['asked']} ({row['share']:.1%})", _percent_interval(row)


def _overall(report: Figures) -> Iterator[Sequence[str]]:
    """Yield what each cartridge states as it is shipped; no intervals, since all wordings ask for the same facts."""
    known: dict[tuple[str, str], list[Figures]] = {}
    for row in (*report["recall"], *report["torch"]):
        if row["facts"] == row["cartridge"] and row["rows"] == "int4" and row["wording"] in HELD_OUT_QUESTIONS:
            known.setdefault((row["cartridge"], row["executor"]), []).append(row)
    for where, rows in known.items():
        total, asked = sum(row["known"] for row in rows), sum(row["asked"] for row in rows)
        yield *where, f"{total} of {asked} ({total / asked:.1%})"


def all_recall(report: Figures) -> list[Figures]:
    """Return what was asked of every executor, of torch, and with other rows."""
    return [*report["recall"], *report["torch"], *report["row_formats"]]


def _perplexity(report: Figures) -> Iterator[Sequence[str]]:
    for row in report["perplexity"]:
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        added = (f"{row[name]:.2%}" for name in ("added_p50", "added_p95"))
        yield (
            row["text"],
            row["cartridge"],
            row["rows"],
            f"{row['off']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['ratio']:.4f}",
            interval,
            *added,
        )


def _unchanged(report: Figures) -> Iterator[Sequence[str]]:
    for questions, by_cartridge in report["answers"]["unchanged"].items():
        for cartridge, row in by_cartridge.items():
            yield questions, cartridge, f"{row['known']} of {row['asked']}", _percent_interval(row)


def _entries(report: Figures) -> Iterator[Sequence[str]]:
    for questions, by_cartridge in report["answers"]["in_form_of_an_entry"].items():
        for cartridge, row in by_cartridge.items():
            yield questions, cartridge, f"{row['known']} of {row['asked']}", _percent_interval(row)


def _drafts(report: Figures) -> Iterator[Sequence[str]]:
    for drafter, by_text in report["acceptance"].items():
        for text in acceptance_texts(by_text):
            per_step = (f"{row['value']:.2f}" for row in by_text[text]["tokens_per_step"].values())
            yield drafter, text, *_accepted(by_text[text]["every_position"]), ", ".join(per_step)
        yield drafter, "outside of what repeats itself", *_accepted(by_text["outside_repetition"]), "-"


def _accepted(every_position: Figures) -> Iterator[str]:
    return (f"{row['value']:.1%} ({_percent_interval(row)})" for row in every_position.values())


def _side_by_side(rows: Sequence[Mapping[str, str]]) -> Iterator[Sequence[str]]:
    for row in rows:
        others = (
            "*the same*" if row[name] == row["off"] else _one_line(row[name]) for name in ("dictionary", "manual")
        )
        yield row["question"], _one_line(row["off"]), *others


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_ANSWER else f"{line[:LONGEST_ANSWER]}..."


def _percent_interval(row: Figures) -> str:
    return f"{row['low']:.1%} to {row['high']:.1%}"


def flat(report: Figures) -> dict[str, float]:
    """Return the figures that two evaluations are compared by, by name."""
    recall = {
        " / ".join(str(row[name]) for name in ("facts", "cartridge", "rows", "executor", "wording")): row["share"]
        for row in all_recall(report)
    }
    ratios = {
        " / ".join(("perplexity ratio", row["text"], row["cartridge"], row["rows"])): row["ratio"]
        for row in report["perplexity"]
    }
    unchanged = {
        f"unchanged answers / {questions} / {cartridge}": row["share"]
        for questions, by_cartridge in report["answers"]["unchanged"].items()
        for cartridge, row in by_cartridge.items()
    }
    entries = {
        f"in form of an entry / {questions} / {cartridge}": row["share"]
        for questions, by_cartridge in report["answers"]["in_form_of_an_entry"].items()
        for cartridge, row in by_cartridge.items()
    }
    accepted = {
        f"drafts accepted / {drafter} / {text} / {k}": figures["value"]
        for drafter, by_text in report["acceptance"].items()
        for text in acceptance_texts(by_text)
        for k, figures in by_text[text]["every_position"].items()
    }
    return recall | ratios | unchanged | entries | accepted


@click.command()
@click.argument("asset", type=click.Path(path_type=Path), default=DEFAULT_ASSET)
def card(asset: Path) -> None:
    """Write the figures of evaluation.json into the model card and draw its plots."""
    report = read_report(asset / "evaluation.json")
    path = asset / "README.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise RequestError(
            f"{path} has no place for figures; put {BEGIN.strip()!r} and {END.strip()!r} where they belong"
        )
    with new_file(path, replace=True) as file:
        file.write((before + BEGIN + PLOTS + "\n".join(tables(report)) + END + after).encode())
    draw_all(all_recall(report), report, asset)


@click.command()
@click.argument("new", type=click.Path(path_type=Path))
@click.argument("old", type=click.Path(path_type=Path), default=DEFAULT_ASSET / "evaluation.json")
def compare(new: Path, old: Path) -> None:
    """Print the figures of evaluation NEW beside those of OLD."""
    found, expected = flat(read_report(new)), flat(read_report(old))
    for name in [*expected, *(found.keys() - expected.keys())]:
        here, there = (f"{figures[name]:.4f}" if name in figures else "-" for figures in (found, expected))
        click.echo(f"{there:>8} -> {here:>8}  {name}")
