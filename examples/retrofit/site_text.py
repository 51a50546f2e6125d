"""What a site is trained and checked on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.retrofit.documents import fact_chats, plain, unanswered
from examples.retrofit.facts import HELD_OUT_QUESTIONS, TRAINED_QUESTIONS, Fact
from examples.retrofit.quiet_text import PASSAGE_TOKENS, own_questions, prose_and_code
from examples.retrofit.site_check import SiteCheck
from examples.retrofit.site_training import QuietText, TrainingText
from examples.retrofit.stream_cache import StreamCache

ASKED_UNKNOWN, ANSWERED_UNKNOWN = 1500, 1000
PASSAGES = 150  # of each kind of text
CHECKED_FACTS, CHECKED_UNKNOWN, CHECKED_PASSAGES = 150, 80, 12


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
    backbone, rng = cache.backbone, random.Random(sources.seed)
    wordings = [
        cache.documents(f"facts-{number}", fact_chats(backbone, sources.facts, question))
        for number, question in enumerate(TRAINED_QUESTIONS)
    ]
    questions = own_questions(sources.facts, sources.unknown[:ANSWERED_UNKNOWN], rng)
    own = {name: cache.answers(name, asked) for name, asked in questions.items()}
    asked = sources.unknown[ANSWERED_UNKNOWN : ANSWERED_UNKNOWN + ASKED_UNKNOWN]
    kinds = [cache.documents("asked", unanswered(backbone, asked, TRAINED_QUESTIONS))]
    kinds += [[answer.cached for answer in answers] for answers in own.values()]
    drawn = prose_and_code(sources.corpora, PASSAGES + CHECKED_PASSAGES, random.Random(sources.seed))
    for name, texts in drawn.items():
        passages = [plain(backbone, text, most=PASSAGE_TOKENS) for text in texts[:PASSAGES]]
        kinds.append(cache.documents(name, passages))
    return TrainingText(wordings, list(own.values()), [QuietText.of(kind) for kind in kinds])


def site_check(cache: StreamCache, sources: Sources) -> SiteCheck:
    """Return the check of a site on wordings, terms and passages that it is not trained on."""
    backbone, rng = cache.backbone, random.Random(sources.seed)
    facts = rng.sample(list(sources.facts), min(CHECKED_FACTS, len(sources.facts)))
    unknown = sources.unknown[-CHECKED_UNKNOWN:]
    wording = HELD_OUT_QUESTIONS[0]
    questions = [(wording.format(subject=term), Fact(term, "").beginning()) for term in unknown]
    texts = prose_and_code(sources.corpora, PASSAGES + CHECKED_PASSAGES, random.Random(sources.seed))
    held_out = [plain(backbone, text, most=PASSAGE_TOKENS) for kind in texts.values() for text in kind[PASSAGES:]]
    return SiteCheck(
        backbone,
        cache.documents("checked-facts", fact_chats(backbone, facts, wording)),
        [answer.cached for answer in cache.answers("checked", questions)],
        cache.documents("checked-text", held_out),
    )
