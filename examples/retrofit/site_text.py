"""What a site is trained and checked on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_runtime.errors import RequestError
from examples.retrofit.documents import begun_chats, fact_chats, plain
from examples.retrofit.facts import CHECKED_QUESTIONS, TRAINED_QUESTIONS, Fact, checked_facts
from examples.retrofit.quiet_text import (
    FURTHER_LOOK_UPS,
    PASSAGE_TOKENS,
    own_questions,
    passages,
    prose_and_code,
    taught_and_checked,
)
from examples.retrofit.site_check import SiteCheck
from examples.retrofit.site_training import QuietText, TrainingText
from examples.retrofit.stream_cache import StreamCache

ANSWERED_UNKNOWN, BEGUN = 1000, 2400
WORDING_SHIFTS = (0, 5, 9)  # fact i is asked for in these wordings after the i-th, so that passes differ
SHORT_ANSWER, LONG_ANSWER = 16, 64  # tokens; the first ones are compared, all should be quiet
PASSAGES = 150  # of each kind of text
CHECKED_UNKNOWN, CHECKED_PASSAGES = 80, 12


def from_words(path: Path) -> Path:
    """Return a file that the command ``words`` writes; raises RequestError where there is none."""
    if not path.is_file():
        raise RequestError(f"there is no {path}; run: python -m examples.retrofit words")
    return path


def unknown_terms(work: Path) -> list[str]:
    """Read the terms of a work folder that are no facts; raises RequestError where there are none."""
    return from_words(work / "quiet_terms.txt").read_text(encoding="utf-8").split("\n")[:-1]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a site's text comes from.

    Attributes:
        facts: what it is to know.
        unknown: at least a few thousand terms that are no facts.
        corpora: folder of Debian's packages.
    """

    facts: Sequence[Fact]
    unknown: Sequence[str]
    corpora: Path
    seed: int = 0


def training_text(cache: StreamCache, sources: Sources) -> TrainingText:
    """Return what a site is trained on; what isn't in the cache yet is computed."""
    backbone = cache.backbone
    wordings = [
        cache.documents(f"facts-{shift}", fact_chats(backbone, sources.facts, TRAINED_QUESTIONS, shift))
        for shift in WORDING_SHIFTS
    ]
    asked = sources.unknown[ANSWERED_UNKNOWN : ANSWERED_UNKNOWN + BEGUN]
    begun = cache.documents("begun", begun_chats(backbone, asked, [*TRAINED_QUESTIONS, *FURTHER_LOOK_UPS]))
    questions = own_questions(sources.facts, sources.unknown[:ANSWERED_UNKNOWN], sources.seed)
    own = [
        cache.answers(name, asked, tokens=LONG_ANSWER if name == "ordinary" else SHORT_ANSWER)
        for name, asked in questions.items()
    ]
    kinds = [[answer.cached for answer in answers] for answers in own]
    for name, text in prose_and_code(sources.corpora, sources.seed).items():
        taught, _ = taught_and_checked(text)
        drawn = passages(taught, PASSAGES, random.Random(f"{sources.seed} {name}"))
        kinds.append(cache.documents(name, [plain(backbone, each, most=PASSAGE_TOKENS) for each in drawn]))
    return TrainingText(
        wordings,
        begun,
        [[answer.first(SHORT_ANSWER) for answer in answers] for answers in own],
        [QuietText.of(kind) for kind in kinds],
    )


def site_check(cache: StreamCache, sources: Sources) -> SiteCheck:
    """Return the check of a site on wordings, terms and passages that it is not trained on."""
    backbone = cache.backbone
    questions = [f"What is {term}?" for term in sources.unknown[-CHECKED_UNKNOWN:]]
    drawn = []
    for name, text in prose_and_code(sources.corpora, sources.seed).items():
        _, kept = taught_and_checked(text)
        drawn += passages(kept, CHECKED_PASSAGES, random.Random(f"{sources.seed} {name}"))
    held_out = [plain(backbone, each, most=PASSAGE_TOKENS) for each in drawn]
    return SiteCheck(
        backbone,
        cache.documents("checked-facts", fact_chats(backbone, checked_facts(sources.facts), CHECKED_QUESTIONS, 0)),
        [answer.cached for answer in cache.answers("checked", questions, tokens=SHORT_ANSWER)],
        cache.documents("checked-text", held_out),
    )
