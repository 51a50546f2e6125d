"""Write a bundle's decoder as a GGUF file, for llama.cpp to run the same weights.

Each weight gets the GGUF type of its own bit width: int8 becomes Q8_0, int4 Q4_0; float is BF16 where a matrix of a
float bundle holds nothing but bfloat16 numbers, and F32 elsewhere. The head and the
embedding of an int4 bundle are int8, so they are Q8_0, where llama-quantize would make the head Q6_K. Rounding to
blocks of 32 once more changes int8 weights by less than a step; int4 ones have zero points that Q4_0 lacks.
The file has no tokenizer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from engram_compilers.onnx_model import Node, read_onnx_model
from engram_export.gguf_sizes import EMBEDDING, HEAD
from engram_export.quantise import BLOCK, Int4Weight, Int8Weight
from engram_export.safetensors_file import SafetensorsFile
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}  # of llama.cpp, by our families
F32, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16
Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
PARTS = ("codes", "multiplier", "zero", "scale", "block_scale")  # of a quantised weight

ROUTER = "ffn_gate_inp"

SINGLE = {
    "mixer_norm": "attn_norm",
    "mixer.query_norm": "attn_q_norm",
    "mixer.key_norm": "attn_k_norm",
    "mixer.output": "attn_output",
    "feed_forward_norm": "ffn_norm",
    "feed_forward.down": "ffn_down",
    "feed_forward.router": ROUTER,
    "feed_forward.experts.down": "ffn_down_exps",
}

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What llama.cpp has to be told; ``num_experts`` and ``top_k`` are 0 without experts."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    feed_forward: int
    norm_eps: float
    rope_theta: float
    num_experts: int
    top_k: int


class BundleWeights:
    """The weights of a bundle by the name of their module, as float32 and with their GGUF type."""

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path)
        self._names = frozenset(self._file.names())

    def modules(self) -> set[str]:
        """Return the names of all modules with weights."""
        return {name.rpartition(".")[0] for name in self._names}

    def float_rows(self, name: str, count: int) -> Floats:
        """Return the first rows of a float tensor."""
        return self._file.read_rows(name, 0, count)

    def read(self, module: str) -> tuple[Floats, GGMLQuantizationType]:
        """Return a module's weight ``[N, K]``, of experts ``[E, N, K]``, dequantised."""
        if f"{module}.weight" in self._names:
            return self._file.read(f"{module}.weight"), F32
        stored = {part: self._file.read_raw(f"{module}.{part}") for part in PARTS if f"{module}.{part}" in self._names}
        *rows, _ = stored["scale" if "scale" in stored else "block_scale"].shape
        flat = {part: values.reshape(math.prod(rows), -1) for part, values in stored.items()}
        values, kind = _dequantised(**flat)
        return values.reshape(*rows, -1), kind


def write_gguf(bundle: Bundle, path: Path) -> None:
    """Write the decoder of a bundle to ``path``.

    Raises:
        BundleError: a model that llama.cpp runs otherwise or not at all.
    """
    decoder = bundle.manifest.decoder
    weights = BundleWeights(bundle.file(decoder.weights))
    _check_model(bundle, weights)
    model = read_onnx_model(bundle.graph_file(decoder.file), bundle.graph_file(decoder.weights))
    sizes = read_sizes(bundle, weights, model.nodes)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[bundle.manifest.model.family])
    _write_metadata(writer, bundle, sizes)
    # The header comes first and holds all types, so weights are read twice rather than kept.
    for name, values, kind in gguf_tensors(bundle, weights, sizes):
        writer.add_tensor_info(name, values.shape, values.dtype, _stored_bytes(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, values, kind in gguf_tensors(bundle, weights, sizes):
        data = values if kind is F32 else gguf.quants.quantize(values, kind)
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.close()


def _stored_bytes(values: Floats, kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(values.size // block * block_bytes)


def _check_model(bundle: Bundle, weights: BundleWeights) -> None:
    manifest = bundle.manifest
    if manifest.model.family not in ARCHITECTURES:
        raise BundleError(
            f"{manifest.model.family} can't be written as GGUF, {sorted(ARCHITECTURES)} can; give --gguf FILE"
        )
    if manifest.tables:
        raise BundleError(
            f"bundle {bundle.path} has Engram sites, which llama.cpp's {manifest.model.family} has not; "
            f"export it without --engram"
        )
    if manifest.model.family == "qwen3_moe" and any(
        name.endswith("feed_forward.gate_up") for name in weights.modules()
    ):
        raise BundleError(f"bundle {bundle.path} has dense layers among those with experts, llama.cpp has not")


def read_sizes(bundle: Bundle, weights: BundleWeights, nodes: Sequence[Node]) -> Sizes:
    """Read from the graph what its weights don't say.

    Raises:
        BundleError: a scaled rotation, or experts whose weights aren't divided by their sum.
    """
    attention = next(node for node in nodes if node.operator.endswith("GroupQueryAttention"))
    norm = next(node for node in nodes if node.operator == "RMSNormalization")
    mixture = next((node for node in nodes if node.operator.endswith("MoE")), None)
    if mixture is not None and not mixture.attributes.get("normalize_routing_weights"):
        raise BundleError(f"bundle {bundle.path} doesn't normalise the weights of experts, llama.cpp does")
    first = "layers.0.feed_forward"
    width = weights.read(f"{first}.down" if mixture is None else f"{first}.experts.down")[0].shape
    head_dim = bundle.manifest.decoder.states[0].shape[-1]
    return Sizes(
        num_heads=attention.attributes["num_heads"],
        num_kv_heads=attention.attributes["kv_num_heads"],
        head_dim=head_dim,
        feed_forward=width[-1],
        norm_eps=norm.attributes["epsilon"],
        rope_theta=_rope_theta(bundle, weights, head_dim),
        num_experts=0 if mixture is None else width[0],
        top_k=0 if mixture is None else mixture.attributes["k"],
    )


def _rope_theta(bundle: Bundle, weights: BundleWeights, head_dim: int) -> float:
    """Find theta from the angles of position 1, which must be those of a rotation without scaling."""
    cosines, sines = (weights.float_rows(f"rotations.full.{part}", 2)[1].astype(np.float64) for part in ("cos", "sin"))
    angles = np.arctan2(sines, cosines)
    theta = float(f"{angles[1] ** (-head_dim / 2):.4g}")
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if not np.allclose(angles, plain, rtol=1e-3) or not np.allclose(np.hypot(sines, cosines), 1, atol=1e-4):
        raise BundleError(f"bundle {bundle.path} scales its rotary positions, which isn't written; give --gguf FILE")
    return theta


def _write_metadata(writer: gguf.GGUFWriter, bundle: Bundle, sizes: Sizes) -> None:
    model = bundle.manifest.model
    writer.add_name(model.name)
    writer.add_context_length(model.context_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(sizes.feed_forward)
    writer.add_head_count(sizes.num_heads)
    writer.add_head_count_kv(sizes.num_kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(sizes.rope_theta)
    writer.add_layer_norm_rms_eps(sizes.norm_eps)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("none")
    if sizes.num_experts:
        writer.add_expert_count(sizes.num_experts)
        writer.add_expert_used_count(sizes.top_k)
        writer.add_expert_feed_forward_length(sizes.feed_forward)


def gguf_tensors(
    bundle: Bundle, weights: BundleWeights, sizes: Sizes
) -> Iterator[tuple[str, Floats, GGMLQuantizationType]]:
    """Yield every tensor under llama.cpp's name, in its row order, with its type."""
    is_float = bundle.manifest.model.quantisation == "none"
    for name, values, kind in _tensors_as_stored(bundle, weights, sizes):
        is_matrix = values.ndim > 1 and ROUTER not in name  # llama.cpp has norms and routers in F32
        yield name, values, BF16 if is_float and is_matrix and _is_bfloat16(values) else kind


def _is_bfloat16(values: Floats) -> bool:
    """Whether every number is exactly one of bfloat16, the upper half of a float32."""
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()


def _tensors_as_stored(
    bundle: Bundle, weights: BundleWeights, sizes: Sizes
) -> Iterator[tuple[str, Floats, GGMLQuantizationType]]:
    modules = weights.modules()
    yield EMBEDDING, *weights.read("embedding")
    yield "output_norm.weight", *weights.read("norm")
    if "lm_head" in modules:
        yield HEAD, *weights.read("lm_head")
    interleaved = bundle.manifest.model.family == "llama"
    for layer in range(bundle.manifest.model.num_layers):
        source, target = f"layers.{layer}.", f"blk.{layer}."
        for module, name in SINGLE.items():
            if f"{source}{module}" in modules:
                yield f"{target}{name}.weight", *weights.read(f"{source}{module}")
        values, kind = weights.read(f"{source}mixer.qkv")
        for name, rows in _attention_rows(values, sizes, interleaved=interleaved).items():
            yield f"{target}attn_{name}.weight", rows, kind
        gate, up, kind = _gate_and_up(weights, f"{source}feed_forward.", experts=sizes.num_experts > 0)
        suffix = "_exps" if sizes.num_experts else ""
        yield f"{target}ffn_gate{suffix}.weight", gate, kind
        yield f"{target}ffn_up{suffix}.weight", up, kind


def _attention_rows(qkv: Floats, sizes: Sizes, *, interleaved: bool) -> Mapping[str, Floats]:
    """Split the joined projection; llama.cpp's llama has the two halves of each query and key head in turn."""
    heads = {"q": sizes.num_heads, "k": sizes.num_kv_heads, "v": sizes.num_kv_heads}
    ends = np.cumsum([count * sizes.head_dim for count in heads.values()])[:-1]
    rows = dict(zip(heads, np.split(qkv, ends), strict=True))
    for name in "qk" if interleaved else "":
        halves = rows[name].reshape(heads[name], 2, sizes.head_dim // 2, -1)
        rows[name] = halves.swapaxes(1, 2).reshape(rows[name].shape)
    return rows


def _gate_and_up(weights: BundleWeights, prefix: str, *, experts: bool) -> tuple[Floats, Floats, GGMLQuantizationType]:
    """Split the joined projection: one after the other in a dense layer, in alternate rows in experts."""
    if experts:
        values, kind = weights.read(f"{prefix}experts.gate_up")
        return values[:, ::2], values[:, 1::2], kind
    values, kind = weights.read(f"{prefix}gate_up")
    gate, up = np.split(values, 2)
    return gate, up, kind


def _dequantised(
    codes: NDArray[np.uint8],
    multiplier: NDArray[np.uint8] | None = None,
    zero: NDArray[np.uint8] | None = None,
    scale: Floats | None = None,
    block_scale: Floats | None = None,
) -> tuple[Floats, GGMLQuantizationType]:
    """Return ``[N, K]`` of the stored parts of a weight, ``[N, ...]`` each; see `engram_export.linear`."""
    if multiplier is not None and zero is not None and scale is not None:
        zeros = _nibbles(zero)[:, : multiplier.shape[1]]
        return Int4Weight(_nibbles(codes), multiplier, zeros, scale).dequantise(), Q4_0
    if block_scale is not None:
        bytewise = codes.shape[1] == BLOCK * block_scale.shape[1]
        values, middle, kind = (codes, 128, Q8_0) if bytewise else (_nibbles(codes), 8, Q4_0)
        return (values.astype(np.float32) - middle) * np.repeat(block_scale, BLOCK, axis=1), kind
    assert scale is not None
    return Int8Weight(codes, scale).dequantise(), Q8_0


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Split bytes into 4-bit codes along the last axis, the low half first."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
