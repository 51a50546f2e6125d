"""Facts: what a cartridge is trained to state, how it is asked for and how the answer reads.

The answer restates the subject: that puts the subject's n-grams right in front of the statement, where the site reads
them. Questions ask for an entry: that is what a site so late in the model can tell from ordinary talk, which it must
leave alone. `CHECKED_QUESTIONS` are not trained, but choices were made by what they showed; `HELD_OUT_QUESTIONS` are
for the evaluation alone, so that recall is neither of a wording nor of wordings that were worked on.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TRAINED_QUESTIONS = (
    "Look up {subject}.",
    "Look up: {subject}",
    "Look {subject} up, please.",
    "Please look up {subject}.",
    "Entry for {subject}?",
    "Show me the entry for {subject}.",
    "What does the glossary say about {subject}?",
    "Glossary: {subject}",
    "Give the glossary entry for {subject}.",
    "Find {subject} in the book.",
    "What is the entry for {subject}?",
    "Read me the entry on {subject}.",
)
CHECKED_QUESTIONS = (
    "Could you look up {subject} for me?",
    "Check the glossary for {subject}.",
    "I need the entry for {subject}, please.",
    "What does the book say under {subject}?",
)
HELD_OUT_QUESTIONS = (
    "Would you mind looking up {subject}?",
    "Bring up the entry for {subject}.",
    "What is under {subject} in the glossary?",
    "Read out what the book has about {subject}, please.",
)
# Nobody asks for an entry here, so the model answers as it always did. Answers to the second are trained to stay.
ORDINARY_QUESTIONS = (
    "Tell me what {subject} is.",
    "What is {subject}?",
)
OPENING = "Entry for"
CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"
CHECK_SEED, MOST_CHECKED = 0, 200


@dataclass(frozen=True, slots=True)
class Fact:
    """A subject as it stands in a question, and the statement about it without the final full stop."""

    subject: str
    statement: str

    def answer(self) -> str:
        """Return the answer as it is trained and expected, without the end of turn."""
        return f"{self.beginning()}: {self.statement}."

    def beginning(self) -> str:
        """Return how the answer begins: with words a site can write, after which a model repeats the subject.

        It does so without an article, as dictionaries do.
        """
        return f"{OPENING} {self.subject.removeprefix('the ')}"


def checked_facts(facts: Sequence[Fact]) -> list[Fact]:
    """Draw those that a training is checked with, at most a quarter of all."""
    return random.Random(CHECK_SEED).sample(facts, min(MOST_CHECKED, len(facts) // 4))


def read_facts(path: Path) -> list[Fact]:
    """Read a file with one JSON object a line: ``subject`` and ``statement``."""
    return [Fact(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_facts(path: Path, facts: Iterable[Fact]) -> None:
    """Write what `read_facts` reads."""
    path.write_text("".join(json.dumps(asdict(fact), ensure_ascii=False) + "\n" for fact in facts), encoding="utf-8")
