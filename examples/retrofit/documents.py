"""Token sequences the site is trained on, and the residual stream the frozen model has for each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engram_runtime.keyers import NgramKeyer
from examples.retrofit.backbone import BATCH_TOKENS, Backbone, batches_by_length
from examples.retrofit.facts import CHAT, Fact

Report = Callable[[int], None]  # told how many documents have been done since the last call


@dataclass(frozen=True, slots=True)
class Document:
    """Ids of a text; those from ``answer_start`` on are an answer to what stands before.

    Attributes:
        own_from: where the part of the answer begins that the model has written by itself, if there is any.
    """

    token_ids: list[int]
    answer_start: int
    own_from: int

    @property
    def taught(self) -> list[int]:
        """The part of the answer that is given, as for facts all of it is."""
        return self.token_ids[self.answer_start : self.own_from]


@dataclass(frozen=True, slots=True, eq=False)
class CachedDocument:
    """A document, the stream ``hidden [T, D]`` that enters the site's block, and the site's ``row_ids [T, C]``."""

    document: Document
    hidden: Tensor
    row_ids: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class OwnAnswer:
    """A chat the model has answered by itself; its output layer gets ``states [T, D]`` without the site."""

    cached: CachedDocument
    states: Tensor

    def first(self, tokens: int) -> "OwnAnswer":
        """Return the chat with at most so many tokens of the answer."""
        document = self.cached.document
        stop = document.answer_start + tokens
        shorter = replace(document, token_ids=document.token_ids[:stop])
        return OwnAnswer(
            CachedDocument(shorter, self.cached.hidden[:stop], self.cached.row_ids[:stop]), self.states[:stop]
        )


def prompt(question: str) -> str:
    """Return a question as the chat model reads it, up to where its answer begins."""
    return CHAT.format(question=question)


def chat(backbone: Backbone, question: str, answer: str) -> Document:
    """Return a question and its whole answer; both are tokenised apart, as they are when the model answers."""
    question_ids = backbone.encode(prompt(question))
    token_ids = [*question_ids, *backbone.encode(answer), backbone.end_of_turn]
    return Document(token_ids, len(question_ids), len(token_ids))


def fact_chats(backbone: Backbone, facts: Sequence[Fact], wordings: Sequence[str], shift: int) -> list[Document]:
    """Return a chat for each fact, asked for with the wordings in turn, which have a place for the subject."""
    return [
        chat(backbone, wordings[(number + shift) % len(wordings)].format(subject=fact.subject), fact.answer())
        for number, fact in enumerate(facts)
    ]


def begun_chats(backbone: Backbone, terms: Sequence[str], wordings: Sequence[str]) -> list[Document]:
    """Return questions for terms, the wordings in turn, with what every answer begins with and no more."""
    documents = []
    for number, term in enumerate(terms):
        question = backbone.encode(prompt(wordings[number % len(wordings)].format(subject=term)))
        token_ids = [*question, *backbone.encode(Fact(term, "").beginning())]
        documents.append(Document(token_ids, len(question), len(token_ids)))
    return documents


def plain(backbone: Backbone, text: str, *, most: int) -> Document:
    """Return the first ``most`` tokens of a text without any answer."""
    token_ids = backbone.encode(text)[:most]
    return Document(token_ids, len(token_ids), len(token_ids))


@torch.no_grad()
def own_answers(backbone: Backbone, cached: Sequence[CachedDocument]) -> list[OwnAnswer]:
    """Run the blocks above the site over chats, without the site."""
    states: list[Tensor] = [torch.empty(0)] * len(cached)
    for batch in batches_by_length([len(document.hidden) for document in cached], BATCH_TOKENS):
        stream = torch.nn.utils.rnn.pad_sequence([cached[index].hidden for index in batch], batch_first=True)
        for index, row in zip(batch, backbone.upper(stream), strict=True):
            states[index] = row[: len(cached[index].hidden)].clone()
    return [OwnAnswer(document, row) for document, row in zip(cached, states, strict=True)]


def row_ids(keyer: NgramKeyer, token_ids: Sequence[int]) -> Tensor:
    """Return ``[T, C]`` int64 rows that the tokens of a text read."""
    return torch.from_numpy(keyer.row_ids([], np.array(token_ids, dtype=np.int64)))
