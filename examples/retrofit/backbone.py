"""The language model whose weights stay as they are, in two parts: the blocks below the Engram site and those above."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_runtime.errors import RequestError
from examples.retrofit.facts import END_OF_TURN

BATCH_TOKENS = 4096  # tokens, padding included, whose lower blocks are computed at once


@dataclass(frozen=True, slots=True, eq=False)
class Backbone:
    """A causal language model of transformers' llama layout and the block before which the site stands.

    Attributes:
        model: any class with ``model.layers``, ``model.rotary_emb`` and ``model.norm``, such as llama and qwen3.
        tokenizer: of transformers.
        block: 0-based; the site adds to the residual stream that enters it.
    """

    model: Any
    tokenizer: Any
    block: int

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, D."""
        return int(self.model.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the output layer, V."""
        return int(self.model.config.vocab_size)

    @property
    def output_weight(self) -> Tensor:
        """The output layer, ``[V, D]``."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def end_of_turn(self) -> int:
        """The id that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, markers of turns included, without adding any."""
        token_ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def lower(self, token_ids: Tensor) -> Tensor:
        """Return the residual stream ``[B, T, D]`` that enters the block of the site, of ids ``[B, T]``.

        Padding must be at the end: attention is causal and nothing is masked.
        """
        return self._blocks(self.model.model.embed_tokens(token_ids), 0, self.block)

    def upper(self, hidden: Tensor) -> Tensor:
        """Return what the output layer is multiplied with, ``[B, T, D]``, of the stream ``[B, T, D]`` at the site."""
        hidden = self._blocks(hidden, self.block, len(self.model.model.layers))
        normed: Tensor = self.model.model.norm(hidden)
        return normed

    def _blocks(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        length = hidden.shape[1]
        positions = torch.arange(length)[None]
        rotation = self.model.model.rotary_emb(hidden, positions)
        future = torch.full((1, 1, length, length), float("-inf"), dtype=hidden.dtype).triu(1)
        for layer in self.model.model.layers[start:stop]:
            hidden = layer(hidden, attention_mask=future, position_embeddings=rotation, position_ids=positions)
        return hidden

    @torch.no_grad()
    def hidden_at_site(self, documents: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """Yield each document's index and its stream at the site, ``[T, D]`` in the model's dtype, short ones first."""
        for batch in batches_by_length([len(document) for document in documents], BATCH_TOKENS):
            hidden = self.lower(pad([documents[index] for index in batch]))
            for index, row in zip(batch, hidden, strict=True):
                yield index, row[: len(documents[index])].clone()


def load_backbone(checkpoint: Path, *, block: int, dtype: torch.dtype = torch.float32) -> Backbone:
    """Load a folder of transformers or a GGUF file, whose weights are dequantised; nothing is downloaded.

    Args:
        block: see `Backbone`; 0 where no site is meant.

    Raises:
        RequestError: the model has no such block, or is not chatted with in ChatML.
    """
    folder, file = (checkpoint, {}) if checkpoint.is_dir() else (checkpoint.parent, {"gguf_file": checkpoint.name})
    # eager: torch's fused attention takes half the time of a training step for sequences as short as these
    options = {"dtype": dtype, "attn_implementation": "eager", "local_files_only": True, **file}
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **file)
    _require_chatml(tokenizer, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    model.requires_grad_(False)
    _require_block(block, len(model.model.layers), checkpoint)
    return Backbone(model, tokenizer, block)


def _require_chatml(tokenizer: Any, checkpoint: Path) -> None:
    if tokenizer.eos_token != END_OF_TURN:
        raise RequestError(
            f"the tokenizer of {checkpoint} ends a turn with {tokenizer.eos_token!r}, expected {END_OF_TURN!r}; "
            "choose a model that is chatted with in ChatML"
        )


def _require_block(block: int, blocks: int, checkpoint: Path) -> None:
    if not 0 <= block < blocks:
        raise RequestError(
            f"{checkpoint} has {blocks} blocks, so a site can't stand before block {block}; choose 1 to {blocks - 1}"
        )


def pad(documents: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Return ids ``[B, T]`` int64, the shorter documents filled up at their end."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(document) for document in documents], batch_first=True, padding_value=value
    )


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Yield indices in batches of similar lengths, shortest first, each with at most ``budget`` tokens when padded.

    A document longer than the budget is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
