"""The model with the site as plain torch in float32: what a bundle's executors are held against."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_runtime.keyers import Keyer
from examples.retrofit.artefacts import read_config, read_site
from examples.retrofit.backbone import Backbone, batches_by_length, pad
from examples.retrofit.recall import Question, Share

BATCH_TOKENS = 2048


def site_block(asset: Path) -> int:
    """Return the block, from 0, before which the one site stands."""
    (block,) = read_config(asset)["engram"]["layer_ids"]
    return int(block)


class TorchSite:
    """The site as it was trained, on weights as the asset holds them."""

    def __init__(self, asset: Path, keyer: Keyer, rows: NDArray[np.float32]) -> None:
        """Read the projections; ``rows [N, d]`` are the table's."""
        _, self._site, _ = read_site(asset)
        self._keyer, self._rows = keyer, torch.from_numpy(rows)

    def update(self, hidden: Tensor, documents: Sequence[Sequence[int]]) -> Tensor:
        """Return what is added to ``hidden [B, T, D]``; documents shorter than T get zeros after their end."""
        row_ids = [torch.from_numpy(self._keyer.row_ids([], np.asarray(document))) for document in documents]
        embeddings = [self._rows[ids].flatten(1) for ids in row_ids]
        embedding = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)  # [B, T, C * d]
        update: Tensor = self._site(hidden, embedding)
        return update


@torch.no_grad()
def recall_in_torch(backbone: Backbone, site: TorchSite, questions: Sequence[Question]) -> Share:
    """Count the questions whose whole answer is what greedy decoding writes.

    The answer is given and each of its tokens compared with the likeliest one: decoding writes exactly this answer if,
    and only if, they are all the same.
    """
    documents = [question.prompt_ids + question.answer_ids[:-1] for question in questions]
    known = 0
    for batch in batches_by_length([len(document) for document in documents], BATCH_TOKENS):
        given = [documents[index] for index in batch]
        hidden = backbone.lower(pad(given))
        states = backbone.upper(hidden + site.update(hidden, given))
        for index, state in zip(batch, states, strict=True):
            expected = torch.tensor(questions[index].answer_ids)
            before = len(documents[index]) - len(expected)
            likeliest = (state[before : len(documents[index])] @ backbone.output_weight.T).argmax(dim=-1)
            known += bool((likeliest == expected).all())
    return Share(known, len(questions))
