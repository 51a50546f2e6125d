"""How well a model answers questions by the likelihood of what may follow them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engram_runtime.evaluation.continuations import Likelihood, Prompt, likelihoods
from engram_runtime.evaluation.intervals import Estimate, ratio_of_sums, share
from engram_runtime.evaluation.questions import Question
from engram_runtime.session import Session

# What a choice's log-probability is divided by before the largest is chosen; its own bytes, without the space before.
SCORES: dict[str, Callable[[Likelihood, str], float]] = {
    "accuracy": lambda found, choice: found.logprob,
    "accuracy_per_token": lambda found, choice: found.logprob / found.tokens,
    "accuracy_per_byte": lambda found, choice: found.logprob / len(choice.encode()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model made of a question: how likely each choice is."""

    question: Question
    likelihoods: Sequence[Likelihood]

    def chosen(self, score: str) -> int:
        """Return the choice with the largest of `SCORES`, of equal ones the first."""
        pairs = zip(self.likelihoods, self.question.choices, strict=True)
        scores = [SCORES[score](found, choice) for found, choice in pairs]
        return scores.index(max(scores))

    def right(self, score: str = "accuracy") -> bool:
        """Whether it chooses the answer, of a cloze whether it says the target, greedily."""
        if self.question.answer is None:
            return self.likelihoods[0].greedy
        return self.chosen(score) == self.question.answer

    def figures(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        found = {
            "line": self.question.line,
            "kind": self.question.kind,
            "choices": [asdict(each) for each in self.likelihoods],
            "right": self.right(),
        }
        if self.question.answer is None:
            return found
        return {**found, "answer": self.question.answer, "chosen": {score: self.chosen(score) for score in SCORES}}


def answers(
    session: Session, questions: Sequence[Question], prompts: Sequence[Prompt], progress: Callable[[int], None]
) -> list[Answer]:
    """Ask questions, given as tokens too; ``progress`` is told of each."""
    found = []
    for question, prompt in zip(questions, prompts, strict=True):
        found.append(Answer(question=question, likelihoods=likelihoods(session, prompt)))
        progress(1)
    return found


def of_kind(found: Sequence[Answer], kind: str) -> list[Answer]:
    """Return the answers to questions of a kind."""
    return [answer for answer in found if answer.question.kind == kind]


def choice_figures(found: Sequence[Answer]) -> dict[str, Any]:
    """Return how often the answer was chosen and how often it would be by chance."""
    accuracies = {score: share(sum(answer.right(score) for answer in found), len(found)) for score in SCORES}
    chance = sum(1 / len(answer.question.choices) for answer in found) / len(found)
    return {
        "questions": len(found),
        **accuracies,
        "chance": chance,
    }


def cloze_figures(found: Sequence[Answer]) -> dict[str, Any]:
    """Return how often the target is said, greedily, and the perplexity of its tokens."""
    said = share(sum(answer.right() for answer in found), len(found))
    return {"questions": len(found), "exact": said, "perplexity": _perplexity(found)}


def _perplexity(found: Sequence[Answer]) -> Estimate:
    losses = np.array([-answer.likelihoods[0].logprob for answer in found])
    tokens = np.array([float(answer.likelihoods[0].tokens) for answer in found])
    return ratio_of_sums(losses, tokens).exp()


FIGURES = {"choices": choice_figures, "cloze": cloze_figures}


def figures(found: Sequence[Answer]) -> dict[str, Any]:
    """Return the figures of each kind of question that there is."""
    return {kind: make(asked) for kind, make in FIGURES.items() if (asked := of_kind(found, kind))}
