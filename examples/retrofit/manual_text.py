"""A user's own text as facts: a file of facts, or a folder of .txt and .md files, read line by line.

A line becomes a fact in the first of these ways that fits:

1. ``Subject: statement`` (also ``- **Subject**: statement``, ``1. Subject: statement``) or ``Subject - statement`` with
   a dash between spaces, where the subject has at most eight words.
2. Prose: each sentence of at least six words is a statement of its own whose subject is its first three words; the
   statement is the rest of it. So the text can be asked for by how it begins.

Headings (``#``), rules, tables and code fences are left out, and so is what else is said of a subject: an answer can
only be one.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from engram_runtime.errors import RequestError
from examples.retrofit.facts import Fact, read_facts

SUFFIXES = (".txt", ".md")
MAX_SUBJECT_WORDS = 8
LEADING_WORDS = 3
MIN_SENTENCE_WORDS = 6

BULLET = re.compile(r"^(?:[-*+•]|\d+[.)])\s+")
EMPHASIS = re.compile(r"\*\*|__|`")
SKIPPED = re.compile(r"^(?:#|\||=+$|-+$|\*{3,}$)")
PAIR = re.compile(r"^(?P<subject>[^:]{1,80}?)(?::\s+|\s+[-\u2013\u2014]\s+)(?P<statement>\S.*)$")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def facts_of(path: Path) -> list[Fact]:
    """Return the facts of a ``.jsonl`` file or of a folder of text, each subject once.

    Raises:
        RequestError: there is nothing to learn in it.
    """
    facts = distinct(read_facts(path) if path.is_file() else _facts_of_folder(path))
    if not facts:
        raise RequestError(
            f"{path} holds no facts; give a .jsonl file or a folder with lines like 'Subject: statement'"
        )
    return facts


def distinct(facts: Iterable[Fact]) -> list[Fact]:
    """Return the first fact of each subject, capitals aside."""
    first: dict[str, Fact] = {}
    for fact in facts:
        first.setdefault(fact.subject.lower(), fact)
    return list(first.values())


def facts_of_text(text: str) -> Iterator[Fact]:
    """Yield the facts of a text in the order of its lines."""
    fenced = False
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("```"):
            fenced = not fenced
        elif line and not fenced and not SKIPPED.match(line):
            yield from _facts_of_line(EMPHASIS.sub("", BULLET.sub("", line)))


def _facts_of_folder(folder: Path) -> Iterator[Fact]:
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        yield from facts_of_text(path.read_text(encoding="utf-8"))


def _facts_of_line(line: str) -> Iterator[Fact]:
    pair = PAIR.match(line)
    if pair and len(pair["subject"].split()) <= MAX_SUBJECT_WORDS:
        yield from _fact(pair["subject"], pair["statement"])
        return
    for sentence in SENTENCE_END.split(line):
        words = sentence.split()
        if len(words) >= MIN_SENTENCE_WORDS:
            yield from _fact(" ".join(words[:LEADING_WORDS]), " ".join(words[LEADING_WORDS:]))


def _fact(subject: str, statement: str) -> Iterator[Fact]:
    subject, statement = subject.strip(), statement.strip().removesuffix(".")
    if subject and statement:
        yield Fact(subject, statement)
