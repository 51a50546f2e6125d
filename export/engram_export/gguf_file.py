"""Read models from GGUF files: tensors under their Hugging Face names, dequantised row by row on demand."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

from engram_export.checkpoint import Checkpoint, license_name
from engram_export.gguf_config import architecture, generation_config, hf_config
from engram_export.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from engram_export.gguf_rope import FACTORS_TENSOR
from engram_export.gguf_tokenizer import gguf_tokenizer
from engram_export.source_files import check_row_range, read_exactly
from engram_runtime.errors import CheckpointError

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
BLOCK_LENGTH = 32  # of Q4_0 and Q8_0: a float16 scale, then the codes
CHUNK_BYTES = 1 << 20  # decoded at once: gguf's decoders make several copies of their input

MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_PATTERN = re.compile(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)")
MODEL_PATTERN = re.compile(r"(\w+)\.(weight|bias)")
PERMUTED = {".self_attn.q_proj.": "num_attention_heads", ".self_attn.k_proj.": "num_key_value_heads"}


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file of a supported architecture; only its header is read."""
    header = read_gguf_header(path)
    _refuse_split(header)
    config = hf_config(header)
    tokenizer = gguf_tokenizer(header)
    return Checkpoint(
        config=config,
        tensors=GgufTensors(header, config),
        tokenizer_json=tokenizer.json if tokenizer else None,
        tokenizer_config=tokenizer.config if tokenizer else {},
        generation_config=generation_config(header),
        chat_template=header.get("tokenizer.chat_template", str),
        source=path.name,
        path=path,
        license=license_name(header.metadata.get("general.license")),
    )


def _refuse_split(header: GgufHeader) -> None:
    parts = header.get("split.count", int) or 1
    if parts > 1:
        raise CheckpointError(f"{header.path} is one of {parts} parts; join them with llama-gguf-split --merge")


def hf_name(gguf_name: str) -> str | None:
    """Translate a tensor's name, or return None for a tensor the supported architectures do not have."""
    if (match := LAYER_PATTERN.fullmatch(gguf_name)) and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"
    if (match := MODEL_PATTERN.fullmatch(gguf_name)) and match[1] in MODEL_NAMES:
        return f"{MODEL_NAMES[match[1]]}.{match[2]}"
    return None


def _translate(header: GgufHeader) -> dict[str, GgufTensor]:
    tensors = {}
    for tensor in header.tensors.values():
        if tensor.name == FACTORS_TENSOR:  # part of the config
            continue
        name = hf_name(tensor.name)
        if name is None:
            raise CheckpointError(
                f"{header.path} holds tensor {tensor.name!r}, which {architecture(header)} models do not have; "
                f"export from safetensors"
            )
        _check_type(header.path, tensor)
        tensors[name] = tensor
    return tensors


def _check_type(path: Path, tensor: GgufTensor) -> None:
    kind = tensor.type.name
    if kind not in SUPPORTED_TYPES:
        raise CheckpointError(
            f"tensor {tensor.name!r} of {path} has type {kind}, supported are {', '.join(SUPPORTED_TYPES)}; "
            f"convert it to one of these"
        )
    if GGML_QUANT_SIZES[tensor.type][0] > 1 and len(tensor.shape) != 2:
        raise CheckpointError(
            f"tensor {tensor.name!r} of {path} has type {kind} and {len(tensor.shape)} axes, wanted 2; convert it again"
        )


def _chunks(start: int, stop: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // row_bytes)
    return ((first, min(first + step, stop)) for first in range(start, stop, step))


def _decode_q4_0(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # the low nibbles are a block's first 16 values, the high nibbles its last 16
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _decode_q8_0(stored: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return stored ^ np.uint8(0x80)  # int8 + 128, on the bit pattern


BLOCK_DECODERS: dict[str, tuple[Callable[[NDArray[np.uint8]], NDArray[np.uint8]], int]] = {
    "Q4_0": (_decode_q4_0, 4),
    "Q8_0": (_decode_q8_0, 8),
}


def _interleaved(rows: NDArray[np.int64], head_rows: int) -> NDArray[np.int64]:
    """Map rows whose heads hold two halves to where they lie when the halves alternate."""
    in_head, half = rows % head_rows, head_rows // 2
    stored: NDArray[np.int64] = rows - in_head + in_head % half * 2 + in_head // half
    return stored


class GgufTensors:
    """The tensors of a GGUF file under their Hugging Face names and in Hugging Face's row order."""

    def __init__(self, header: GgufHeader, config: dict[str, Any]) -> None:
        self._path = header.path
        self._tensors = _translate(header)
        # llama.cpp interleaves the halves of each q and k head of a llama; other architectures are stored as they were
        self._heads = {part: config[key] for part, key in PERMUTED.items()} if architecture(header) == "llama" else {}

    def names(self) -> list[str]:
        """List the tensors in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._tensor(name).shape

    def tensor_type(self, name: str) -> str:
        """Return how a tensor is stored, such as ``Q4_0`` or ``F32``."""
        return str(self._tensor(name).type.name)

    def read(self, name: str) -> NDArray[np.float32]:
        """Read and decode a whole tensor as a fresh float32 array."""
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read ``[stop - start, ...]`` rows of the first axis, fresh; only their blocks are decoded."""
        tensor = self._tensor(name)
        check_row_range(name, tensor.shape, start, stop)
        values = np.empty((stop - start, *tensor.shape[1:]), dtype=np.float32)
        for first, last in _chunks(start, stop, tensor.row_bytes):
            decoded = dequantize(self._stored_rows(name, first, last), tensor.type)
            values[first - start : last - start] = decoded.reshape(last - first, *tensor.shape[1:])
        return values

    def read_blocks(self, name: str, start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], int]:
        """Read the integers and scales of n rows of a Q4_0 or Q8_0 matrix ``[N, K]``, as stored.

        Returns:
            codes: ``[n, K]``, fresh; the value is ``(code - 8) * scale`` for Q4_0, ``(code - 128) * scale`` for Q8_0.
            scales: ``[n, K / 32]``, one per block of 32 neighbours in a row.
            bits: 4 or 8.
        """
        tensor = self._tensor(name)
        if tensor.type.name not in BLOCK_DECODERS:
            raise CheckpointError(
                f"tensor {name!r} of {self._path} has type {tensor.type.name}, "
                f"wanted {' or '.join(BLOCK_DECODERS)} to read its blocks; read its values instead"
            )
        check_row_range(name, tensor.shape, start, stop)
        rows, columns = stop - start, tensor.shape[1]
        decode, bits = BLOCK_DECODERS[tensor.type.name]
        blocks = self._stored_rows(name, start, stop).reshape(rows, columns // BLOCK_LENGTH, -1)
        scales = blocks[:, :, :2].copy().view("<f2")[:, :, 0].astype(np.float32)
        return decode(blocks[:, :, 2:]).reshape(rows, columns), scales, bits

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise CheckpointError(
                f"{self._path} holds no tensor {name!r}; the checkpoint lacks a weight the model needs"
            )
        return self._tensors[name]

    def _stored_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Read ``[stop - start, row_bytes]`` undecoded rows, in Hugging Face's order."""
        tensor = self._tensor(name)
        order = self._row_order(name, start, stop)
        first, last = (int(order.min()), int(order.max()) + 1) if len(order) else (start, start)
        data = read_exactly(self._path, tensor.offset + first * tensor.row_bytes, (last - first) * tensor.row_bytes)
        return data.reshape(last - first, tensor.row_bytes)[order - first]

    def _row_order(self, name: str, start: int, stop: int) -> NDArray[np.int64]:
        """Return the stored row of each of the rows ``start`` to ``stop``."""
        rows = np.arange(start, stop)
        for part, num_heads in self._heads.items():
            if part in name:
                return _interleaved(rows, self._head_rows(name, num_heads))
        return rows

    def _head_rows(self, name: str, num_heads: int) -> int:
        rows = self.shape(name)[0]
        if num_heads < 1 or rows % (2 * num_heads):
            raise CheckpointError(
                f"tensor {name!r} of {self._path} has {rows} rows, "
                f"wanted a multiple of {2 * num_heads}, two per head; convert the file again"
            )
        return rows // num_heads
