"""What drafts gave, from the samples of the rounds."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from engram_runtime.drafting.statistics import DraftStatistics

Answer = Mapping[str, Mapping[str, Any]]  # of engram_runtime.bench.continuations.drafted
PLAIN, DRAFTED = WAYS = ("plain", "drafted")


def draft_rounds(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return rates of all texts together and of each, a list of their values in the order of the rounds."""
    names = list(answers[0])
    texts = {name: _rates([[answer[name]] for answer in answers]) for name in names}
    return {**_rates([list(answer.values()) for answer in answers]), "texts": texts}


def draft_counts(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return what was counted in all rounds, as JSON values; ``same_text`` tells whether drafts changed no token."""
    texts = [text for answer in answers for text in answer.values()]
    statistics = reduce(add, (DraftStatistics(**text[DRAFTED]["drafts"]) for text in texts))
    return {
        **statistics.figures(),
        "same_text": all(text["same"] for text in texts),
        "experts_per_forward": {way: _experts([text[way] for text in texts]) for way in WAYS},
    }


def _rates(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    plain, drafted = ([_rate([text[way] for text in texts]) for texts in rounds] for way in WAYS)
    over_plain = [fast / slow for fast, slow in zip(drafted, plain, strict=True)]
    return {"plain_tok_s": plain, "tok_s": drafted, "over_plain": over_plain}


def _rate(texts: Sequence[Mapping[str, Any]]) -> float:
    tokens: int = sum(text["tokens"] for text in texts)
    seconds: float = sum(text["seconds"] for text in texts)
    return tokens / seconds


def _experts(texts: Sequence[Mapping[str, Any]]) -> float | None:
    if any(text["experts"] is None for text in texts):
        return None
    forwards: int = sum(text["drafts"]["forwards"] for text in texts)
    experts: int = sum(text["experts"] for text in texts)
    return round(experts / forwards, 2)
