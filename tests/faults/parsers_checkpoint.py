"""A3: damaged files of a checkpoint in Hugging Face's layout: safetensors, their index, and the configs beside them."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tests.faults.parsers_mutators import NUMBERS, blind, damage_document, damage_json
from tests.faults.parsers_survey import Parser, evenly, survey
from tests.faults.row import Outcome, Row

from engram_export.checkpoint import open_checkpoint, open_listed
from engram_export.engram_config import EngramConfig
from engram_export.outlines.checkpoint import outline_checkpoint
from engram_export.safetensors_file import SafetensorsFile
from engram_export.source_files import parse_json_object, read_small_file
from engram_runtime.errors import CheckpointError
from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes

HIDDEN, INNER, TOKENS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 40, 4, 2, 16
MAX_CONFIG_BYTES = 64 << 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": TOKENS,
    "eos_token_id": 2,
}
SIDE_FILES: Mapping[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
    },
    "generation_config.json": {"eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.7, "top_p": 0.9},
}
PRIMES = derive_primes(layers=1, rows_per_head=(60, 90), num_heads=2)[0]
ENGRAM = {
    "layer_ids": [1],
    "layer_index_base": 0,
    "ngram_orders": [2, 3],
    "num_hash_heads": 2,
    "row_dim": 16,
    "num_rows": int(PRIMES.sum()),
    "hash": {
        "kind": "xor_prime",
        "multipliers": derive_multipliers(vocab_size=TOKENS, max_order=3, layer_id=1).tolist(),
        "primes": PRIMES.tolist(),
        "offsets": column_offsets(PRIMES).tolist(),
        "seed": 0,
        "pad_id": 2,
        "compressed_vocab_size": TOKENS,
        "token_map": "engram.token_map",
        "barrier_ids": [1, 3],
    },
    "gate": {"query_norm_eps": 1e-5, "key_norm_eps": 1e-6, "signed_root_floor": 1e-6, "bias": "engram.gate_bias"},
    "conv": {"kernel": 4, "dilation": 3, "norm_eps": 1e-5},
    "output_scale": 1.5,
}


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (TOKENS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    inner = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    rows = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}.weight": (HEAD_DIM * count, HIDDEN) for name, count in rows.items()}
        shapes[f"{prefix}self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {f"{prefix}mlp.{name}.weight": shape for name, shape in inner.items()}
        shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return shapes


def safetensors_header() -> dict[str, Any]:
    """Return the header of the model's weights, some of which are of other types than float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for index, (name, shape) in enumerate(tensor_shapes().items()):
        dtype, width = (("F32", 4), ("BF16", 2), ("F16", 2))[index % 3]
        size = int(np.prod(shape)) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header


def with_length(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file, whose length of the header may be told wrong."""
    return ((len(header) if length is None else length) % 2**64).to_bytes(8, "little") + header + data


HEADER = json.dumps(safetensors_header()).encode()
DATA = bytes(max(entry["data_offsets"][1] for name, entry in safetensors_header().items() if name[0] != "_"))
WEIGHTS = with_length(HEADER, DATA)
INDEX = {"metadata": {"total_size": len(DATA)}, "weight_map": dict.fromkeys(tensor_shapes(), "a.safetensors")}


def damaged_safetensors(rng: random.Random, header: bytes, data: bytes) -> bytes:
    """Return a safetensors file with a damaged header, a wrong length of it, or damaged bytes."""
    kind = rng.random()
    if kind < 0.6:
        return with_length(damage_json(rng, header), data)
    if kind < 0.7:
        return with_length(header, data, rng.choice(NUMBERS))
    if kind < 0.8:
        return with_length(header, data[: rng.randrange(len(data))] if data else b"x")
    document = damage_document(rng, json.loads(header))
    return blind(rng, with_length(json.dumps(document).encode(), data[:200])) if kind < 0.9 else blind(rng, header)


def write_checkpoint(folder: Path) -> Path:
    """Write the sound checkpoint."""
    folder.mkdir()
    for name, content in {"config.json": CONFIG, **SIDE_FILES}.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def use_checkpoint(folder: Path) -> None:
    """Open a checkpoint, read a row of every tensor, and plan its export."""
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.tensors.names():
        shape = checkpoint.tensors.shape(name)
        if shape and shape[0]:
            checkpoint.tensors.read_rows(name, 0, 1)
    outline_checkpoint(folder, quant=None, table_dtype=None, context=None)


def _use_in_folder(relative: str, path: Path) -> None:
    folder = path.parent / "checkpoint"
    if not folder.exists():
        write_checkpoint(folder)
    (folder / relative).write_bytes(path.read_bytes())
    use_checkpoint(folder)


def _use_index(path: Path) -> None:
    folder = path.parent / "sharded"
    if not folder.exists():
        write_checkpoint(folder)
        (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(path.read_bytes())
    open_listed(folder)
    use_checkpoint(folder)


def _use_engram_block(path: Path) -> None:
    EngramConfig.from_dict(parse_json_object(read_small_file(path, MAX_CONFIG_BYTES), str(path)))


def _json_file(name: str, content: Any) -> Parser:
    text = json.dumps(content).encode()
    return Parser(
        name=name,
        damaged=lambda rng: damage_json(rng, text),
        use=lambda path: _use_in_folder(name, path),
        refusals=(CheckpointError,),
        sound=text,
    )


def _use_safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name in file.names():
        shape = file.shape(name)
        if shape and shape[0]:
            file.read_raw_rows(name, 0, 1)
            file.read_rows(name, shape[0] - 1, shape[0])


SAFETENSORS = Parser(
    name="safetensors",
    damaged=lambda rng: damaged_safetensors(rng, HEADER, DATA),
    use=_use_safetensors,
    refusals=(CheckpointError,),
    sound=WEIGHTS,
)
INDEX_TEXT, BLOCK_TEXT = json.dumps(INDEX).encode(), json.dumps(ENGRAM).encode()
CONFIGS = (
    _json_file("config.json", CONFIG),
    *(_json_file(name, content) for name, content in SIDE_FILES.items()),
    Parser(
        name="model.safetensors.index.json",
        damaged=lambda rng: damage_json(rng, INDEX_TEXT),
        use=_use_index,
        refusals=(CheckpointError,),
        sound=INDEX_TEXT,
    ),
    Parser(
        name="engram block",
        damaged=lambda rng: damage_json(rng, BLOCK_TEXT),
        use=_use_engram_block,
        refusals=(CheckpointError,),
        sound=BLOCK_TEXT,
    ),
)


def safetensors_headers(count: int) -> Outcome:
    """Damage safetensors files as an export reads them."""
    return survey((SAFETENSORS, count))


def configs(count: int) -> Outcome:
    """Damage the configs and the index of a checkpoint, ``count`` times in all."""
    return survey(*evenly(count, CONFIGS))


ROWS = (
    Row(
        name="A3 safetensors",
        fault="a safetensors file with a damaged header, a wrong length of it, or damaged bytes",
        expected="CheckpointError, or rows of every tensor; at most 1 s and 64 MiB",
        quick=10_000,
        full=400_000,
        run=safetensors_headers,
    ),
    Row(
        name="A3 configs",
        fault="config.json, tokenizer_config.json, generation_config.json, the index, an engram block; each damaged",
        expected="CheckpointError, or rows and an outline of the export; at most 1 s and 64 MiB",
        quick=10_000,
        full=200_000,
        run=configs,
    ),
)
