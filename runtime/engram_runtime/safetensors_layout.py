"""What a safetensors file begins with, for writers that add the tensors one after another."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np

SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8", "int32": "I32", "int64": "I64"}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """The bytes before the data, and where in the file each tensor begins, in the order of the file."""

    header: bytes
    offsets: Mapping[str, int]

    @classmethod
    def of(cls, plans: Sequence[TensorPlan], *, alignment: int = 8, metadata: Mapping[str, str] | None = None) -> Self:
        """Lay tensors out one after another from a multiple of ``alignment`` on.

        Args:
            metadata: texts by name, which stand in the header.
        """
        # Wider types first: every tensor then starts at a multiple of its item size without gaps, which are illegal.
        header: dict[str, Any] = {}
        end = 0
        for plan in sorted(plans, key=lambda plan: -np.dtype(plan.dtype).itemsize):
            header[plan.name] = {
                "dtype": SAFETENSORS_DTYPES[plan.dtype],
                "shape": list(plan.shape),
                "data_offsets": [end, end + plan.bytes],
            }
            end += plan.bytes
        text = json.dumps({"__metadata__": dict(metadata), **header} if metadata else header).encode()
        text += b" " * (-(len(text) + 8) % alignment)
        start = len(text) + 8
        offsets = {name: start + int(entry["data_offsets"][0]) for name, entry in header.items()}
        return cls(len(text).to_bytes(8, "little") + text, offsets)
