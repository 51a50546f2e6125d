"""A user's own text as facts: a .jsonl file of facts, or .txt and .md files, one or a folder, read line by line.

A line becomes a fact in the first of these ways that fits:

1. ``Subject: statement`` (also ``- **Subject**: statement``, ``1. Subject: statement``) or ``Subject - statement`` with
   a dash between spaces, where the subject has at most eight words.
2. Prose: each sentence of at least six words is a statement of its own whose subject is its first three words; the
   statement is the rest of it. So the text can be asked for by how it begins.

Headings (``#``), rules, tables and code fences are left out, and so is what else is said of a subject: an answer can
only be one.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from engram_runtime.errors import RequestError
from examples.retrofit.facts import Fact

SUFFIXES, FACTS_SUFFIX = (".txt", ".md"), ".jsonl"
FACT_KEYS = {"subject", "statement"}
EXPECTED = '{"subject": "...", "statement": "..."}'
MAX_SUBJECT_WORDS = 8
LEADING_WORDS = 3
MIN_SENTENCE_WORDS = 6

BULLET = re.compile(r"^(?:[-*+•]|\d+[.)])\s+")
EMPHASIS = re.compile(r"\*\*|__|`")
SKIPPED = re.compile(r"^(?:#|\||=+$|-+$|\*{3,}$)")
PAIR = re.compile(r"^(?P<subject>[^:]{1,80}?)(?::\s+|\s+[-\u2013\u2014]\s+)(?P<statement>\S.*)$")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def facts_of(path: Path) -> list[Fact]:
    """Return the facts of a ``.jsonl`` file, of a text or of a folder of text, each subject once.

    Raises:
        RequestError: see `stated_in`.
    """
    return distinct(stated_in(path))


def stated_in(path: Path) -> list[Fact]:
    """Return all facts, subjects that repeat included.

    Raises:
        RequestError: there is nothing to learn in it, or a line of a ``.jsonl`` file is no fact.
    """
    facts = list(_facts_of_lines(path) if path.suffix == FACTS_SUFFIX else _facts_of_texts(path))
    if not facts:
        raise RequestError(
            f"{path} holds no facts; give a {FACTS_SUFFIX} file, or text with lines like 'Subject: statement'"
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


def _facts_of_lines(path: Path) -> Iterator[Fact]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield _read_fact(line, f"{path}, line {number}")


def _read_fact(line: str, where: str) -> Fact:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as err:
        raise RequestError(f"{where} is not JSON ({err}); expected {EXPECTED}") from err
    if not isinstance(entry, dict) or entry.keys() != FACT_KEYS:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise RequestError(f"{where} has {found!r}; expected {EXPECTED}")
    for key, value in entry.items():
        if not (isinstance(value, str) and value.strip()):
            raise RequestError(f"{where} has the {key} {value!r}; expected {EXPECTED}")
    return Fact(**entry)


def _facts_of_texts(path: Path) -> Iterator[Fact]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.suffix in SUFFIXES:
            yield from facts_of_text(file.read_text(encoding="utf-8"))


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
