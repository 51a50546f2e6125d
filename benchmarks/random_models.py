"""Checkpoints of given shapes with random weights, for measuring speed: a folder with config.json and safetensors.

python benchmarks/random_models.py 1b build/random-1b
engram-export build/random-1b -o build/random-1b-int4.engram --quant int4 --calibration none --context 4096
engram compile build/random-1b-int4.engram
engram bench build/random-1b-int4.engram --against llama.cpp
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from engram_export.weights_file import SafetensorsWriter
from engram_runtime.safetensors_layout import TensorPlan

SEED, NORM_EPS, CONTEXT = 0, 1e-5, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model; with experts, ``feed_forward`` is that of each."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 32000
    experts: int = 0
    top_k: int = 0


SHAPES = {
    "120m": Shape(layers=12, hidden=768, feed_forward=2048, heads=12, kv_heads=4, head_dim=64),
    "1b": Shape(layers=22, hidden=2048, feed_forward=5632, heads=32, kv_heads=4, head_dim=64),
    "moe": Shape(layers=16, hidden=1024, feed_forward=256, heads=16, kv_heads=4, head_dim=64, experts=64, top_k=8),
    "moe-512": Shape(layers=2, hidden=512, feed_forward=128, heads=8, kv_heads=4, head_dim=64, experts=512, top_k=10),
}


def config(shape: Shape) -> dict[str, Any]:
    """Return config.json: a llama, or a qwen3_moe."""
    common = {
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": 10000.0,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    if not shape.experts:
        return {**common, "model_type": "llama", "intermediate_size": shape.feed_forward}
    return {
        **common,
        "model_type": "qwen3_moe",
        "intermediate_size": shape.feed_forward,
        "moe_intermediate_size": shape.feed_forward,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
    }


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of all tensors."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        yield from ((f"model.layers.{layer}.{name}.weight", size) for name, size in layer_tensors(shape))
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def layer_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a layer's tensors."""
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "input_layernorm", (shape.hidden,)
    for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
        yield f"self_attn.{name}_proj", (rows, shape.hidden)
    yield "self_attn.o_proj", (shape.hidden, width)
    yield "post_attention_layernorm", (shape.hidden,)
    if not shape.experts:
        yield from feed_forward_tensors("mlp", shape)
        return
    for name in ("q", "k"):
        yield f"self_attn.{name}_norm", (shape.head_dim,)
    yield "mlp.gate", (shape.experts, shape.hidden)
    for expert in range(shape.experts):
        yield from feed_forward_tensors(f"mlp.experts.{expert}", shape)


def feed_forward_tensors(name: str, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a SwiGLU."""
    for part in ("gate", "up"):
        yield f"{name}.{part}_proj", (shape.feed_forward, shape.hidden)
    yield f"{name}.down_proj", (shape.hidden, shape.feed_forward)


def random_tensor(rng: np.random.Generator, size: tuple[int, ...]) -> NDArray[np.float16]:
    """Draw a weight that keeps the size of what it is given, or a norm's gain near one."""
    values = rng.standard_normal(size, dtype=np.float32)
    scaled = 1 + values / 5 if len(size) == 1 else values / math.sqrt(size[-1])
    return scaled.astype(np.float16)


@click.command()
@click.argument("name", type=click.Choice(list(SHAPES)))
@click.argument("folder", type=click.Path(path_type=Path))
def main(name: str, folder: Path) -> None:
    """Write the model NAME into FOLDER, which must not exist."""
    plans = write_checkpoint(SHAPES[name], folder)
    parameters = sum(math.prod(plan.shape) for plan in plans)
    click.echo(f"{folder}: {parameters / 1e6:.0f}M parameters, {sum(plan.bytes for plan in plans) / 1e6:.0f} MB")


def write_checkpoint(shape: Shape, folder: Path) -> list[TensorPlan]:
    """Write a model of that shape, without a tokenizer, into a folder that must not exist; returns its tensors."""
    rng = np.random.default_rng(SEED)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    plans = [TensorPlan(tensor, "float16", size) for tensor, size in tensors(shape)]
    with SafetensorsWriter(folder / "model.safetensors", plans) as writer:
        for plan in plans:
            writer.write(plan.name, random_tensor(rng, plan.shape))
    return plans


if __name__ == "__main__":
    main()
