"""What a model with Engram sites computes, stated without the product: transformers, and numpy in float64 for sites."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from tests.tiny import HEADS, KV_HEADS
from transformers import AutoModelForCausalLM

Array = NDArray[np.float64]
Weights = Mapping[str, torch.Tensor]


def transformers_logits(checkpoint: Path, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Run a text through the model as transformers loads it, in float32; returns ``[T, V]``."""
    logits: NDArray[np.float32] = _run(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), token_ids)
    return logits


def reference_logits(
    checkpoint: Path,
    token_ids: Sequence[int],
    *,
    blocks: Sequence[Mapping[str, Any]] = (),
    site_tensors: Weights | None = None,
    weights: Mapping[str, Array] | None = None,
) -> Array:
    """Run a model in float64 with its sites' updates added by hand; returns ``[T, V]``.

    Args:
        checkpoint: the model without its sites.
        blocks: the engram block of each site.
        site_tensors: the sites' tensors by their names in a checkpoint.
        weights: replaces weights of the model or the sites, under their names in a checkpoint.
    """
    replaced = weights or {}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name in replaced:
            parameter.data = torch.from_numpy(replaced[name].astype(np.float64))
    tensors = {name: as_float64(values) for name, values in (site_tensors or {}).items()} | dict(replaced)
    for block in blocks:
        prefix = "engram" if len(blocks) == 1 else f"engram.{block['layer_ids'][0]}"
        site = {name.removeprefix(f"{prefix}."): values for name, values in tensors.items() if name.startswith(prefix)}
        _add_update(model.model.layers[block["layer_ids"][0]], block, site, token_ids)
    logits: Array = _run(model, token_ids)
    return logits


def reference_activity(
    checkpoint: Path, token_ids: Sequence[int], block: Mapping[str, Any], site_tensors: Weights
) -> Array:
    """Return ``[T, 1, 3]`` of a model's only site: its gate, and the norms of its update and the stream before it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    site = {name.removeprefix("engram."): as_float64(values) for name, values in site_tensors.items()}
    streams: list[Array] = []
    layer = model.model.layers[block["layer_ids"][0]]
    layer.register_forward_pre_hook(lambda _, arguments: streams.append(arguments[0][0].numpy()))
    _run(model, token_ids)
    (hidden,) = streams
    gate = site_gate(hidden, site_rows(token_ids, block, site), block, site)
    norms = [np.linalg.norm(x, axis=1) for x in (site_update(hidden, token_ids, block, site), hidden)]
    return np.stack([gate[:, 0], *norms], axis=-1)[:, None]


def site_blocks(checkpoint: Path) -> list[dict[str, Any]]:
    """Return the engram blocks of a checkpoint or site folder."""
    blocks = json.loads((checkpoint / "config.json").read_text())["engram"]
    return [blocks] if isinstance(blocks, dict) else blocks


def as_float64(values: torch.Tensor) -> Array:
    """Widen a tensor; bfloat16 has no numpy type of its own."""
    return values.to(torch.float64).numpy()


def _run(model: Any, token_ids: Sequence[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)])).logits[0].numpy()


def _add_update(
    layer: torch.nn.Module, block: Mapping[str, Any], site: Mapping[str, Array], token_ids: Sequence[int]
) -> None:
    def before(_: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        update = site_update(hidden[0].numpy(), token_ids, block, site)
        return (hidden + torch.from_numpy(update)[None], *arguments[1:])

    layer.register_forward_pre_hook(before)


def site_update(hidden: Array, token_ids: Sequence[int], block: Mapping[str, Any], site: Mapping[str, Array]) -> Array:
    """Return ``[T, D]`` that a site adds to ``hidden [T, D]``: the equations of arXiv 2601.07372, one by one."""
    embedding = site_rows(token_ids, block, site)  # [T, C * d]
    update = site_gate(hidden, embedding, block, site) * (embedding @ site["value_proj.weight"].T)
    if block["conv"] is not None:
        update = update + _silu(_convolved(update, block["conv"], site))
    return np.asarray(update * block.get("output_scale", 1.0))


def site_gate(hidden: Array, embedding: Array, block: Mapping[str, Any], site: Mapping[str, Array]) -> Array:
    """Return ``[T, 1]``, how far a site opens for its rows ``[T, C * d]`` at ``hidden [T, D]``."""
    gate = block["gate"]
    key = embedding @ site["key_proj.weight"].T
    normed_query = _norm(hidden, site.get("query_norm.weight"), gate["query_norm_eps"])
    normed_key = _norm(key, site.get("key_norm.weight"), gate["key_norm_eps"])
    score = (normed_query * normed_key).sum(axis=1, keepdims=True) / np.sqrt(hidden.shape[1])
    root = np.sign(score) * np.sqrt(np.maximum(np.abs(score), gate["signed_root_floor"]))
    bias = site["gate_bias"] if "bias" in gate else 0.0
    return np.asarray(1 / (1 + np.exp(-(root + bias))))


def site_rows(token_ids: Sequence[int], block: Mapping[str, Any], site: Mapping[str, Array]) -> Array:
    """Return ``[T, C * d]``: the rows of the n-grams that end at each token, side by side."""
    token_map = site.get("token_map")
    ids = [token_id if token_map is None else int(token_map[token_id]) for token_id in token_ids]
    table = site["table.rows"] if "row_payload" not in block else _halves(site["table.rows"])
    if "table.scales" in site:
        table = table * site["table.scales"][:, None]
    return np.stack([table[row_ids(ids[: end + 1], block)].reshape(-1) for end in range(len(ids))])


def _halves(rows: Array) -> Array:
    """Return ``[N, 2 * B]`` for bytes ``[N, B]``: each its low half, then its high one, in two's complement."""
    halves = np.stack([rows % 16, rows // 16], axis=-1).reshape(len(rows), -1)
    return np.where(halves < 8, halves, halves - 16)


def row_ids(compressed_ids: Sequence[int], block: Mapping[str, Any]) -> list[int]:
    """Return the rows the last token reads; Python's integers don't overflow, so nothing is assumed of the sizes."""
    hashing = block["hash"]
    rows: list[int] = []
    padded = [hashing["pad_id"]] * max(block["ngram_orders"]) + list(compressed_ids)
    for order in block["ngram_orders"]:
        mixed = 0
        for back in range(order):
            mixed ^= padded[-1 - back] * hashing["multipliers"][back]
        for _ in range(block["num_hash_heads"]):
            column = len(rows)
            rows.append(hashing["offsets"][column] + mixed % hashing["primes"][column])
    return rows


def _convolved(update: Array, conv: Mapping[str, Any], site: Mapping[str, Array]) -> Array:
    normed = _norm(update, site.get("conv_norm.weight"), conv["norm_eps"])
    result = np.zeros_like(update)
    for now in range(len(update)):
        for tap in range(conv["kernel"]):
            then = now - (conv["kernel"] - 1 - tap) * conv["dilation"]  # the last tap is the present
            if then >= 0:
                result[now] += normed[then] * site["conv.weight"][:, 0, tap]
    return result


def _norm(x: Array, gain: Array | None, eps: float) -> Array:
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
    return np.asarray(normed if gain is None else normed * gain)


def _silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def dequantised_weights(bundle: Path) -> dict[str, Array]:
    """Decode a bundle's quantised weights by the formats' definitions, under their names in a checkpoint."""
    stored = safetensors.torch.load_file(bundle / "graph" / "weights.safetensors")
    layers = {name.removesuffix(".codes") for name in stored if name.endswith(".codes")}
    found: dict[str, Array] = {}
    for layer in layers:
        parts = {name.removeprefix(f"{layer}."): v.numpy() for name, v in stored.items() if name.startswith(layer)}
        found |= _split_fused(layer, _dequantise(parts))
    return found


def _dequantise(parts: Mapping[str, NDArray[Any]]) -> Array:
    """Return ``[N, K]``; blocks of 32 neighbours share a block scale, or a multiplier and a zero."""
    rows = len(parts["codes"])
    codes = parts["codes"].reshape(rows, -1)
    if "multiplier" in parts:
        zero = _nibbles(parts["zero"])[:, : parts["multiplier"].shape[1]]
        whole = (_nibbles(codes) - zero.repeat(32, axis=1)) * parts["multiplier"].astype(float).repeat(32, axis=1)
        return np.asarray(whole * parts["scale"])
    if "block_scale" in parts:
        scale = parts["block_scale"].astype(float).repeat(32, axis=1)
        values = codes - 128.0 if codes.shape == scale.shape else _nibbles(codes) - 8
        return np.asarray(values * scale)
    return np.asarray((codes - 128.0) * parts["scale"])


def _nibbles(packed: NDArray[np.uint8]) -> Array:
    values = np.empty((len(packed), packed.shape[1] * 2))
    values[:, ::2], values[:, 1::2] = packed % 16, packed // 16
    return values


def _split_fused(layer: str, weight: Array) -> dict[str, Array]:
    """Name a bundle's weight as a checkpoint does, taking joined ones apart."""
    kind, _, rest = layer.partition(".")
    if kind == "embedding":
        return {"model.embed_tokens.weight": weight}
    if kind == "lm_head":
        return {"lm_head.weight": weight}
    index, _, part = rest.rpartition(".")
    index = index.partition(".")[0]
    if kind == "sites":
        return {f"engram.{part}.weight": weight, f"engram.{index}.{part}.weight": weight}
    sizes = {
        "qkv": {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS, "self_attn.v_proj": KV_HEADS},
        "output": {"self_attn.o_proj": 1},
        "gate_up": {"mlp.gate_proj": 1, "mlp.up_proj": 1},
        "down": {"mlp.down_proj": 1},
    }[part]
    share = len(weight) // sum(sizes.values())
    ends = np.cumsum([size * share for size in sizes.values()])[:-1]
    parts = np.split(weight, ends)
    return {f"model.layers.{index}.{name}.weight": values for name, values in zip(sizes, parts, strict=True)}
