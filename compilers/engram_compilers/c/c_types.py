"""C types of the numbers and vectors of kernels."""

import re
from dataclasses import dataclass, replace
from typing import Any, Self

from engram_runtime.errors import CompileError

_DTYPE = re.compile(r"(bool|float|int|uint)(\d*)(?:x(\d+))?")
_LETTERS = {"float": "f", "int": "i", "uint": "u", "bool": "b"}
_SCALARS = {"f32": "float"} | {
    f"{letter}{bits}": f"{name}{bits}_t" for letter, name in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True, slots=True)
class CType:
    """A number, or a vector of them; ``b`` is a truth value, as a vector -1 or 0 in the width of what was compared."""

    letter: str
    bits: int
    lanes: int = 1

    @classmethod
    def of(cls, dtype: Any) -> Self:
        """Return the type of a dtype of TVM.

        Raises:
            CompileError: C has no such type everywhere.
        """
        match = _DTYPE.fullmatch(str(dtype))
        if match is None:
            raise CompileError(f"kernels have {dtype}, which isn't written as C; there are int8 to int64 and float32")
        made = cls(_LETTERS[match[1]], int(match[2] or 32), int(match[3] or 1))
        if made.letter != "b" and f"{made.letter}{made.bits}" not in _SCALARS:
            raise CompileError(f"kernels have {dtype}, which isn't written as C; there are int8 to int64 and float32")
        return made

    @property
    def name(self) -> str:
        """The type's name in C; vectors are defined by `vector_helpers.Helpers`."""
        if self.lanes > 1:
            return f"{self.mask_letter}{self.bits}x{self.lanes}"
        return "int" if self.letter == "b" else _SCALARS[f"{self.letter}{self.bits}"]

    @property
    def mask_letter(self) -> str:
        """The letter of the elements that C has: truth values of vectors are signed integers."""
        return "i" if self.letter == "b" else self.letter

    @property
    def element(self) -> "CType":
        return replace(self, lanes=1)

    @property
    def bytes(self) -> int:
        return self.bits // 8 * self.lanes

    def with_letter(self, letter: str) -> "CType":
        """Return the type of as many elements of the same width."""
        return replace(self, letter=letter)
