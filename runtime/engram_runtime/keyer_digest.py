"""What tells keyers apart: row ids of one keyer mean nothing to a table of another."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable

from engram_runtime.bundle import Bundle
from engram_runtime.keyer_spec import KeyerSpec


def keyer_digest(bundle: Bundle, spec: KeyerSpec) -> str:
    """Return the SHA-256, in hex, of a keyer's constants and of its token map, wherever the bundle keeps that."""
    return constants_digest(spec, (bundle.file(file).read_bytes() for file in spec.files))


def constants_digest(spec: KeyerSpec, maps: Iterable[bytes]) -> str:
    """Return `keyer_digest` without a bundle.

    The constants are hashed as JSON with sorted keys, no spaces and without ``token_map``; the bytes of the map follow.

    Args:
        maps: the token map's bytes, little-endian int32, where there is one.
    """
    constants = dataclasses.asdict(spec)
    constants.pop("token_map", None)
    digest = hashlib.sha256(json.dumps(constants, sort_keys=True, separators=(",", ":")).encode())
    for data in maps:
        digest.update(data)
    return digest.hexdigest()
