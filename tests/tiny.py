"""Tiny random models in the files real ones come in: checkpoints saved by transformers, Engram sites, bundles."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from engram_export.pipeline import ExportOptions, Progress, export_bundle
from engram_export.plan import ExportPlan
from engram_export.token_compression import compress_vocabulary
from engram_export.verify import Parity
from engram_runtime.bundle import Bundle
from engram_runtime.executor import load_executor
from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes
from engram_runtime.session import Session, open_sites
from engram_targets import TargetProfile, load_profile

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, VOCAB, CONTEXT = 64, 128, 4, 2, 300, 192
THREADS = 2
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = (
    "The tide comes in twice a day and the tide goes out twice a day. Über den Wolken muss die Freiheit sein; 日本語. "
    "A table of rows is read by the hash of the last two and three tokens, and the rows are added to the stream."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """What a checkpoint is made of; ``rope`` is the scaling as transformers spells it."""

    family: str = "llama"
    tied: bool = True
    dtype: str = "float32"
    head_dim: int = 16
    layers: int = 2
    rope: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    shard_size: str = "5GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySite:
    """What an Engram site is made of; ``token_map`` is "tensor", "tokenizer" or None for raw ids."""

    layer_id: int = 1
    convolution: bool = True
    gate_bias: bool = True
    gains: bool = True
    output_scale: float = 1.5
    token_map: str | None = "tensor"
    payload: str = "int8"


ROPES: dict[str, Mapping[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 3.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}


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
        rms_norm_eps=1e-5,
        tie_word_embeddings=tiny.tied,
        rope_parameters=dict(tiny.rope),
        bos_token_id=None,
        eos_token_id=0,
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
    blocks, tensors = _sites(checkpoint, sites)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "engram": blocks}))
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    safetensors.torch.save_file({**weights, **tensors}, checkpoint / "model.safetensors", {"format": "pt"})
    return checkpoint


def save_site_folder(folder: Path, checkpoint: Path, site: TinySite) -> Path:
    """Save a site by itself, for ``--engram``."""
    folder.mkdir()
    block, tensors = _sites(checkpoint, [site])
    (folder / "config.json").write_text(json.dumps({"engram": block}))
    safetensors.torch.save_file(tensors, folder / "engram.safetensors")
    return folder


def _sites(checkpoint: Path, sites: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    parts = [_site(checkpoint, site, "engram" if len(sites) == 1 else f"engram.{site.layer_id}") for site in sites]
    blocks = [block for block, _ in parts]
    return blocks[0] if len(sites) == 1 else blocks, {k: v for _, tensors in parts for k, v in tensors.items()}


ORDERS, HASH_HEADS, ROW_DIM, ROWS_PER_HEAD = (2, 3), 2, 16, (60, 90)


def _site(checkpoint: Path, site: TinySite, prefix: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    token_map = compress_vocabulary((checkpoint / "tokenizer.json").read_bytes())
    hashed_ids = VOCAB if site.token_map is None else int(token_map.max()) + 1
    (primes,) = derive_primes(layers=1, rows_per_head=ROWS_PER_HEAD, num_heads=HASH_HEADS)
    multipliers = derive_multipliers(vocab_size=hashed_ids, max_order=max(ORDERS), layer_id=site.layer_id)
    hashing = {
        "kind": "xor_prime",
        "multipliers": multipliers.tolist(),
        "primes": primes.tolist(),
        "offsets": column_offsets(primes).tolist(),
        "seed": 0,
        "pad_id": 0,
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
        "output_scale": site.output_scale,
        "conv": {"kernel": 4, "dilation": 3, "norm_eps": 1e-5} if site.convolution else None,
    }
    tensors = _site_tensors(site, int(primes.sum()))
    if site.token_map == "tensor":
        tensors["token_map"] = torch.from_numpy(token_map)
    return block, {f"{prefix}.{name}": values for name, values in tensors.items()}


def _site_tensors(site: TinySite, num_rows: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(31 + site.layer_id)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    width = len(ORDERS) * HASH_HEADS * ROW_DIM
    tensors = {
        "key_proj.weight": normal(HIDDEN, width) / width**0.5,
        "value_proj.weight": normal(HIDDEN, width) / width**0.5,
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
    if payload != "int8":
        return {"table.rows": values.to(getattr(torch, payload))}
    scales = (values.abs().amax(dim=1) / 127).half()
    return {"table.rows": (values / scales.float()[:, None]).round().to(torch.int8), "table.scales": scales}


class SilentReporter:
    """Shows nothing, but keeps the plan."""

    def __init__(self) -> None:
        self.plans: list[ExportPlan] = []

    def plan(self, plan: ExportPlan) -> None:
        self.plans.append(plan)

    def step(self, title: str) -> None:
        pass

    @contextlib.contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Progress]:
        yield lambda count: None


def options(checkpoint: Path, out: Path, **changes: Any) -> ExportOptions:
    """Return the options of an export, float unless told otherwise."""
    defaults = ExportOptions(
        checkpoint=checkpoint, out=out, quant="none", tables="copy", context=None, engram=None, replace=False
    )
    return dataclasses.replace(defaults, **changes)


def export(checkpoint: Path, out: Path, **changes: Any) -> Bundle:
    """Export and open a bundle."""
    export_bundle(options(checkpoint, out, **changes), SilentReporter())
    return Bundle.open(out)


def parity(checkpoint: Path, out: Path, **changes: Any) -> Parity:
    """Export and return what the exporter measured."""
    return export_bundle(options(checkpoint, out, **changes), SilentReporter())


@contextlib.contextmanager
def open_session(bundle: Bundle, executor: str = "onnxruntime", *, tables_on: bool = True) -> Iterator[Session]:
    """Open a session on a loaded bundle."""
    loaded = load_executor(executor, bundle, threads=THREADS)
    with Session(bundle, loaded, open_sites(bundle), tables_on=tables_on) as session:
        yield session


def token_ids(count: int, seed: int = 0) -> list[int]:
    """Return random ids of the tiny vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB, size=count).tolist()


def logits(bundle: Bundle, ids: list[int], executor: str = "onnxruntime", *, tables_on: bool = True) -> Any:
    """Run a text through a new session, ``[T, V]``."""
    with open_session(bundle, executor, tables_on=tables_on) as session:
        return np.concatenate(list(session.logits(ids)))


def transformers_logits(checkpoint: Path, ids: list[int]) -> NDArray[np.float32]:
    """Run a text through the model as transformers loads it, in float32, ``[T, V]``."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        values: NDArray[np.float32] = model(torch.tensor([ids])).logits[0].numpy()
    return values


def copy_folder(source: Path, target: Path) -> Path:
    """Copy a checkpoint or bundle that a test is going to damage."""
    shutil.copytree(source, target)
    return target


def tiny_profile(**changes: Any) -> TargetProfile:
    """Return this machine's profile with few forward passes, which is quick to compile."""
    profile = dataclasses.replace(load_profile("native"), decode_tokens=(1, 2, 4), prefill_tokens=(8,))
    return dataclasses.replace(profile, **changes)
