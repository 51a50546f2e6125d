# mypy: disable-error-code="valid-type, untyped-decorator"
"""Copy one buffer over another."""

from tvm import tirx
from tvm.script import tirx as T


def copy(rows: int, columns: int) -> tirx.PrimFunc:
    """Build ``(target f32 [M, D], source f32 [M, D])``; target is changed in place, so call it by call_tir_inplace."""

    @T.prim_func(s_tir=True, private=True)
    def kernel(
        target: T.Buffer((rows, columns), "float32"),
        source: T.Buffer((rows, columns), "float32"),
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True})
        with T.sblock("root"):
            for row in T.serial(rows):
                for column in T.serial(columns):
                    target[row, column] = source[row, column]

    return kernel
