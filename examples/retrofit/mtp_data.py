"""What a draft head is trained on: text that the model wrote, its states, and what it thought of every next token."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.retrofit.mtp_head import MAX_STEPS

LABELS = 16  # of the most likely tokens of the draft vocabulary; the rest of the mass is dropped
ROWS = 256  # of logits at a time


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its continuation.

    tokens: int64 [n]. hidden: [n - 1, hidden_size], after the final norm. start: length of the prompt.
    """

    tokens: Tensor
    hidden: Tensor
    start: int
    domain: str

    @property
    def generated(self) -> int:
        """How many tokens the model wrote."""
        return len(self.tokens) - self.start


@dataclass(frozen=True, slots=True)
class Labels:
    """The model's distribution over the draft vocabulary after every token of an example but the last.

    rows: int16 [n - 1, LABELS], places in the draft vocabulary. weights: float16, their probabilities, summing to 1.
    """

    rows: Tensor
    weights: Tensor


def read_examples(folder: Path) -> list[Example]:
    """Read every shard that `generate` has finished."""
    examples: list[Example] = []
    for path in sorted(folder.glob("shard-*.safetensors")):
        hidden, start = load_file(path)["hidden"], 0
        for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            tokens = torch.tensor(entry["prompt_ids"] + entry["generated_ids"])
            end = start + len(tokens) - 1
            examples.append(Example(tokens, hidden[start:end], len(entry["prompt_ids"]), entry["domain"]))
            start = end
    return examples


def draft_vocabulary(examples: Sequence[Example], always: Sequence[int], vocabulary: int, size: int) -> Tensor:
    """Choose the `size` most frequent ids of the text, ascending; `always` (special tokens, bytes) are among them."""
    counts = torch.zeros(vocabulary, dtype=torch.long)
    for example in examples:
        counts += torch.bincount(example.tokens, minlength=vocabulary)
    counts[list(always)] = counts.max() + 1
    order = torch.argsort(counts, descending=True, stable=True)
    return order[:size].sort().values


@torch.inference_mode()
def soft_labels(hidden: Tensor, rows: Tensor, temperature: float) -> Labels:
    """Return what the model says at states [n, hidden_size]; rows: of its output layer [draft_vocab, hidden_size]."""
    indices, weights = [], []
    for chunk in torch.split(hidden, ROWS):
        top = (chunk.to(rows.dtype) @ rows.T).float().topk(LABELS)
        indices.append(top.indices)
        weights.append(torch.softmax(top.values / temperature, dim=-1))
    return Labels(torch.cat(indices).to(torch.int16), torch.cat(weights).half())


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded to one length.

    tokens [batch, length + MAX_STEPS], hidden [batch, length - 1, hidden_size], rows and weights as `Labels`
    [batch, length - 1 + MAX_STEPS, LABELS], counted [MAX_STEPS, batch, roots]: whether the draft of a step from a root
    is of a token that the model wrote and that the draft vocabulary holds; roots = length - 2.
    """

    tokens: Tensor
    hidden: Tensor
    rows: Tensor
    weights: Tensor
    counted: Tensor


def pad(examples: Sequence[tuple[Example, Labels]], in_draft: Tensor) -> Batch:
    """Pad examples on the right; in_draft [vocabulary]: whether the draft vocabulary holds a token."""
    count, length = len(examples), max(len(example.tokens) for example, _ in examples)
    width = examples[0][0].hidden.shape[1]
    tokens = torch.zeros(count, length + MAX_STEPS, dtype=torch.long)
    hidden = torch.zeros(count, length - 1, width, dtype=torch.bfloat16)
    rows = torch.zeros(count, length - 1 + MAX_STEPS, LABELS, dtype=torch.long)
    weights = torch.zeros(rows.shape)
    counted = torch.zeros(MAX_STEPS, count, length - 2, dtype=torch.bool)
    for i, (example, labels) in enumerate(examples):
        n = len(example.tokens)
        tokens[i, :n], hidden[i, : n - 1] = example.tokens, example.hidden
        rows[i, : n - 1], weights[i, : n - 1] = labels.rows.long(), labels.weights
        held = in_draft[example.tokens]
        for step in range(MAX_STEPS):
            counted[step, i, example.start - 1 : n - 2 - step] = held[example.start + 1 + step :]
    return Batch(tokens, hidden, rows, weights, counted)


def batches(
    examples: Sequence[tuple[Example, Labels]], size: int, draw: random.Random
) -> list[list[tuple[Example, Labels]]]:
    """Shuffle examples into batches of similar lengths."""
    order = list(examples)
    draw.shuffle(order)
    groups = [
        sorted(order[i : i + 16 * size], key=lambda item: len(item[0].tokens)) for i in range(0, len(order), 16 * size)
    ]
    found = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    draw.shuffle(found)
    return found
