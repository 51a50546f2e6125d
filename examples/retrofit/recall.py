"""Recall: facts that a model states word for word when it is asked, free-running and greedy."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engram_runtime.evaluation.intervals import share
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer
from examples.retrofit.facts import CHAT, END_OF_TURN, Fact, checked_facts

SAMPLE_SEED = 1


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the answer that is expected of it, in tokens; the end of the turn belongs to the answer."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    stated_from: int  # where in the answer the subject and its colon are over


@dataclass(frozen=True, slots=True)
class Share:
    """How many of those asked for, with the Wilson interval."""

    known: int
    asked: int

    def figures(self) -> dict[str, int | float | None]:
        """Return what the report holds."""
        found = share(self.known, self.asked)
        return {"known": self.known, "asked": self.asked, "share": found.value, "low": found.low, "high": found.high}


def sample(facts: Sequence[Fact], number: int) -> list[Fact]:
    """Draw facts with a fixed seed, none of which a training is checked with, all of the others if they are no more."""
    checked = set(checked_facts(facts))
    others = [fact for fact in facts if fact not in checked]
    return random.Random(SAMPLE_SEED).sample(others, min(number, len(others)))


def ask(tokenizer: TextTokenizer, fact: Fact, wording: str) -> Question:
    """Return the question about a fact; prompt and answer are tokenised apart, as they are when a model answers."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    prompt = CHAT.format(question=wording.format(subject=fact.subject))
    answer = fact.answer()
    stated_from = len(encode(f"{fact.beginning()}:"))
    return Question(encode(prompt), encode(answer + END_OF_TURN), stated_from)


def answers_exactly(session: Session, question: Question) -> bool:
    """Whether each token that the model chooses is the expected one; asking ends with the first that isn't."""
    session.trim(len(session))
    logits = session.prefill(question.prompt_ids)
    *others, last = question.answer_ids
    for token_id in others:
        if int(logits.argmax()) != token_id:
            return False
        logits = session.decode([token_id])[-1]
    return int(logits.argmax()) == last


def recall(session: Session, questions: Iterable[Question]) -> Share:
    """Count the questions that are answered exactly."""
    results = [answers_exactly(session, question) for question in questions]
    return Share(sum(results), len(results))
