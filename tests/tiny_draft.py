"""A tiny random draft head in the files a real one comes in, and what transformers makes of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from tests.tiny import HIDDEN, NORM_EPS, VOCAB
from transformers import AutoModelForCausalLM

DRAFT_VOCAB = 96
BLOCK: dict[str, Any] = {
    "num_layers": 1,
    "hidden": "after the final norm",
    "fc_input": ["norm(embedding of token t+1)", "norm(hidden t)"],
    "rms_norm_eps": NORM_EPS,
    "draft_vocab_size": DRAFT_VOCAB,
    "lm_head": "tied, restricted to mtp.draft_vocab",
    "rope_positions": "position of the hidden state (t), then t+1 for the chained step",
}
LAYER = "model.layers.0."


def save_draft_folder(folder: Path, checkpoint: Path, *, int8: bool) -> Path:
    """Save a head for a checkpoint, for ``--engram``; linear layers in float16, or int8 with a scale of each row."""
    folder.mkdir()
    tensors = draft_tensors(checkpoint)
    if int8:
        tensors = {part: values for name, weight in tensors.items() for part, values in _int8(name, weight).items()}
    safetensors.torch.save_file(tensors, folder / "mtp.safetensors")
    (folder / "config.json").write_text(json.dumps({"mtp": BLOCK}))
    return folder


def draft_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Draw a head in float16: a layer of the shapes of the checkpoint's first one."""
    rng = torch.Generator().manual_seed(47)
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    shapes = {name.replace("model.", "mtp."): values.shape for name, values in weights.items() if LAYER in name}
    shapes |= {
        f"mtp.{name}.weight": torch.Size([HIDDEN]) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    shapes["mtp.fc.weight"] = torch.Size([HIDDEN, 2 * HIDDEN])
    tensors = {}
    for name, shape in sorted(shapes.items()):
        values = torch.randn(shape, generator=rng)
        tensors[name] = (1 + values / 5 if len(shape) == 1 else values / shape[-1] ** 0.5).half()
    tensors["mtp.draft_vocab"] = torch.randperm(VOCAB, generator=rng)[:DRAFT_VOCAB].to(torch.int32)
    return tensors


def _int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    if weight.ndim == 1:
        return {name: weight}
    scale = (weight.float().abs().amax(dim=1) / 127).half()
    codes = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return {name: codes.to(torch.int8), f"{name}_scale": scale}


def reference_hidden(checkpoint: Path, token_ids: Sequence[int]) -> NDArray[np.float64]:
    """Return transformers' hidden states ``[T, D]`` after the final norm."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    with torch.no_grad():
        hidden: NDArray[np.float64] = model.model(torch.tensor([list(token_ids)])).last_hidden_state[0].numpy()
    return hidden


def reference_drafts(
    checkpoint: Path, folder: Path, token_ids: Sequence[int], hidden: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return logits ``[T, n]`` and hidden states ``[T, D]`` of the head, its layer being transformers' own.

    Args:
        token_ids: ``[T]``, the token after each position with ``hidden [T, D]``.
    """
    tensors = _dequantised(safetensors.torch.load_file(folder / "mtp.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layer = model.model.layers[0]
    prefix = "mtp.layers.0."
    layer.load_state_dict({name.removeprefix(prefix): part for name, part in tensors.items() if prefix in name})
    model.model.layers = torch.nn.ModuleList([layer])
    model.model.norm.load_state_dict({"weight": tensors["mtp.norm.weight"]})
    parts = [
        _normed(embedding[list(token_ids)], tensors["mtp.pre_fc_norm_embedding.weight"]),
        _normed(torch.from_numpy(hidden.astype(np.float64)), tensors["mtp.pre_fc_norm_hidden.weight"]),
    ]
    with torch.no_grad():
        x = torch.cat(parts, dim=-1) @ tensors["mtp.fc.weight"].T
        following = model.model(inputs_embeds=x[None]).last_hidden_state[0]
        logits = following @ head[tensors["mtp.draft_vocab"].long()].T
    return logits.numpy(), following.numpy()


def _dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wide = {name: values.to(torch.float64) for name, values in tensors.items() if not name.endswith("_scale")}
    for name in wide:
        if f"{name}_scale" in tensors:
            wide[name] *= tensors[f"{name}_scale"].to(torch.float64)[:, None]
    return wide


def _normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + NORM_EPS) * gain
