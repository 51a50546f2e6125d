# mypy: disable-error-code="valid-type, untyped-decorator"
"""A model as C computes the bits of the compiled library's portable kernels."""

from pathlib import Path

import pytest
from tests.c_runner import CExecutor, needs_gcc
from tests.test_compile import assert_same_bits
from tests.test_program import EVERY_MODEL, MODELS, PASSES, TOKENS, library_of, program_logits
from tests.workshop import Workshop, bundle_logits, random_ids
from tvm import tirx
from tvm.script import tirx as T

from engram_compilers.c.kernel_printer import STACK_BYTES, PrintedKernel, print_kernel
from engram_compilers.c.lowered_kernels import lowered_kernels
from engram_compilers.c.model import emit_model
from engram_compilers.c.program_printer import ModelLayout, print_program
from engram_compilers.c.vector_helpers import Helpers
from engram_compilers.program import KernelCall, Program, Tensor, Weight
from engram_runtime.errors import CompileError
from engram_runtime.library import PackedTensor


@needs_gcc
@pytest.mark.parametrize("name", EVERY_MODEL)
def test_c_gives_the_bits_of_the_library(workshop: Workshop, name: str, tmp_path: Path) -> None:
    bundle = MODELS[name](workshop)
    ids = random_ids(TOKENS)
    executor = CExecutor(bundle, tmp_path, PASSES, "-O1")
    assert_same_bits(program_logits(bundle, executor, ids), bundle_logits(library_of(workshop, bundle), ids, "tvm"))


def test_the_same_bundle_gives_the_same_sources(workshop: Workshop, tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        emit_model(workshop.uncompiled(), [(1, 1)], folder)
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two
    assert sorted(one) == ["model.c", "model.h", "weights.bin"]


def test_caches_of_float16_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(CompileError) as error:
        emit_model(workshop.uncompiled(), [(1, 1)], tmp_path, cache_dtype="float16")
    assert str(error.value) == ("cache_dtype is float16, C sources keep caches in float32; change it in the profile")


def test_no_name_of_a_weight_ends_the_comment_it_stands_in() -> None:
    weight = PackedTensor(name="layers.0*/ int injected; /*\n#error:weight", dtype="float32", shape=(4,), offset=0)
    call = KernelCall("norm", (Tensor("float32", (4,), Weight(0)),))
    program = Program(name="forward_1_1", calls=(call,), inputs=(), outputs=(), scratch_bytes=0)
    kernels = {"norm": PrintedKernel("kernel_norm", ("const float *",), 0, "")}
    made = print_program(program, kernels, ModelLayout(weights=[weight], states={}, sites=[]))
    assert "kernel_norm((const float *)(weights + 0));  /* layers.0_/_int_injected__/___error */\n" in made.text


def printed(kernel: tirx.PrimFunc) -> PrintedKernel:
    return print_kernel("drawn", lowered_kernels({"drawn": kernel})["drawn"], Helpers())


def test_numbers_that_c_lacks_are_refused() -> None:
    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((4,), "float16"), y: T.Buffer((4,), "float16")) -> None:
        with T.sblock("root"):
            for i in T.serial(4):
                y[i] = x[i]

    with pytest.raises(CompileError) as error:
        printed(kernel)
    assert str(error.value) == "kernels have float16, which isn't written as C; there are int8 to int64 and float32"


def test_intrinsics_of_one_machine_are_refused() -> None:
    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((4,), "int32"), y: T.Buffer((4,), "int32")) -> None:
        with T.sblock("root"):
            for i in T.serial(4):
                y[i] = T.call_llvm_pure_intrin("int32", "llvm.ctlz.i32", x[i], T.bool(False))

    with pytest.raises(CompileError) as error:
        printed(kernel)
    assert str(error.value) == (
        'kernel drawn has T.call_llvm_pure_intrin("int32", "llvm.ctlz", x[i], T.bool(False)), which isn\'t written as C'
    )


def test_large_buffers_lie_in_memory_of_the_caller() -> None:
    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((8192,), "float32"), y: T.Buffer((8192,), "float32")) -> None:
        with T.sblock("root"):
            copy = T.alloc_buffer((8192,), "float32")
            for i in T.serial(8192):
                copy[i] = x[8191 - i]
            for i in T.serial(8192):
                y[i] = copy[8191 - i]

    made = printed(kernel)
    assert made.workspace_bytes == 8192 * 4 > STACK_BYTES
    assert made.parameters == ("const float *", "float *")
    assert "float *const copy = (float *)(workspace + 0);" in made.text
