"""The ``engram`` block of a checkpoint's config: a site of the paper's Engram memory as data.

Mandatory: ``layer_ids`` (one, 0-based), ``ngram_orders``, ``num_hash_heads``, ``row_dim``, ``num_rows``, ``gate``
(two norm eps and the floor of the signed root) and ``hash`` (multipliers, primes, offsets, pad id, frozen).
Optional: ``conv`` (kernel, dilation, norm eps), the gate's ``bias``, ``output_scale``, the hash's ``token_map``.
Norm gains are there when their tensors are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from engram_runtime.errors import CheckpointError
from engram_runtime.hashing import derive_multipliers
from engram_runtime.manifest import KeyerSpec

KNOWN_KEYS = {
    "": {
        "layer_ids", "layer_index_base", "ngram_orders", "num_hash_heads", "row_dim", "hash", "num_rows", "gate",
        "output_scale", "conv", "row_dtype",
    },
    "hash": {
        "kind", "multipliers", "primes", "offsets", "seed_layer", "seed", "pad_id", "token_map",
        "compressed_vocab_size",
    },
    "gate": {"query_norm_eps", "key_norm_eps", "signed_root_floor", "bias"},
    "conv": {"kernel", "dilation", "norm_eps"},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvConfig:
    """The causal depthwise convolution after the gate."""

    kernel: int
    dilation: int
    norm_eps: float

    @property
    def window(self) -> int:
        """Earlier steps the convolution looks at."""
        return (self.kernel - 1) * self.dilation


@dataclass(frozen=True, slots=True, kw_only=True)
class EngramConfig:
    """One site."""

    layer_id: int
    num_columns: int
    row_dim: int
    num_rows: int
    query_norm_eps: float
    key_norm_eps: float
    signed_root_floor: float
    gate_bias: str | None
    output_scale: float
    conv: ConvConfig | None
    token_map: str | None
    compressed_vocab_size: int | None
    keyer: KeyerSpec

    @property
    def site(self) -> str:
        """The site's name in the bundle."""
        return f"layer_{self.layer_id}"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Parse the block; raises CheckpointError naming the key."""
        for part, known in KNOWN_KEYS.items():
            _refuse_unknown(part, raw.get(part) if part else raw, known)
        try:
            return cls._from_known(raw)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the engram block of the config is incomplete or malformed: {error!r}") from error

    @classmethod
    def _from_known(cls, raw: Mapping[str, Any]) -> Self:
        gate, conv, hashing = raw["gate"], raw.get("conv"), raw["hash"]
        (layer_id,) = raw["layer_ids"]
        config = cls(
            layer_id=layer_id - raw.get("layer_index_base", 0),
            num_columns=len(raw["ngram_orders"]) * raw["num_hash_heads"],
            row_dim=raw["row_dim"],
            num_rows=raw["num_rows"],
            query_norm_eps=float(gate["query_norm_eps"]),
            key_norm_eps=float(gate["key_norm_eps"]),
            signed_root_floor=float(gate["signed_root_floor"]),
            gate_bias=gate.get("bias"),
            output_scale=float(raw.get("output_scale", 1.0)),
            conv=None if conv is None else ConvConfig(**conv),
            token_map=hashing.get("token_map"),
            compressed_vocab_size=hashing.get("compressed_vocab_size"),
            keyer=_keyer(raw, hashing),
        )
        config.keyer.check()
        _check_seed(config, hashing)
        return config


def _keyer(raw: Mapping[str, Any], hashing: Mapping[str, Any]) -> KeyerSpec:
    return KeyerSpec(
        kind=hashing["kind"],
        orders=tuple(raw["ngram_orders"]),
        num_heads=raw["num_hash_heads"],
        multipliers=tuple(hashing["multipliers"]),
        primes=tuple(hashing["primes"]),
        offsets=tuple(hashing["offsets"]),
        pad_id=hashing["pad_id"],
        token_map=None,
    )


def _check_seed(config: EngramConfig, hashing: Mapping[str, Any]) -> None:
    """Hold frozen multipliers against the seed they are said to come from: a mismatch is another model."""
    if "seed" not in hashing or "compressed_vocab_size" not in hashing:
        return
    derived = derive_multipliers(
        vocab_size=hashing["compressed_vocab_size"],
        max_order=max(config.keyer.orders),
        layer_id=hashing.get("seed_layer", config.layer_id),
        seed=hashing["seed"],
    )
    if tuple(derived.tolist()) != config.keyer.multipliers:
        raise CheckpointError(
            f"engram multipliers are {list(config.keyer.multipliers)}, seed {hashing['seed']} and a vocabulary of "
            f"{hashing['compressed_vocab_size']} give {derived.tolist()}; config and checkpoint don't belong together"
        )


def _refuse_unknown(part: str, values: object, known: set[str]) -> None:
    if values is None:
        return
    if not isinstance(values, Mapping):
        raise CheckpointError(f"the engram block has {values!r:.80} as {part or 'its top level'}, expected an object")
    if unknown := sorted(values.keys() - known):
        raise CheckpointError(f"the engram block has unknown keys {unknown} in {part or 'its top level'}")
