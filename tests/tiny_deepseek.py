"""Tiny random checkpoints of DeepSeek-V4.1's Engram memory, and its equations in float64."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from tests.tiny import VOCAB, save_tokenizer
from torch import Tensor

from engram_export.token_compression import compress_vocabulary
from engram_runtime.hashing import derive_primes

LAYERS, HIDDEN, STREAMS, EPS = (1, 3), 64, 4, 1e-20
ORDERS, HEADS, ROW_DIM, ROWS_PER_HEAD, BLOCK = 3, 2, 64, 113, 32
PAD_ID, IMAGE_ID = 2, 7

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TinyDeepseek:
    """A checkpoint that was saved: its folder, and its tensors without their prefix."""

    folder: Path
    tensors: dict[str, Tensor]

    def floats(self, layer: int, name: str) -> Floats:
        """Return a tensor of a layer as torch reads it, scales applied."""
        stored = self.tensors[f"layers.{layer}.engram.{name}"]
        values = stored.double()
        if stored.dtype == torch.float8_e4m3fn:
            scales = self.tensors[f"layers.{layer}.engram.{name.removesuffix('.weight')}.scale"].double()
            for axis, size in enumerate(values.shape):
                scales = scales.repeat_interleave(size // scales.shape[axis], dim=axis)
            values = values * scales
        result: Floats = values.numpy()
        return result


def save_deepseek(folder: Path, *, nested: bool = True, prefix: str = "") -> TinyDeepseek:
    """Save a random memory and a tokenizer; ``nested`` as transformers writes the config, else as DeepSeek does."""
    folder.mkdir()
    save_tokenizer(folder)
    primes = derive_primes(layers=len(LAYERS), rows_per_head=[ROWS_PER_HEAD] * ORDERS, num_heads=HEADS)
    num_rows = [int(moduli.sum()) for moduli in primes]
    tensors: dict[str, Tensor] = {}
    for layer, rows in zip(LAYERS, num_rows, strict=True):
        tensors |= {f"layers.{layer}.engram.{name}": values for name, values in _tensors(layer, rows).items()}
    others = {"layers.0.attn.wq.weight": torch.ones(2, 2), "embed.weight": torch.ones(3, 2).bfloat16()}
    stored = {f"{prefix}{name}": values for name, values in {**tensors, **others}.items()}
    safetensors.torch.save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_config(folder, num_rows, nested=nested)))
    return TinyDeepseek(folder, tensors)


def site_statement(checkpoint: TinyDeepseek, layer: int, hidden: Floats, rows: Floats) -> Floats:
    """Return the streams ``[T, G, D]`` after a site, one token and one stream at a time."""
    wkv = checkpoint.floats(layer, "wkv.weight")
    query, key = checkpoint.floats(layer, "q_weight"), checkpoint.floats(layer, "k_weight")
    updated = hidden.copy()
    for token, streams in enumerate(hidden):
        projected = wkv @ rows[token].ravel()
        value = projected[STREAMS * HIDDEN :]
        for stream, h in enumerate(streams):
            k = projected[stream * HIDDEN : (stream + 1) * HIDDEN]
            inverse = 1 / np.sqrt((h**2).mean() + EPS) / np.sqrt((k**2).mean() + EPS)
            dot = (h * query[stream] * k * key[stream]).sum() * inverse / np.sqrt(HIDDEN)
            gate = 1 / (1 + np.exp(-np.copysign(np.sqrt(max(abs(dot), 1e-6)), dot)))
            updated[token, stream] += gate * value
    return updated


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors by the end of their names, dots as double underscores; None removes one."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for end, values in changes.items():
        (name,) = [name for name in tensors if name.endswith(end.replace("__", "."))] or [end.replace("__", ".")]
        if values is None:
            del tensors[name]
        else:
            tensors[name] = values
    safetensors.torch.save_file(tensors, path)


def _tensors(layer: int, num_rows: int) -> dict[str, Tensor]:
    """Draw a site whose scores are of either sign and whose values are about as large as the streams."""
    rng = torch.Generator().manual_seed(layer)
    width = ORDERS * HEADS * ROW_DIM
    outputs = (STREAMS + 1) * HIDDEN
    weight, rows = torch.randn(outputs, width, generator=rng), torch.randn(num_rows, ROW_DIM, generator=rng)
    return {
        "embed.weight": rows.to(torch.float8_e4m3fn),
        "embed.scale": _exponents((num_rows, ROW_DIM // BLOCK), rng, 126, 129),
        "wkv.weight": weight.to(torch.float8_e4m3fn),
        "wkv.scale": _exponents((outputs // BLOCK, width // BLOCK), rng, 122, 124),
        "q_weight": (1 + torch.randn(STREAMS, HIDDEN, generator=rng) / 5).bfloat16(),
        "k_weight": (1 + torch.randn(STREAMS, HIDDEN, generator=rng) / 5).bfloat16(),
    }


def _exponents(shape: tuple[int, ...], rng: torch.Generator, low: int, high: int) -> Tensor:
    return torch.randint(low, high, shape, generator=rng, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def _config(folder: Path, num_rows: list[int], *, nested: bool) -> dict[str, Any]:
    compressed = int(compress_vocabulary((folder / "tokenizer.json").read_bytes()).max()) + 1
    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 4,
        "hc_mult": STREAMS,
        "rms_norm_eps": EPS,
        "max_position_embeddings": 128,
        "engram_layer_ids": list(LAYERS),
        "engram_num_embeddings": num_rows,
        "engram_max_ngram_size": ORDERS + 1,
        "engram_vocab_size": ROWS_PER_HEAD,
        "engram_n_heads": HEADS,
        "engram_head_dim": ROW_DIM,
        "engram_compressed_vocab_size": compressed,
        "engram_pad_token_id" if nested else "engram_pad_id": PAD_ID,
    }
    shared = {
        "model_type": "deepseek_v41",
        "image_token_id": IMAGE_ID,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "scale_fmt": "ue8m0"},
    }
    return {**shared, "text_config": text} if nested else {**shared, **text}
