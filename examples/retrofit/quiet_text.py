"""Text on which a site should keep quiet: prose, code, ordinary chats, and questions about what it does not know.

None of it is in the corpora that `examples.retrofit.text_perplexity` measures foreign text on.
"""

import itertools
import json
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from examples.retrofit.backbone import Backbone
from examples.retrofit.corpora import JARGON, fetch, text_of_deb
from examples.retrofit.documents import Document, Report, prompt
from examples.retrofit.facts import TRAINED_QUESTIONS, Fact
from examples.retrofit.generation import generate

JARGON_FILE = "usr/share/dictd/jargon.dict.dz"
PASSAGE_CHARACTERS, PASSAGE_TOKENS = 1200, 192
PARTS = Path(__file__).with_name("prompt_parts.json")
ANSWER_TOKENS, BATCH = 16, 96
NUM_PASSING, NUM_ORDINARY = 400, 500
QUESTIONS_FOR_UNKNOWN = (
    *TRAINED_QUESTIONS,
    "Please explain {subject}.",
    "What is the meaning of {subject}?",
    "Give me a definition of {subject}.",
    "I would like to know what {subject} means.",
    "Do you know what {subject} is?",
    "Can you explain what {subject} means?",
    "In a few words, what is {subject}?",
    "How would a dictionary define {subject}?",
    "I read about {subject} today. What does it mean?",
    "Help me understand {subject}.",
    "My teacher mentioned {subject}. What is that?",
    "Someone asked me about {subject}. What should I say it is?",
    "Say in one sentence what {subject} is.",
    "{subject}: what does this mean?",
    "What do people mean by {subject}?",
    "Would you define {subject} for me?",
    "I need to know what {subject} is, thanks.",
    "Quick question: what is {subject}?",
    "What exactly is {subject}?",
    "We talked about {subject}, and I did not know it. Explain it.",
)
QUESTIONS_IN_PASSING = (
    "Write a short story about {subject}.",
    "How much does {subject} cost?",
    "Give me three facts about {subject}.",
    "Who invented {subject}?",
    "Translate the word {subject} into German.",
    "Write a sentence with the word {subject}.",
    "Why do people like {subject}?",
    "What can I do with {subject}?",
)


def passages(text: str, count: int, rng: random.Random) -> list[str]:
    """Draw passages, each from where a line begins."""
    starts = [match.end() for match in re.finditer(r"\n", text[: max(1, len(text) - PASSAGE_CHARACTERS)])]
    return [text[start : start + PASSAGE_CHARACTERS] for start in rng.sample(starts, min(count, len(starts)))]


def prose_and_code(folder: Path, count: int, rng: random.Random) -> dict[str, list[str]]:
    """Return passages of the Jargon File, of Python's reference and of its library's source, ``count`` of each.

    Args:
        folder: where packages of Debian are kept.
    """
    return {
        "jargon": passages(text_of_deb(fetch(JARGON, folder), JARGON_FILE), count, rng),
        "reference": passages("\n\n".join(pydoc_data.topics.topics.values()), count, rng),
        "source": passages(_library_source(rng), count, rng),
    }


def own_questions(
    facts: Sequence[Fact], unknown: Sequence[str], rng: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """Return questions whose answers are the model's own, and how each answer has to begin.

    Whoever asks what a term is gets an answer that begins with it, be it known or not; only what follows tells whether
    the site knows it. All other questions are answered as the model does without the site.

    Args:
        facts: what is trained; their subjects occur in questions for something else.
        unknown: terms that are no facts.
    """
    parts: dict[str, list[str]] = json.loads(PARTS.read_text(encoding="utf-8"))
    wordings = itertools.cycle(QUESTIONS_FOR_UNKNOWN)
    passing = [rng.choice(QUESTIONS_IN_PASSING).format(subject=fact.subject) for fact in facts]
    ordinary = [rng.choice(parts["wordings"]).format(rng.choice(parts["topics"])) for _ in range(NUM_ORDINARY)]
    return {
        "unknown": [
            (wording.format(subject=term), Fact(term, "").beginning())
            for wording, term in zip(wordings, unknown, strict=False)
        ],
        "passing": [(question, "") for question in rng.sample(passing, min(len(passing), NUM_PASSING))],
        "ordinary": [(question, "") for question in ordinary],
    }


def answered(backbone: Backbone, asked: Sequence[tuple[str, str]], report: Report = lambda _: None) -> list[Document]:
    """Let the model answer questions greedily, each with at most `ANSWER_TOKENS` tokens.

    Args:
        asked: questions, and how the answer has to begin.
    """
    by_length: dict[int, list[Document]] = {}
    for question, beginning in asked:
        question_ids, begun = backbone.encode(prompt(question)), backbone.encode(beginning)
        document = Document([*question_ids, *begun], len(question_ids), len(question_ids) + len(begun))
        by_length.setdefault(len(document.token_ids), []).append(document)
    documents = []
    for same in by_length.values():
        for start in range(0, len(same), BATCH):
            batch = same[start : start + BATCH]
            written = generate(backbone.model, [each.token_ids for each in batch], ANSWER_TOKENS, backbone.end_of_turn)
            documents += [
                replace(begun, token_ids=[*begun.token_ids, *rest.generated_ids])
                for begun, rest in zip(batch, written, strict=True)
            ]
            report(len(batch))
    return documents


def _library_source(rng: random.Random) -> str:
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in rng.sample(modules, 60))
