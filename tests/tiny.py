"""Tiny random models in the files real ones come in: checkpoints of transformers, GGUF files, Engram sites."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from engram_export.token_compression import compress_vocabulary
from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes

transformers.utils.logging.disable_progress_bar()

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCAB, CONTEXT = 64, 128, 4, 2, 300, 192
NORM_EPS = 1e-5
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
END_ID = 0
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = (
    "The tide comes in twice a day and the tide goes out twice a day. Über den Wolken muss die Freiheit sein; 日本語. "
    "A table of rows is read by the hash of the last two and three tokens, and the rows are added to the stream."
)
ORDERS, HASH_HEADS, ROW_DIM, ROWS_PER_HEAD = (2, 3), 2, 16, (60, 90)
SITE_WIDTH = len(ORDERS) * HASH_HEADS * ROW_DIM
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """What a checkpoint is made of; ``rope`` is the scaling as transformers spells it."""

    family: str = "llama"
    tied: bool = True
    dtype: str = "float32"
    head_dim: int = 16
    layers: int = 2
    rope: Mapping[str, Any] = field(default_factory=lambda: DEFAULT_ROPE)
    shard_size: str = "5GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySite:
    """What an Engram site is made of.

    Attributes:
        output_scale: None leaves it out of the config.
        token_map: "tensor", "tokenizer" (derived at export) or None, which hashes raw ids.
        payload: dtype of the rows; int8 and int4 rows have a float16 scale each.
    """

    layer_id: int = 1
    convolution: bool = True
    gate_bias: bool = True
    gains: bool = True
    output_scale: float | None = 1.5
    token_map: str | None = "tensor"
    payload: str = "int8"


def save_checkpoint(folder: Path, tiny: TinyModel) -> Path:
    """Save a random model and its tokenizer as transformers does."""
    config = AutoConfig.for_model(
        tiny.family,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=tiny.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=tiny.head_dim,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=tiny.tied,
        rope_parameters=dict(tiny.rope),
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    _randomise(model)
    model.to(getattr(torch, tiny.dtype)).save_pretrained(folder, max_shard_size=tiny.shard_size)
    save_tokenizer(folder)
    return folder


def _randomise(model: torch.nn.Module) -> None:
    """Draw weights that matter: linear layers keep the size of what they are given, gains are not all one."""
    rng = torch.Generator().manual_seed(20)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=rng)
        gain = name.endswith("norm.weight")
        parameter.data = 1 + values / 5 if gain else values / parameter.shape[-1] ** 0.5


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer on a fixed text and save it with its settings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def add_sites(checkpoint: Path, *sites: TinySite) -> Path:
    """Add Engram sites to a checkpoint's own config and weights."""
    blocks, tensors = site_files(checkpoint, *sites)
    edit_config(checkpoint, engram=blocks)
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    safetensors.torch.save_file({**weights, **tensors}, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


def edit_config(checkpoint: Path, **values: Any) -> None:
    """Change keys of a checkpoint's config.json."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def save_site_folder(folder: Path, checkpoint: Path, site: TinySite) -> Path:
    """Save a site by itself, for ``--engram``."""
    folder.mkdir()
    block, tensors = site_files(checkpoint, site)
    (folder / "config.json").write_text(json.dumps({"engram": block}))
    safetensors.torch.save_file(tensors, folder / "engram.safetensors")
    return folder


def site_files(checkpoint: Path, *sites: TinySite) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the engram block, a list of them for several sites, and the sites' tensors."""
    if len(sites) == 1:
        return _site_files(checkpoint, sites[0], "engram")
    parts = [_site_files(checkpoint, site, f"engram.{site.layer_id}") for site in sites]
    return [block for block, _ in parts], {name: values for _, part in parts for name, values in part.items()}


def _site_files(checkpoint: Path, site: TinySite, prefix: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    token_map = compress_vocabulary((checkpoint / "tokenizer.json").read_bytes())
    hashed_ids = VOCAB if site.token_map is None else int(token_map.max()) + 1
    (primes,) = derive_primes(layers=1, rows_per_head=ROWS_PER_HEAD, num_heads=HASH_HEADS)
    hashing = {
        "kind": "xor_prime",
        "multipliers": derive_multipliers(
            vocab_size=hashed_ids, max_order=max(ORDERS), layer_id=site.layer_id
        ).tolist(),
        "primes": primes.tolist(),
        "offsets": column_offsets(primes).tolist(),
        "seed": 0,
        "pad_id": 2,
        "compressed_vocab_size": hashed_ids,
    }
    if site.token_map is not None:
        hashing["token_map"] = f"{prefix}.token_map" if site.token_map == "tensor" else "tokenizer"
    gate: dict[str, Any] = {"query_norm_eps": 1e-5, "key_norm_eps": 1e-6, "signed_root_floor": 1e-6}
    block = {
        "layer_ids": [site.layer_id],
        "layer_index_base": 0,
        "ngram_orders": list(ORDERS),
        "num_hash_heads": HASH_HEADS,
        "row_dim": ROW_DIM,
        "num_rows": int(primes.sum()),
        "hash": hashing,
        "gate": gate | ({"bias": f"{prefix}.gate_bias"} if site.gate_bias else {}),
        "conv": {"kernel": 4, "dilation": 3, "norm_eps": 1e-5} if site.convolution else None,
        **({} if site.output_scale is None else {"output_scale": site.output_scale}),
        **({"row_payload": "int4"} if site.payload == "int4" else {}),
    }
    tensors = _site_tensors(site, int(primes.sum()))
    if site.token_map == "tensor":
        tensors["token_map"] = torch.from_numpy(token_map)
    return block, {f"{prefix}.{name}": values for name, values in tensors.items()}


def _site_tensors(site: TinySite, num_rows: int) -> dict[str, torch.Tensor]:
    """Draw a site whose gates are half open and whose values are about as large as the residual stream."""
    rng = torch.Generator().manual_seed(31 + site.layer_id)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    tensors = {
        "key_proj.weight": normal(HIDDEN, SITE_WIDTH) / SITE_WIDTH**0.5,
        "value_proj.weight": normal(HIDDEN, SITE_WIDTH) / SITE_WIDTH**0.5,
        **_rows(normal(num_rows, ROW_DIM), site.payload),
    }
    if site.gate_bias:
        tensors["gate_bias"] = torch.tensor([0.4])
    if site.gains:
        tensors |= {f"{name}_norm.weight": 1 + normal(HIDDEN) / 5 for name in ("query", "key")}
    if site.convolution:
        tensors["conv.weight"] = normal(HIDDEN, 1, 4) / 2
    if site.convolution and site.gains:
        tensors["conv_norm.weight"] = 1 + normal(HIDDEN) / 5
    return tensors


def _rows(values: torch.Tensor, payload: str) -> dict[str, torch.Tensor]:
    if payload == "int4":
        scales = (values.abs().amax(dim=1) / 7).half()
        codes = (values / scales.float()[:, None]).round().clamp(-8, 7).to(torch.int32) & 15
        return {"table.rows": (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), "table.scales": scales}
    if payload != "int8":
        return {"table.rows": values.to(getattr(torch, payload))}
    scales = (values.abs().amax(dim=1) / 127).half()
    codes = (values / scales.float()[:, None]).round().clamp(-127, 127)
    return {"table.rows": codes.to(torch.int8), "table.scales": scales}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(path: Path, checkpoint: Path, linear_type: gguf.GGMLQuantizationType) -> Path:
    """Write a llama checkpoint as llama.cpp does: linear layers in ``linear_type``, the rest F32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_freq_base(DEFAULT_ROPE["rope_theta"])
    vocabulary = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(END_ID)
    for name, values in gguf_weights(checkpoint, linear_type).items():
        kind = linear_type if is_linear(name) else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), interleave(name, values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_weights(checkpoint: Path, linear_type: gguf.GGMLQuantizationType) -> dict[str, NDArray[Any]]:
    """Return a checkpoint's tensors as they are stored in a GGUF file, under their names and in their row order."""
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    return {
        name: gguf.quants.quantize(values.float().numpy(), linear_type) if is_linear(name) else values.float().numpy()
        for name, values in weights.items()
    }


def is_linear(name: str) -> bool:
    """Whether a tensor of a checkpoint is a linear layer's."""
    return "_proj." in name or name.startswith("lm_head")


def interleave(name: str, rows: NDArray[Any]) -> NDArray[Any]:
    """Order the rows of q and k as llama.cpp does: the halves of each head alternate."""
    heads = HEADS if ".q_proj." in name else KV_HEADS if ".k_proj." in name else 0
    if not heads:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{GGUF_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
