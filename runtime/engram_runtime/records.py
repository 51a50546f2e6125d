"""Record formats of a host table: one row as bytes, and how bytes become float32 values."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import BundleError
from engram_runtime.strict_json import Fields

PAYLOAD_BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3": 8, "int8": 8, "int4": 4}
SCALE_BYTES = {"none": 0, "float16": 2, "float32": 4, "e8m0": 1}
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
PayloadDecoder = Callable[[NDArray[np.uint8], NDArray[np.float32]], None]  # bytes [N, B] into out [N, columns]
NO_FACTOR = "0x1.0000000000000p+0"  # one, as `float.hex` spells it


def _float8_e4m3_values() -> NDArray[np.float32]:
    """Return ``[256]`` values of FP8 E4M3FN (OCP OFP8 1.0): bias 7, no infinity, NaN where all lower bits are set."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude: NDArray[np.float64] = np.ldexp(mantissa + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    magnitude[bits & 127 == 127] = np.nan
    magnitude[bits > 127] *= -1
    return magnitude.astype(np.float32)


def _e8m0_values() -> NDArray[np.float32]:
    """Return ``[256]`` values of E8M0 (OCP MX 1.0): powers of two from 2**-127, the last one NaN."""
    values: NDArray[np.float64] = np.ldexp(1.0, np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


def _int4_pairs() -> NDArray[np.float32]:
    """Return ``[256, 2]`` values of a byte's two's complement halves, the low one first as in ONNX."""
    low = np.arange(256) % 16
    signed = np.where(low > 7, low - 16, low).astype(np.float32)
    return np.stack([signed, signed[np.arange(256) // 16]], axis=1)


@functools.cache
def _float8_e4m3_pairs() -> NDArray[np.uint64]:
    """Return ``[65536]`` pairs of float32 values, the one of the lower byte first."""
    low, high = np.meshgrid(FLOAT8_E4M3_VALUES, FLOAT8_E4M3_VALUES)
    return np.stack([low, high], axis=-1).view(np.uint64).ravel()


FLOAT8_E4M3_VALUES = _float8_e4m3_values()
E8M0_VALUES = _e8m0_values()
INT4_PAIRS = _int4_pairs()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFormat:
    """One row: ``columns`` payload values, then the scales; value = payload * scale * factor.

    Attributes:
        payload: dtype of the values, one of `PAYLOAD_BITS`.
        scale: dtype of the scales, one of `SCALE_BYTES`.
        scale_columns: how many columns share a scale; all of them where there is none.
        factor: one float32 for the whole table, spelt as `float.hex` does, so that a manifest holds no floats.
    """

    payload: str
    columns: int
    scale: str
    scale_columns: int
    factor: str = NO_FACTOR

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        """Parse; raises BundleError for a format this runtime can't decode."""
        record = cls(
            payload=fields.take("payload", str),
            columns=fields.count("columns"),
            scale=fields.take("scale", str),
            scale_columns=fields.count("scale_columns"),
            factor=fields.take("factor", str),
        )
        fields.finish()
        return record

    def __post_init__(self) -> None:
        """Refuse a format this runtime can't decode."""
        if self.payload not in PAYLOAD_BITS or self.scale not in SCALE_BYTES:
            raise BundleError(
                f"record of {self.payload} with scale {self.scale} is unknown; "
                f"payloads are {sorted(PAYLOAD_BITS)}, scales {sorted(SCALE_BYTES)}"
            )
        if self.columns < 1:
            raise BundleError(f"record has {self.columns} columns, expected at least 1")
        if self.columns * PAYLOAD_BITS[self.payload] % 8:
            raise BundleError(f"record has {self.columns} columns of {self.payload}, expected an even number")
        self._check_scale_columns()
        if not _is_factor(self.factor):
            raise BundleError(f"record factor is {self.factor!r}, expected a positive float32 spelt like {NO_FACTOR}")

    def _check_scale_columns(self) -> None:
        if self.scale == "none" and self.scale_columns != self.columns:
            raise BundleError(f"record without scales has scale_columns {self.scale_columns}, expected {self.columns}")
        if self.scale_columns < 1 or self.columns % self.scale_columns:
            raise BundleError(f"record has scale_columns {self.scale_columns}, expected a divisor of {self.columns}")

    @property
    def payload_bytes(self) -> int:
        """Bytes of the values of one row."""
        return self.columns * PAYLOAD_BITS[self.payload] // 8

    @property
    def num_scales(self) -> int:
        """Scales of one row."""
        return 0 if self.scale == "none" else self.columns // self.scale_columns

    @property
    def record_bytes(self) -> int:
        """Bytes of one row, scales included."""
        return self.payload_bytes + self.num_scales * SCALE_BYTES[self.scale]

    def decode(self, records: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Turn ``[N, record_bytes]`` bytes into ``[N, columns]`` float32, a fresh array."""
        values = np.empty((len(records), self.columns), dtype=np.float32)
        self.decode_into(records, values)
        return values

    def decode_into(self, records: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Fill ``out [N, columns]``, contiguous, with the values of ``[N, record_bytes]`` bytes."""
        with np.errstate(over="ignore", invalid="ignore"):  # a table may hold any bytes, those of inf and nan as well
            PAYLOAD_DECODERS[self.payload](records[:, : self.payload_bytes], out)
            if self.num_scales:
                groups = out.reshape(len(out), self.num_scales, self.scale_columns)
                groups *= scale_values(np.ascontiguousarray(records[:, self.payload_bytes :]), self.scale)[:, :, None]
            if self.factor != NO_FACTOR:
                out *= np.float32(float.fromhex(self.factor))


def scale_values(scales: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Turn the bytes ``[N, bytes]`` of scales into ``[N, scales]`` float32, a fresh array."""
    return E8M0_VALUES.take(scales) if dtype == "e8m0" else scales.view(dtype).astype(np.float32)


def _convert(dtype: str) -> PayloadDecoder:
    return lambda payload, out: np.copyto(out, payload.view(dtype))


def _widen_bfloat16(payload: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    np.left_shift(payload.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def _look_up_float8_e4m3(payload: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    if payload.shape[1] % 2:
        FLOAT8_E4M3_VALUES.take(payload, out=out, mode="clip")
    else:  # two at a time take two thirds of the time
        _float8_e4m3_pairs().take(payload.view(np.uint16), out=out.view(np.uint64), mode="clip")


def _look_up_int4(payload: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    INT4_PAIRS.view(np.uint64)[:, 0].take(payload, out=out.view(np.uint64), mode="clip")


PAYLOAD_DECODERS: dict[str, PayloadDecoder] = {
    "float32": _convert("float32"),
    "float16": _convert("float16"),
    "bfloat16": _widen_bfloat16,
    "float8_e4m3": _look_up_float8_e4m3,
    "int8": _convert("int8"),
    "int4": _look_up_int4,
}


def _is_factor(text: str) -> bool:
    """Whether a text is a positive finite float32 in the one spelling of `float.hex`."""
    try:
        value = float.fromhex(text)
    except (ValueError, OverflowError):
        return False
    return 0 < value <= LARGEST_FLOAT32 and float(np.float32(value)) == value and value.hex() == text
