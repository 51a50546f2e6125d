"""How far a site is while it is trained, from streams that are cached: recall, and what it costs elsewhere."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from examples.retrofit.backbone import Backbone, batches_by_length
from examples.retrofit.documents import CachedDocument
from examples.retrofit.engram_site import RowTable, TrainableSite
from examples.retrofit.site_training import answer_of

BATCH_TOKENS = 2048

Memory = tuple[TrainableSite, RowTable]


@dataclass(frozen=True, slots=True)
class Check:
    """What a check found.

    Attributes:
        recall: share of facts whose whole answer greedy decoding would write.
        unchanged: share of the model's own answers to other questions that greedy decoding would still write.
        cost: relative increase of the perplexity of other text.
    """

    recall: float
    unchanged: float
    cost: float

    def __str__(self) -> str:
        """Return what a progress line shows."""
        return f"recall {self.recall:.1%}, unchanged {self.unchanged:.1%}, other text {self.cost:+.2%}"


class SiteCheck:
    """Documents that are not trained: facts in a wording held out, the model's own answers, and other text."""

    def __init__(
        self,
        backbone: Backbone,
        facts: Sequence[CachedDocument],
        answers: Sequence[CachedDocument],
        other: Sequence[CachedDocument],
    ) -> None:
        """Measure what answers and other text are without the site."""
        self._backbone, self._facts, self._answers, self._other = backbone, facts, answers, other
        self._said = [_likeliest(*each) for each in self._logits(answers, None)]
        self._loss = self._mean_loss(None)

    def __call__(self, site: TrainableSite, table: RowTable) -> Check:
        """Measure them with the site, and what it knows."""
        memory = site, table
        known = [
            torch.equal(_likeliest(document, logits), answer_of(document))
            for document, logits in self._logits(self._facts, memory)
        ]
        said = [_likeliest(*each) for each in self._logits(self._answers, memory)]
        same = [torch.equal(now, before) for now, before in zip(said, self._said, strict=True)]
        cost = math.expm1(self._mean_loss(memory) - self._loss)
        return Check(recall=sum(known) / len(known), unchanged=sum(same) / len(same), cost=cost)

    def _mean_loss(self, memory: Memory | None) -> float:
        total, count = 0.0, 0
        for document, logits in self._logits(self._other, memory):
            labels = torch.tensor(document.document.token_ids[1:])
            total += functional.cross_entropy(logits[:-1].float(), labels, reduction="sum").item()
            count += len(labels)
        return total / count

    def _logits(
        self, documents: Sequence[CachedDocument], memory: Memory | None
    ) -> Iterator[tuple[CachedDocument, Tensor]]:
        """Yield each document and its logits ``[T, V]``, in an order that depends on the documents alone."""
        for batch in batches_by_length([len(document.hidden) for document in documents], BATCH_TOKENS):
            given = [documents[index] for index in batch]
            stream = [document.hidden if memory is None else _with_memory(document, *memory) for document in given]
            with torch.no_grad():
                states = self._backbone.upper(torch.nn.utils.rnn.pad_sequence(stream, batch_first=True))
            for document, state in zip(given, states, strict=True):
                yield document, state[: len(document.hidden)] @ self._backbone.output_weight.T


@torch.no_grad()
def _with_memory(document: CachedDocument, site: TrainableSite, table: RowTable) -> Tensor:
    update: Tensor = site(document.hidden, table.values[document.row_ids].flatten(1))
    return document.hidden + update.to(document.hidden.dtype)


def _likeliest(document: CachedDocument, logits: Tensor) -> Tensor:
    """Return the likeliest id wherever the answer has one."""
    return logits[document.document.answer_start - 1 : -1].argmax(-1)
