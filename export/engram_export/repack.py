"""Rows of a host table quantised anew: one row at a time, so that a table of any size can be streamed."""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import CheckpointError
from engram_runtime.records import RecordFormat

PAYLOADS = {"int8": "int8", "int4": "int4", "fp8": "float8_e4m3"}
INT4_GROUPS = (32, 16)  # columns that share a scale, the first that divides the row
INT8_LARGEST, INT4_LARGEST, FLOAT8_LARGEST = 127, 7, 448
# Where the value of largest magnitude falls on the scale of int4, -8 to 7: beyond the ends a few large values are
# clipped for finer steps of all the others.
INT4_PEAKS = (7.0, -8.0, 7.5, -8.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowErrors:
    """Relative errors of rows, |x - x'| / |x| in the Euclidean norm; rows of zeros count as exact."""

    num_rows: int
    mean: float
    max: float

    @staticmethod
    def of(values: NDArray[np.float32], repacked: NDArray[np.float32]) -> "RowErrors":
        """Compare ``[N, columns]`` rows."""
        norms = _norms(values)
        errors = _norms(values - repacked) / np.where(norms == 0, 1, norms)
        return RowErrors(num_rows=len(errors), mean=float(errors.mean()), max=float(errors.max()))

    def __add__(self, other: "RowErrors") -> "RowErrors":
        """Return the errors of both sets of rows."""
        total = self.num_rows + other.num_rows
        mean = (self.mean * self.num_rows + other.mean * other.num_rows) / total
        return RowErrors(num_rows=total, mean=mean, max=max(self.max, other.max))


def _norms(values: NDArray[np.float32]) -> NDArray[np.float64]:
    squares: NDArray[np.float32] = np.einsum("nc,nc->n", values, values)
    return np.sqrt(squares.astype(np.float64))


def repacked_format(columns: int, dtype: str) -> RecordFormat:
    """Return the record format of rows repacked as ``int8``, ``int4`` or ``fp8``.

    Raises:
        CheckpointError: rows whose width int4 can't share scales over.
    """
    scale_columns = columns
    if dtype == "int4":
        fitting = [group for group in INT4_GROUPS if columns % group == 0]
        if not fitting:
            raise CheckpointError(f"rows of {columns} columns can't be int4, it takes multiples of 16; use int8 or fp8")
        scale_columns = fitting[0]
    return RecordFormat(payload=PAYLOADS[dtype], columns=columns, scale="float16", scale_columns=scale_columns)


def encode_rows(values: NDArray[np.float32], record: RecordFormat) -> NDArray[np.uint8]:
    """Quantise ``[N, columns]`` finite rows into records ``[N, record_bytes]`` of a format of `repacked_format`."""
    groups = values.reshape(len(values), record.num_scales, record.scale_columns)
    payload, scales = ENCODERS[record.payload](groups)
    parts = [payload.reshape(len(values), record.payload_bytes), scales.view(np.uint8)]
    return np.concatenate(parts, axis=1)


def check_rows(values: NDArray[np.float32], first_row: int) -> None:
    """Refuse rows ``[N, columns]`` that float16 scales can't hold, NaN included.

    Raises:
        CheckpointError: naming the row.
    """
    limit = float(np.finfo(np.float16).max)  # of a scale, so of values this is cautious
    bad = ~(np.abs(values) <= limit).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        largest = np.abs(values[row]).max()
        if np.isfinite(largest):
            wrong = f"magnitude {largest}, at most {limit:.0f} can be repacked; use --tables copy"
        else:
            wrong = f"{largest}, which isn't finite; download the checkpoint again"
        raise CheckpointError(f"row {first_row + row} of the table has a value of {wrong}")


Encoded = tuple[NDArray[np.uint8], NDArray[np.float16]]  # payload [N, groups, bytes], scales [N, groups]


def _encode_int8(groups: NDArray[np.float32]) -> Encoded:
    scales = _scales(np.abs(groups).max(axis=2), INT8_LARGEST)
    codes = np.rint(_divided(groups, scales)).clip(-INT8_LARGEST, INT8_LARGEST)
    return codes.astype(np.int8).view(np.uint8), scales


def _encode_float8(groups: NDArray[np.float32]) -> Encoded:
    scales = _scales(np.abs(groups).max(axis=2), FLOAT8_LARGEST)
    codes = _divided(groups, scales).clip(-FLOAT8_LARGEST, FLOAT8_LARGEST)
    return codes.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), scales


def _encode_int4(groups: NDArray[np.float32]) -> Encoded:
    """Try each of `INT4_PEAKS` and keep, group by group, the one with the least square error."""
    peaks = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)[:, :, 0]
    best_codes, best_scales = _int4_codes(groups, peaks, INT4_PEAKS[0])
    least = _square_error(groups, best_codes, best_scales)
    for place in INT4_PEAKS[1:]:
        codes, scales = _int4_codes(groups, peaks, place)
        error = _square_error(groups, codes, scales)
        better = error < least
        best_codes[better], best_scales[better], least[better] = codes[better], scales[better], error[better]
    halves = best_codes.astype(np.int8).view(np.uint8) & np.uint8(15)
    return halves[:, :, 0::2] | halves[:, :, 1::2] << np.uint8(4), best_scales


def _int4_codes(
    groups: NDArray[np.float32], peaks: NDArray[np.float32], place: float
) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    scales = _scales(peaks, place)
    return np.rint(_divided(groups, scales)).clip(-INT4_LARGEST - 1, INT4_LARGEST), scales


def _square_error(
    groups: NDArray[np.float32], codes: NDArray[np.float32], scales: NDArray[np.float16]
) -> NDArray[np.float32]:
    difference = groups - codes * scales.astype(np.float32)[:, :, None]
    error: NDArray[np.float32] = np.einsum("ngc,ngc->ng", difference, difference)
    return error


def _scales(peaks: NDArray[np.float32], place: float) -> NDArray[np.float16]:
    return (peaks / np.float32(place)).astype(np.float16)


def _divided(groups: NDArray[np.float32], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """Divide groups by their scales; where a scale is zero, so are the values, to float16."""
    wide = scales.astype(np.float32)[:, :, None]
    return np.divide(groups, wide, out=np.zeros_like(groups), where=wide != 0)


ENCODERS: dict[str, Callable[[NDArray[np.float32]], Encoded]] = {
    "int8": _encode_int8,
    "int4": _encode_int4,
    "float8_e4m3": _encode_float8,
}
