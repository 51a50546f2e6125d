"""The packed weight file of a target: each weight once, in the layout its kernel reads, 64-byte aligned."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from engram_runtime.executor import ALIGNMENT_BYTES
from engram_runtime.library import PackedTensor

Pack = Callable[[], Mapping[str, NDArray[Any]]]
PackSlice = Callable[[int], Mapping[str, NDArray[Any]]]


class PackedWeights:
    """Packs weights as kernels ask for them and writes them out at once; every forward pass shares the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._end = 0
        self.tensors: dict[str, PackedTensor] = {}
        self._parts: dict[str, list[str]] = {}

    def tensors_of(self, name: str, pack: Pack) -> list[PackedTensor]:
        """Return the packed tensors of a weight, calling ``pack`` the first time it is asked for."""
        if name not in self._parts:
            self._parts[name] = [self._append(f"{name}:{part}", array) for part, array in pack().items()]
        return [self.tensors[part] for part in self._parts[name]]

    def tensors_of_slices(self, name: str, count: int, pack_slice: PackSlice) -> list[PackedTensor]:
        """As `tensors_of`, for a weight too large to be packed at once: ``count`` slices that follow one another."""
        if name not in self._parts:
            self._parts[name] = self._append_slices(name, count, pack_slice)
        return [self.tensors[part] for part in self._parts[name]]

    def copy(self, tensor: PackedTensor, array: NDArray[Any]) -> None:
        """Append a tensor that is packed already."""
        self._append(tensor.name, array)

    @property
    def bytes(self) -> int:
        """Size of the file so far."""
        return self._end

    def bytes_of(self, name: str) -> int:
        """Return the size of a weight's packed tensors."""
        return sum(self.tensors[part].end - self.tensors[part].offset for part in self._parts[name])

    def _append(self, name: str, array: NDArray[Any]) -> str:
        self._file.seek(self._place(name, array.dtype.name, array.shape).offset)
        self._file.write(np.ascontiguousarray(array).data)
        return name

    def _append_slices(self, name: str, count: int, pack_slice: PackSlice) -> list[str]:
        first = pack_slice(0)
        parts = {f"{name}:{part}": array for part, array in first.items()}
        for part, array in parts.items():
            self._place(part, array.dtype.name, (count * array.shape[0], *array.shape[1:]))
        for index in range(count):
            arrays = pack_slice(index) if index else first
            for part, array in zip(parts, arrays.values(), strict=True):
                self._file.seek(self.tensors[part].offset + index * array.nbytes)
                self._file.write(np.ascontiguousarray(array).data)
        return list(parts)

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> PackedTensor:
        """Give a tensor its place after all others; returns it with nothing written yet."""
        offset = -(-self._end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        tensor = PackedTensor(name=name, dtype=dtype, shape=shape, offset=offset)
        self.tensors[name] = tensor
        self._end = tensor.end
        return tensor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


class WeightArguments:
    """The packed weights one forward pass takes as arguments, in order of first use."""

    def __init__(self, packed: PackedWeights) -> None:
        self._packed = packed
        self.variables: dict[str, relax.Var] = {}

    def of(self, name: str, pack: Pack) -> list[relax.Var]:
        """Return the arguments for a weight."""
        return [self._variable(tensor) for tensor in self._packed.tensors_of(name, pack)]

    def of_slices(self, name: str, count: int, pack_slice: PackSlice) -> list[relax.Var]:
        """Return the arguments for a weight of ``count`` slices."""
        return [self._variable(tensor) for tensor in self._packed.tensors_of_slices(name, count, pack_slice)]

    def bytes_of(self, name: str) -> int:
        """Return the packed size of a weight that is an argument."""
        return self._packed.bytes_of(name)

    def _variable(self, tensor: PackedTensor) -> relax.Var:
        if tensor.name not in self.variables:
            name = tensor.name.replace(".", "_").replace(":", "_")
            self.variables[tensor.name] = relax.Var(name, relax.TensorType(tensor.shape, tensor.dtype))
        return self.variables[tensor.name]
