"""Peak memory of an export against the size of the checkpoint, tables by reference.

python benchmarks/export_memory.py --folder /tmp/export-memory
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np

from engram_runtime.hashing import column_offsets, derive_multipliers, derive_primes

MIB = 1 << 20
SIZES_MIB = (4, 64, 1024, 16384)
POLL_S = 0.005
VOCAB, HIDDEN, INTERMEDIATE, ROW_DIM = 1024, 512, 384, 64
MAX_EXPERTS, TOP_K = 128, 2
EXPERT_BYTES = 3 * 2 * HIDDEN * INTERMEDIATE  # bfloat16


@dataclass(frozen=True, slots=True)
class Peak:
    """Memory in bytes above what the imports took, what the plan said of it, and seconds."""

    anonymous: int
    predicted: int
    seconds: float


def anonymous_bytes() -> int:
    """Return this process's anonymous memory; pages of mapped files, which the system may drop, don't count."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def measured_export(checkpoint: Path, out: Path) -> Peak:
    """Export in this process and measure it."""
    from engram_export.cli import TerminalReporter
    from engram_export.pipeline import ExportOptions, export_bundle

    options = ExportOptions(
        checkpoint=checkpoint, out=out, quant="int8", tables="reference", context=None, engram=None, replace=False
    )
    reporter = TerminalReporter()
    before = largest = anonymous_bytes()
    finished = threading.Event()

    def poll() -> None:
        nonlocal largest
        while not finished.wait(POLL_S):
            largest = max(largest, anonymous_bytes())

    watcher = threading.Thread(target=poll)
    watcher.start()
    started = time.monotonic()
    try:
        export_bundle(options, reporter)
    finally:
        finished.set()
        watcher.join()
    return Peak(largest - before, reporter.shown["peak_memory_bytes"], time.monotonic() - started)


def write_checkpoint(folder: Path, size_bytes: int) -> None:
    """Write a mixture of experts with an Engram table, half the bytes each; weights are holes, which read as zeros."""
    all_experts = max(TOP_K, size_bytes // 2 // EXPERT_BYTES)
    layers = -(-all_experts // MAX_EXPERTS)
    experts = all_experts // layers
    (primes,) = derive_primes(layers=1, rows_per_head=(size_bytes // 2 // ROW_DIM // 2,), num_heads=2)
    config = mixture_config(layers, experts) | {"engram": engram_block(primes.tolist())}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_sparse(
        folder / "model.safetensors", {**mixture_tensors(layers, experts), **engram_tensors(int(primes.sum()))}
    )


def mixture_config(layers: int, experts: int) -> dict[str, Any]:
    """Return the config of a Qwen3-MoE."""
    return {
        "model_type": "qwen3_moe",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * INTERMEDIATE,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": experts,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


def mixture_tensors(layers: int, experts: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of a Qwen3-MoE's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCAB, HIDDEN), "norm.weight": (HIDDEN,)}
    for layer in range(layers):
        shapes |= {
            f"layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
                "self_attn.q_proj": (256, HIDDEN),
                "self_attn.k_proj": (128, HIDDEN),
                "self_attn.v_proj": (128, HIDDEN),
                "self_attn.o_proj": (HIDDEN, 256),
                "self_attn.q_norm": (64,),
                "self_attn.k_norm": (64,),
                "mlp.gate": (experts, HIDDEN),
                **{f"mlp.experts.{expert}.gate_proj": (INTERMEDIATE, HIDDEN) for expert in range(experts)},
                **{f"mlp.experts.{expert}.up_proj": (INTERMEDIATE, HIDDEN) for expert in range(experts)},
                **{f"mlp.experts.{expert}.down_proj": (HIDDEN, INTERMEDIATE) for expert in range(experts)},
            }.items()
        }
    return {f"model.{name}": ("BF16", shape) for name, shape in shapes.items()}


def engram_block(primes: list[int]) -> dict[str, Any]:
    """Return an ``engram`` block whose table has as many rows as the primes sum to."""
    return {
        "layer_ids": [0],
        "layer_index_base": 0,
        "ngram_orders": [2],
        "num_hash_heads": 2,
        "row_dim": ROW_DIM,
        "num_rows": sum(primes),
        "hash": {
            "kind": "xor_prime",
            "multipliers": derive_multipliers(vocab_size=VOCAB, max_order=2, layer_id=0).tolist(),
            "primes": primes,
            "offsets": column_offsets(np.array(primes)).tolist(),
            "seed": 0,
            "pad_id": 2,
            "compressed_vocab_size": VOCAB,
        },
        "gate": {"query_norm_eps": 1e-5, "key_norm_eps": 1e-6, "signed_root_floor": 1e-6},
        "conv": None,
    }


def engram_tensors(num_rows: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the site's tensors."""
    return {
        "engram.key_proj.weight": ("BF16", (HIDDEN, 2 * ROW_DIM)),
        "engram.value_proj.weight": ("BF16", (HIDDEN, 2 * ROW_DIM)),
        "engram.table.rows": ("I8", (num_rows, ROW_DIM)),
        "engram.table.scales": ("F16", (num_rows,)),
    }


def write_sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file whose data is one hole."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * {"BF16": 2, "F16": 2, "I8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def run_size(folder: Path, size_bytes: int) -> Peak:
    """Export a checkpoint of a size in a process of its own, then remove it and its bundle."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        checkpoint = Path(work) / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, size_bytes)
        line = [sys.executable, __file__, "--one", str(checkpoint)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        return Peak(**json.loads(done.stdout))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where checkpoints and bundles are made and removed.")
@click.option("--size-mib", "sizes", type=int, multiple=True, default=SIZES_MIB, show_default=True)
@click.option("--one", type=click.Path(path_type=Path), help="Measure one checkpoint and print JSON.")
def main(folder: Path | None, sizes: tuple[int, ...], one: Path | None) -> None:
    """Print peak memory above the imports for checkpoints of several sizes."""
    if one is not None:
        peak = measured_export(one, one.with_name("bundle"))
        click.echo(json.dumps(asdict(peak)))
        return
    place = folder or Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    click.echo(f"{platform.machine()}, {os.cpu_count()} CPUs, {shutil.disk_usage(place).free >> 30} GiB free")
    click.echo("checkpoint MiB  peak MiB above imports  predicted MiB  seconds")
    for size in sizes:
        peak = run_size(place, size * MIB)
        click.echo(f"{size:14,}  {peak.anonymous / MIB:22.0f}  {peak.predicted / MIB:13.0f}  {peak.seconds:7.1f}")


if __name__ == "__main__":
    main()
