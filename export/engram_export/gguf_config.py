"""Turn the metadata of a GGUF file into the content of a Hugging Face config.json.

Supported architectures: llama and qwen3 with one feed-forward network per layer and rotary positions over the whole
head. Everything else is an error, so that no number is exported under a wrong meaning.
"""

from typing import Any

from engram_export.gguf_header import GgufHeader, shortest_float
from engram_export.gguf_rope import rope_scaling
from engram_runtime.errors import CheckpointError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Metadata of variants of these architectures that would change the arithmetic.
VARIANT_KEYS = (
    "expert_count",
    "attention.sliding_window",
    "attention.clamp_kqv",
    "attention.scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "rope.scale_linear",
)


def hf_config(header: GgufHeader) -> dict[str, Any]:
    """Return config.json's content for a supported architecture."""
    arch = architecture(header)
    _refuse_variants(header, arch)
    num_heads = header.positive(f"{arch}.attention.head_count", int)
    theta = _rope_theta(header, arch)
    hidden_size = header.positive(f"{arch}.embedding_length", int)
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": header.positive(f"{arch}.feed_forward_length", int),
        "num_hidden_layers": header.positive(f"{arch}.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.get(f"{arch}.attention.head_count_kv", int) or num_heads,
        "head_dim": _head_dim(header, arch, hidden_size, num_heads),
        "max_position_embeddings": header.positive(f"{arch}.context_length", int),
        "rms_norm_eps": shortest_float(header.positive(f"{arch}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(header, arch, theta),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "vocab_size": _vocab_size(header, arch),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **token_ids(header),
    }


def architecture(header: GgufHeader) -> str:
    """Return the architecture, if it is a supported one."""
    arch = header.require("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise CheckpointError(f"{header.path} has architecture {arch!r}, supported are {', '.join(ARCHITECTURES)}")
    return arch


def token_ids(header: GgufHeader) -> dict[str, int | None]:
    """Return the ids of the begin, end and padding tokens, None where the file names none."""
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: header.get(f"tokenizer.ggml.{name}_token_id", int) for key, name in names.items()}


def generation_config(header: GgufHeader) -> dict[str, Any]:
    """Return generation_config.json's content; a model may end its text or its turn, so eos can be a list."""
    ids = token_ids(header)
    ends = [ids["eos_token_id"], *(header.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eot", "eom"))]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    known = {key: value for key, value in ids.items() if value is not None}
    return known | ({"eos_token_id": eos if len(eos) > 1 else eos[0]} if eos else {})


def _refuse_variants(header: GgufHeader, arch: str) -> None:
    for key in VARIANT_KEYS:
        if value := header.metadata.get(f"{arch}.{key}"):
            raise CheckpointError(
                f"'{arch}.{key}' of {header.path} is {value!r:.80}, models with it are not supported; "
                f"export from safetensors"
            )


def _rope_theta(header: GgufHeader, arch: str) -> float:
    key = f"{arch}.rope.freq_base"
    return shortest_float(header.positive(key, float)) if key in header.metadata else 10_000.0


def _head_dim(header: GgufHeader, arch: str, hidden_size: int, num_heads: int) -> int:
    head_dim = header.get(f"{arch}.attention.key_length", int) or hidden_size // num_heads
    for key in ("attention.value_length", "rope.dimension_count"):
        found = header.get(f"{arch}.{key}", int)
        if found not in (None, head_dim):
            raise CheckpointError(
                f"'{arch}.{key}' of {header.path} is {found}, wanted the head size {head_dim}; export from safetensors"
            )
    return head_dim


def _vocab_size(header: GgufHeader, arch: str) -> int:
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{header.path} holds no tensor 'token_embd.weight'; download or convert the file again")
    rows = header.tensors["token_embd.weight"].shape[0]
    stated = header.get(f"{arch}.vocab_size", int)
    if stated not in (None, rows):
        raise CheckpointError(
            f"'{arch}.vocab_size' of {header.path} is {stated}, tensor 'token_embd.weight' has {rows} rows; "
            f"convert the file again"
        )
    tokens = header.get_list("tokenizer.ggml.tokens", str) or []
    if len(tokens) > rows:
        raise CheckpointError(
            f"{header.path} holds {len(tokens)} tokens, 'token_embd.weight' has {rows} rows; convert the file again"
        )
    return rows
