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


class PackedWeights:
    """Packs weights as kernels ask for them and writes them out at once; every forward pass shares the file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self.tensors: dict[str, PackedTensor] = {}
        self._parts: dict[str, list[str]] = {}

    def tensors_of(self, name: str, pack: Pack) -> list[PackedTensor]:
        """Return the packed tensors of a weight, calling ``pack`` the first time it is asked for."""
        if name not in self._parts:
            self._parts[name] = [self._append(f"{name}:{part}", array) for part, array in pack().items()]
        return [self.tensors[part] for part in self._parts[name]]

    @property
    def bytes(self) -> int:
        """Size of the file so far."""
        return self._file.tell()

    def _append(self, name: str, array: NDArray[Any]) -> str:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT_BYTES))
        self.tensors[name] = PackedTensor(
            name=name, dtype=array.dtype.name, shape=array.shape, offset=self._file.tell()
        )
        self._file.write(np.ascontiguousarray(array).data)
        return name

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

    def _variable(self, tensor: PackedTensor) -> relax.Var:
        if tensor.name not in self.variables:
            name = tensor.name.replace(".", "_").replace(":", "_")
            self.variables[tensor.name] = relax.Var(name, relax.TensorType(tensor.shape, tensor.dtype))
        return self.variables[tensor.name]
