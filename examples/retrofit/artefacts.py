"""Files of a trained site: its folder, as `engram-export --engram` reads it, and cartridges, as the runtime does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from engram_export.engram_config import EngramConfig
from engram_export.token_compression import compress_vocabulary
from engram_runtime.keyer_digest import constants_digest
from engram_runtime.keyers import NgramKeyer
from engram_runtime.new_file import new_file
from engram_runtime.records import RecordFormat
from engram_runtime.tables.overlay_file import ZERO, OverlaySpec, write_overlay
from examples.retrofit.engram_site import KEY_EPS, QUERY_EPS, ROOT_FLOOR, TrainableSite
from examples.retrofit.whole_files import write_text

CONFIG_FILE, WEIGHTS_FILE = "config.json", "engram.safetensors"
LARGEST_INT4 = 7

Rows = NDArray[np.float32]


def int4_rows(rows: Rows) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Round rows ``[N, d]`` to the int4 grid of `engram_runtime.records`.

    Returns:
        Packed values ``[N, d / 2]``, the low half first, and one scale ``[N]`` for each row; zeros stay zeros.
    """
    scales = (np.abs(rows).max(axis=1) / LARGEST_INT4).astype(np.float16)
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)
    values = np.clip(np.rint(rows / divisors[:, None]), -LARGEST_INT4, LARGEST_INT4).astype(np.int8)
    values[scales == 0] = 0
    halves = values.view(np.uint8) & 0xF
    return halves[:, ::2] | halves[:, 1::2] << 4, scales


def engram_block(keyer: NgramKeyer, *, block: int, row_dim: int, output_scale: float, seed: int) -> dict[str, Any]:
    """Return a site as the config of its folder has it; `engram_export.engram_config` says what that means."""
    assert keyer.token_map is not None
    return {
        "layer_ids": [block],
        "layer_index_base": 0,
        "ngram_orders": list(keyer.orders),
        "num_hash_heads": keyer.num_heads,
        "row_dim": row_dim,
        "num_rows": int(keyer.primes.sum()),
        "row_payload": "int4",
        "hash": {
            "kind": "xor_prime",
            "multipliers": keyer.multipliers.tolist(),
            "primes": keyer.primes.tolist(),
            "offsets": keyer.offsets.tolist(),
            "pad_id": keyer.pad_id,
            "seed": seed,
            "seed_layer": block,
            "token_map": "engram.token_map",
            "compressed_vocab_size": int(keyer.token_map.max()) + 1,
        },
        "gate": {
            "query_norm_eps": QUERY_EPS,
            "key_norm_eps": KEY_EPS,
            "signed_root_floor": ROOT_FLOOR,
            "bias": "engram.gate_bias",
        },
        "output_scale": output_scale,
    }


def write_site(folder: Path, block: dict[str, Any], site: TrainableSite, keyer: NgramKeyer, rows: Rows) -> None:
    """Write the site's config and weights, projections in float16 and rows ``[N, d]`` in int4.

    What the folder's config says of other things, such as a draft head, stays.
    """
    packed, scales = int4_rows(rows)
    config = read_config(folder) if (folder / CONFIG_FILE).exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "engram.key_proj.weight": site.key_proj.detach().half(),
        "engram.value_proj.weight": site.value_proj.detach().half(),
        "engram.query_norm.weight": site.query_norm.detach().float(),
        "engram.gate_bias": site.gate_bias.detach().float(),
        "engram.token_map": torch.from_numpy(np.asarray(keyer.token_map, dtype=np.int32)),
        "engram.table.rows": torch.from_numpy(packed),
        "engram.table.scales": torch.from_numpy(scales),
    }
    with new_file(folder / WEIGHTS_FILE, replace=True) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    write_text(folder / CONFIG_FILE, json.dumps({**config, "engram": block}, indent=1) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config of a site's folder."""
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return config


def read_site(folder: Path) -> tuple[EngramConfig, TrainableSite, NgramKeyer]:
    """Read a site's projections and its hash, not its rows.

    Raises:
        CheckpointError: a config that is malformed.
    """
    config = EngramConfig.from_dict(read_config(folder)["engram"])
    tensors = load_file(folder / WEIGHTS_FILE)
    value = tensors["engram.value_proj.weight"]
    site = TrainableSite(hidden_size=value.shape[0], width=value.shape[1], output_scale=config.output_scale)
    names = {"key_proj": "key_proj.weight", "value_proj": "value_proj.weight", "query_norm": "query_norm.weight"}
    named = {**names, "gate_bias": "gate_bias"}
    site.load_state_dict({name: tensors[f"engram.{tensor}"].float() for name, tensor in named.items()})
    token_map = tensors["engram.token_map"].numpy()
    return config, site, config.keyer.keyer(len(token_map), token_map.astype(np.int64))


def read_rows(folder: Path) -> Rows:
    """Return the rows ``[N, d]`` of a site's own table."""
    tensors = load_file(folder / WEIGHTS_FILE)
    return read_int4(tensors["engram.table.rows"].numpy(), tensors["engram.table.scales"].numpy())


def read_int4(packed: NDArray[np.uint8], scales: NDArray[np.float16]) -> Rows:
    """Return the rows ``[N, d]`` of what `int4_rows` made."""
    columns = 2 * packed.shape[1]
    record = RecordFormat(payload="int4", columns=columns, scale="float16", scale_columns=columns)
    return record.decode(np.hstack([packed, scales[:, None].view(np.uint8)]))


def write_cartridge(path: Path, config: EngramConfig, keyer: NgramKeyer, rows: Rows, *, replace: bool) -> int:
    """Write rows ``[N, d]`` as an overlay that stands for a whole table; returns how many aren't zero.

    Raises:
        RequestError: there is a file already, or no folder for it.
    """
    row_ids = np.flatnonzero(rows.any(axis=1))
    packed, scales = int4_rows(rows[row_ids])
    record = RecordFormat(payload="int4", columns=rows.shape[1], scale="float16", scale_columns=rows.shape[1])
    token_map = np.asarray(keyer.token_map, dtype="<i4").tobytes()
    spec = OverlaySpec(
        site=config.site,
        num_rows=len(rows),
        record=record,
        keyer_sha256=constants_digest(config.keyer, [token_map]),
        others=ZERO,
    )
    write_overlay(path, spec, row_ids, np.hstack([packed, scales[:, None].view(np.uint8)]), replace=replace)
    return len(row_ids)


def token_map_of(tokenizer: Any) -> NDArray[np.int32]:
    """Return ``[V]``: raw id -> compressed id of a fast tokenizer of transformers."""
    return compress_vocabulary(tokenizer.backend_tokenizer.to_str().encode())
