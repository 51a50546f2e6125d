"""The ``engram`` block of a checkpoint's config: a site of the paper's Engram memory as data.

Mandatory: ``layer_ids`` (one, 0-based), ``ngram_orders``, ``num_hash_heads``, ``row_dim``, ``num_rows``, ``gate``
(two norm eps and the floor of the signed root) and ``hash`` (multipliers, primes, offsets, pad id, frozen).
Optional: ``conv`` (kernel, dilation, norm eps), the gate's ``bias``, ``output_scale``, the hash's ``token_map``,
``barrier_ids`` and ``silent_ids``, which are raw ids; ``row_payload``: ``int4`` where rows are bytes of two values
each, two's complement, low half first.
Norm gains are there when their tensors are.
"""

from dataclasses import dataclass
from typing import Self

from engram_export.host_table import PACKED_PAYLOAD
from engram_runtime.errors import BundleError, CheckpointError
from engram_runtime.hashing import derive_multipliers
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.strict_json import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvConfig:
    """The causal depthwise convolution after the gate."""

    kernel: int
    dilation: int
    norm_eps: float

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse; a kernel of 1 would look at nothing earlier."""
        conv = cls(
            kernel=fields.count("kernel", least=2),
            dilation=fields.count("dilation", least=1),
            norm_eps=fields.number("norm_eps"),
        )
        fields.finish()
        return conv

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
    row_payload: str | None
    keyer: NgramKeyerSpec

    @property
    def site(self) -> str:
        """The site's name in the bundle."""
        return f"layer_{self.layer_id}"

    @classmethod
    def from_dict(cls, raw: object) -> Self:
        """Parse the block; raises CheckpointError naming the key."""
        try:
            return cls._from_fields(Fields(raw, "the engram block"))
        except BundleError as error:
            raise CheckpointError(f"{error}; correct the checkpoint's config") from error

    @classmethod
    def _from_fields(cls, fields: Fields) -> Self:
        gate, hashing = fields.fields("gate"), fields.fields("hash")
        layers = fields.integers("layer_ids")
        if len(layers) != 1:
            raise CheckpointError(f"an engram block is for layers {list(layers)}, expected one; write a block for each")
        base = fields.count("layer_index_base") if fields.given("layer_index_base") else 0
        if layers[0] < base:
            raise CheckpointError(f"the engram block is for layer {layers[0]}, layers are counted from {base}")
        keyer = _keyer(fields, hashing)
        if fields.given("row_dtype"):
            fields.take("row_dtype", str)  # says in words what the table's tensors say themselves
        config = cls(
            layer_id=layers[0] - base,
            num_columns=len(keyer.primes),
            row_dim=fields.count("row_dim", least=1),
            num_rows=fields.count("num_rows", least=1),
            query_norm_eps=gate.number("query_norm_eps"),
            key_norm_eps=gate.number("key_norm_eps"),
            signed_root_floor=gate.number("signed_root_floor"),
            gate_bias=gate.take("bias", str) if gate.given("bias") else None,
            output_scale=fields.number("output_scale") if fields.given("output_scale") else 1.0,
            conv=ConvConfig.from_fields(fields.fields("conv")) if fields.given("conv") else None,
            token_map=hashing.take("token_map", str) if hashing.given("token_map") else None,
            compressed_vocab_size=_optional_count(hashing, "compressed_vocab_size", least=1),
            row_payload=_row_payload(fields),
            keyer=keyer,
        )
        keyer.check()
        _check_seed(config, hashing)
        for part in (fields, gate, hashing):
            part.finish()
        return config


def _keyer(fields: Fields, hashing: Fields) -> NgramKeyerSpec:
    if (kind := hashing.take("kind", str)) != NgramKeyerSpec.KIND:
        raise CheckpointError(f"the engram block has hash kind {kind!r}, supported is {NgramKeyerSpec.KIND!r}")
    return NgramKeyerSpec(
        orders=fields.integers("ngram_orders"),
        num_heads=fields.count("num_hash_heads", least=1),
        multipliers=hashing.integers("multipliers"),
        primes=hashing.integers("primes"),
        offsets=hashing.integers("offsets"),
        pad_id=hashing.count("pad_id"),
        barrier_ids=hashing.integers("barrier_ids") if hashing.given("barrier_ids") else (),
        silent_ids=hashing.integers("silent_ids") if hashing.given("silent_ids") else (),
    )


def _row_payload(fields: Fields) -> str | None:
    if not fields.given("row_payload"):
        return None
    if (payload := fields.take("row_payload", str)) != PACKED_PAYLOAD:
        raise CheckpointError(
            f"the engram block has row_payload {payload!r}, expected {PACKED_PAYLOAD!r}; other rows are known by their "
            f"dtype, leave it out"
        )
    return payload


def _optional_count(fields: Fields, name: str, *, least: int = 0) -> int | None:
    return fields.count(name, least=least) if fields.given(name) else None


def _check_seed(config: EngramConfig, hashing: Fields) -> None:
    """Hold frozen multipliers against the seed they are said to come from: a mismatch is another model."""
    seed, layer_id = _optional_count(hashing, "seed"), _optional_count(hashing, "seed_layer")
    vocab_size = config.compressed_vocab_size
    if seed is None or vocab_size is None:
        return
    derived = derive_multipliers(
        vocab_size=vocab_size,
        max_order=max(config.keyer.orders),
        layer_id=config.layer_id if layer_id is None else layer_id,
        seed=seed,
    )
    if tuple(derived.tolist()) != config.keyer.multipliers:
        raise CheckpointError(
            f"engram multipliers are {list(config.keyer.multipliers)}, seed {seed} and a vocabulary of {vocab_size} "
            f"give {derived.tolist()}; config and checkpoint don't belong together"
        )
