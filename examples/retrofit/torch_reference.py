"""The model with the site as plain torch in float32: what a bundle's executors are held against."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from engram_runtime.keyers import Keyer
from examples.retrofit.backbone import Backbone, batches_by_length, pad
from examples.retrofit.recall import Question, Share

BATCH_TOKENS = 2048


def read_config(asset: Path) -> dict[str, Any]:
    """Return the facts about the site."""
    config: dict[str, Any] = json.loads((asset / "config.json").read_text(encoding="utf-8"))["engram"]
    return config


def site_block(asset: Path) -> int:
    """Return the block, from 0, before which the one site stands."""
    (block,) = read_config(asset)["layer_ids"]
    return int(block)


class TorchSite:
    """Equations of `engram_export.engram_site` without convolution, on weights as the asset holds them."""

    def __init__(self, asset: Path, keyer: Keyer, rows: NDArray[np.float32]) -> None:
        """Read the projections; ``rows [N, d]`` are the table's."""
        self._config = read_config(asset)
        tensors = load_file(asset / "engram.safetensors")
        self._key, self._value, self._gain = (
            tensors[f"engram.{name}.weight"].float() for name in ("key_proj", "value_proj", "query_norm")
        )
        self._bias = tensors["engram.gate_bias"]
        self._keyer, self._rows = keyer, torch.from_numpy(rows)

    def update(self, hidden: Tensor, documents: Sequence[Sequence[int]]) -> Tensor:
        """Return what is added to ``hidden [B, T, D]``; documents shorter than T get zeros after their end."""
        row_ids = [torch.from_numpy(self._keyer.row_ids([], np.asarray(document))) for document in documents]
        embeddings = [self._rows[ids].flatten(1) for ids in row_ids]
        embedding = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)  # [B, T, C * d]
        gate = self._config["gate"]
        query = functional.rms_norm(hidden, self._gain.shape, self._gain, gate["query_norm_eps"])
        key = functional.rms_norm(embedding @ self._key.T, self._gain.shape, None, gate["key_norm_eps"])
        score = (query * key).sum(-1, keepdim=True) / hidden.shape[-1] ** 0.5
        root = score.sign() * score.abs().clamp_min(gate["signed_root_floor"]).sqrt()
        opened = torch.sigmoid(root + self._bias)
        update: Tensor = self._config["output_scale"] * opened * (embedding @ self._value.T)
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
