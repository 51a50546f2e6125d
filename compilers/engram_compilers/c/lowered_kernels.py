"""Lower kernels as far as C needs it."""

from collections.abc import Mapping

import tvm
from tvm import s_tir, tirx


def lowered_kernels(kernels: Mapping[str, tirx.PrimFunc]) -> dict[str, tirx.PrimFunc]:
    """Return kernels whose buffers are flat, with what LLVM's code generator would be given for its own operators.

    These are the passes of TVM's pipeline for a library's kernels up to the entry of its calling convention, those that
    matter without threads of a GPU.
    """
    passes = [
        tirx.transform.BindTarget(tvm.target.Target({"kind": "llvm"}, host={"kind": "llvm"})),
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.LowerIntrin(),
    ]
    named = tvm.IRModule({name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()})
    module = tvm.transform.Sequential(passes)(named)
    return {name: module[name] for name in kernels}
