"""The draft head as files: float weights to go on with, int8 weights to ship."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from engram_runtime.errors import RequestError
from engram_runtime.new_file import new_file
from examples.retrofit.mtp_head import DraftHead
from examples.retrofit.whole_files import write_text

PREFIX = "mtp."
DRAFT_VOCAB = f"{PREFIX}draft_vocab"
SCALE = "_scale"


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 rows and their float16 scales [rows]: symmetric, the largest value of a row is 127."""
    scales = (weight.float().abs().amax(dim=1) / 127).clamp_min(2.0**-14).half()
    return (weight.float() / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def int8_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn float weights into the shipped form: matrices int8 with ``NAME_scale`` beside them, norms float16."""
    shipped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            shipped[name], shipped[name + SCALE] = quantise_rows(tensor)
        else:
            shipped[name] = tensor.half() if tensor.is_floating_point() else tensor.to(torch.int32)
    return shipped


def float_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `int8_tensors` but for the rounding; float files pass as they are."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        scale = tensors.get(name + SCALE)
        found[name] = tensor if scale is None else tensor.float() * scale.float()[:, None]
    return found


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is at its place once it is whole."""
    with new_file(path, replace=True) as file:
        file.write(save(tensors))


def save_head(head: DraftHead, path: Path) -> None:
    """Write the float weights."""
    save_whole({PREFIX + name: value.contiguous() for name, value in head.state_dict().items()}, path)


def ship_head(folder: Path, model: Any, draft_vocab: Tensor) -> None:
    """Write what is shipped of a folder's ``head.safetensors``: ``mtp.safetensors`` and ``mtp-config.json``.

    draft_vocab: int64 [n], ascending ids that the shipped head chooses from. Its weights don't depend on them.

    Raises:
        RequestError: the head was not trained to choose from all of them.
    """
    source = folder / "head.safetensors"
    tensors = load_file(source)
    unknown = draft_vocab[~torch.isin(draft_vocab, tensors[DRAFT_VOCAB].long())]
    if len(unknown):
        raise RequestError(
            f"{source} was not trained to draft token {int(unknown[0])}, one of {len(unknown)}; "
            "train it on this generated text"
        )
    save_whole(int8_tensors({**tensors, DRAFT_VOCAB: draft_vocab}), folder / "mtp.safetensors")
    write_text(folder / "mtp-config.json", json.dumps(config_block(model, len(draft_vocab)), indent=1))


def load_head(model: Any, path: Path) -> DraftHead:
    """Read a head of this model from either form; float32."""
    tensors = float_tensors(load_file(path))
    head = DraftHead(model, tensors[DRAFT_VOCAB])
    head.load_state_dict({name.removeprefix(PREFIX): value for name, value in tensors.items()})
    return head.eval()


def config_block(model: Any, draft_vocab_size: int) -> dict[str, Any]:
    """Return the ``mtp`` block of the artefact's config.json."""
    return {
        "num_layers": 1,
        "hidden": "after the final norm",
        "fc_input": ["norm(embedding of token t+1)", "norm(hidden t)"],
        "rms_norm_eps": model.config.rms_norm_eps,
        "draft_vocab_size": draft_vocab_size,
        "lm_head": "tied, restricted to mtp.draft_vocab",
        "rope_positions": "position of the hidden state (t), then t+1 for the chained step",
    }
