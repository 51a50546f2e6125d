"""Token sequences the site is trained on, and the residual stream the frozen model has for each of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engram_runtime.keyers import NgramKeyer
from examples.retrofit.backbone import Backbone
from examples.retrofit.facts import Fact

Report = Callable[[int], None]  # told how many documents have been done since the last call


@dataclass(frozen=True, slots=True)
class Document:
    """Ids of a text; those from ``answer_start`` on are an answer to what stands before."""

    token_ids: list[int]
    answer_start: int


@dataclass(frozen=True, slots=True, eq=False)
class CachedDocument:
    """A document, the stream ``hidden [T, D]`` that enters the site's block, and the site's ``row_ids [T, C]``."""

    document: Document
    hidden: Tensor
    row_ids: Tensor


def prompt(question: str) -> str:
    """Return a question as the chat model reads it, up to where its answer begins."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def chat(backbone: Backbone, question: str, answer: str) -> Document:
    """Return a question and its whole answer; both are tokenised apart, as they are when the model answers."""
    question_ids = backbone.encode(prompt(question))
    return Document([*question_ids, *backbone.encode(answer), backbone.end_of_turn], len(question_ids))


def fact_chats(backbone: Backbone, facts: Iterable[Fact], question: str) -> list[Document]:
    """Return one chat for each fact, asked for with ``question``, which has a place for the subject."""
    return [chat(backbone, question.format(subject=fact.subject), fact.answer()) for fact in facts]


def plain(backbone: Backbone, text: str, *, most: int) -> Document:
    """Return the first ``most`` tokens of a text without any answer."""
    token_ids = backbone.encode(text)[:most]
    return Document(token_ids, len(token_ids))


def with_hidden(
    backbone: Backbone, keyer: NgramKeyer, documents: Sequence[Document], report: Report = lambda _: None
) -> list[CachedDocument]:
    """Run the blocks below the site over documents; the stream is kept in bfloat16."""
    cached: list[CachedDocument | None] = [None] * len(documents)
    for index, hidden in backbone.hidden_at_site([document.token_ids for document in documents]):
        cached[index] = CachedDocument(
            documents[index], hidden.to(torch.bfloat16), row_ids(keyer, documents[index].token_ids)
        )
        report(1)
    return [document for document in cached if document is not None]


def row_ids(keyer: NgramKeyer, token_ids: Sequence[int]) -> Tensor:
    """Return ``[T, C]`` int64 rows that the tokens of a text read."""
    return torch.from_numpy(keyer.row_ids([], np.array(token_ids, dtype=np.int64)))
