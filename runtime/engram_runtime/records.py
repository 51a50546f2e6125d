"""Record formats of a host table: one row as bytes, and how bytes become float32 values."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import BundleError

PAYLOAD_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
SCALE_BYTES = {"none": 0, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFormat:
    """One row: ``columns`` payload values, then one scale for the row unless ``scale`` is "none"."""

    payload: str
    columns: int
    scale: str

    def __post_init__(self) -> None:
        """Refuse a format this runtime can't decode."""
        if self.payload not in PAYLOAD_BYTES or self.scale not in SCALE_BYTES:
            raise BundleError(
                f"record of {self.payload} with scale {self.scale} is unknown; "
                f"payloads are {sorted(PAYLOAD_BYTES)}, scales {sorted(SCALE_BYTES)}"
            )
        if self.columns < 1:
            raise BundleError(f"record has {self.columns} columns, expected at least 1")

    @property
    def payload_bytes(self) -> int:
        """Bytes of the values of one row."""
        return PAYLOAD_BYTES[self.payload] * self.columns

    @property
    def record_bytes(self) -> int:
        """Bytes of one row, scale included."""
        return self.payload_bytes + SCALE_BYTES[self.scale]

    def decode(self, records: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn ``[N, record_bytes]`` bytes into ``[N, columns]`` float32, a fresh array."""
        payload = np.ascontiguousarray(records[:, : self.payload_bytes])
        values = _decode_payload(payload, self.payload)
        if self.scale == "none":
            return values
        scales = np.ascontiguousarray(records[:, self.payload_bytes :]).view(self.scale)
        return values * scales.astype(np.float32)


def _decode_payload(payload: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "bfloat16":
        return (payload.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return payload.view(dtype).astype(np.float32)
