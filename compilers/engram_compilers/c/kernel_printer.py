"""Kernels as C11 with the vectors of GCC and clang.

TVM's own generator of C can't print these kernels: it knows neither vectors of 16 numbers nor LLVM's intrinsics, and
calls TVM's runtime for memory and errors. Loops that a library shares among threads run on one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import tirx

from engram_compilers.c.c_types import CType
from engram_compilers.c.expressions import PRODUCT, SUM, Expressions
from engram_compilers.c.lines import Lines
from engram_compilers.c.memories import Buffers, Memory
from engram_compilers.c.tir_nodes import Node, alike, is_call, whole_vector, within
from engram_compilers.c.vector_helpers import Helpers
from engram_runtime.errors import CompileError
from engram_runtime.executor import ALIGNMENT_BYTES

STACK_BYTES = 16 << 10  # of a kernel's buffers; the others lie in memory of the caller's
WORKSPACE = "workspace"
_KEYWORDS = (
    "auto, break, case, char, const, continue, default, do, double, else, enum, extern, float, for, goto, if, inline, "
    "int, long, register, restrict, return, short, signed, sizeof, static, struct, switch, typedef, union, unsigned, "
    "void, volatile, while"
)


@dataclass(frozen=True, slots=True)
class PrintedKernel:
    """A C function.

    Attributes:
        name: in C.
        parameters: the types of its pointers, ``const`` where it only reads.
        workspace_bytes: memory that it takes as its last argument, if any.
    """

    name: str
    parameters: tuple[str, ...]
    workspace_bytes: int
    text: str


def print_kernel(name: str, kernel: tirx.PrimFunc, helpers: Helpers) -> PrintedKernel:
    """Return a kernel as a static function in C.

    Args:
        kernel: as `lowered_kernels` returns it.
        helpers: gets what the function is written with.

    Raises:
        CompileError: the kernel has something C can't express.
    """
    return _KernelPrinter(name, kernel, helpers).printed()


class _KernelPrinter:
    def __init__(self, name: str, kernel: tirx.PrimFunc, helpers: Helpers) -> None:
        self._name = name
        self._kernel = kernel
        self._helpers = helpers
        self._lines = Lines()
        self._buffers = Buffers(kernel.body)
        allocated = [node.buffer for node in within(kernel.body) if isinstance(node, tirx.AllocBuffer)]
        self._unread = {buffer for buffer in allocated if not self._buffers.is_read(buffer)}
        self._memories: dict[tirx.Var, Memory] = {}
        self._stack_bytes = self._workspace_bytes = 0
        self._expressions = Expressions(name, helpers, self._lines, self._memory)
        for word in (*_words(_KEYWORDS), WORKSPACE):
            self._expressions.unique(word)

    def printed(self) -> PrintedKernel:
        function = identifier(self._name)
        written = {self._buffers.origin(n.buffer) for n in within(self._kernel.body) if isinstance(n, tirx.BufferStore)}
        parameters = []
        for parameter in self._kernel.params:
            memory = Memory(self._expressions.unique(parameter.name), CType.of(parameter.dtype))
            self._memories[parameter] = memory
            parameters.append(f"{'' if parameter in written else 'const '}{memory.element.name} *")
        self._statement(self._kernel.body)
        names = [self._memories[parameter].name for parameter in self._kernel.params]
        declared = [f"{kind}restrict {name}" for kind, name in zip(parameters, names, strict=True)]
        declared += [f"unsigned char *restrict {WORKSPACE}"] if self._workspace_bytes else []
        body = self._lines.text
        unused = "".join(f"  (void){name};\n" for name in names if name not in set(_words(body)))
        text = f"static void {function}({', '.join(declared)}) {{\n{unused}{body}\n}}\n"
        return PrintedKernel(function, tuple(parameters), self._workspace_bytes, text)

    def _memory(self, buffer: tirx.Var) -> Memory:
        memory = self._memories[self._buffers.origin(buffer)]
        if CType.of(buffer.dtype) != memory.element:
            raise CompileError(
                f"kernel {self._name} reads {memory.element.name} as {buffer.dtype}, C can't express that"
            )
        return memory

    def _statement(self, node: Node) -> None:
        print_one = self._STATEMENTS.get(type(node))
        if print_one is None:
            raise CompileError(f"kernel {self._name} has a {type(node).__name__}, which isn't written as C")
        print_one(self, node)

    def _sequence(self, node: tirx.SeqStmt) -> None:
        for statement in node.seq:
            self._statement(statement)

    def _body(self, node: tirx.AttrStmt) -> None:
        self._statement(node.body)

    def _bind(self, node: tirx.Bind) -> None:
        self._expressions.bind(node.var, node.value)

    def _view(self, node: tirx.DeclBuffer) -> None:
        """Print nothing: `Buffers` knows what the view is of."""

    def _loop(self, node: tirx.For) -> None:
        if node.kind == tirx.ForKind.VECTORIZED or node.thread_binding is not None:
            raise CompileError(f"kernel {self._name} has a loop of kind {node.kind}, which isn't written as C")
        first, count = self._expressions.code(node.min), self._expressions.code(node.extent)
        variable = self._expressions.define(node.loop_var)
        step = 1 if node.step is None else int(node.step.value)
        end = count.within(SUM) if first.text == "0" else f"{first.within(SUM)} + {count.within(PRODUCT)}"
        forward = f"{variable.text}++" if step == 1 else f"{variable.text} += {step}"
        opening = f"for ({variable.type.name} {variable.text} = {first.text}; {variable.text} < {end}; {forward})"
        with self._lines.block(opening):
            self._statement(node.body)

    def _while(self, node: tirx.While) -> None:
        with self._lines.block("for (;;)"):
            condition = self._expressions.code(node.condition)
            self._lines.add(f"if (!({condition.text})) break;")
            self._statement(node.body)

    def _if(self, node: tirx.IfThenElse) -> None:
        if node.else_case is not None and alike(node.then_case, node.else_case):
            with self._lines.block(""):  # with threads, too little work to share would be one case
                self._statement(node.then_case)
            return
        condition = self._expressions.code(node.condition)
        with self._lines.block(f"if ({condition.text})"):
            self._statement(node.then_case)
        if node.else_case is not None:
            with self._lines.block("else"):
                self._statement(node.else_case)

    def _store(self, node: tirx.BufferStore) -> None:
        if self._buffers.origin(node.buffer) in self._unread:
            return
        memory, index = self._memory(node.buffer), node.indices[0]
        value = self._expressions.code(node.value)
        if place := self._expressions.part_of_vector(memory, index):
            self._lines.add(f"{place} = {value.text};")
        elif whole_vector(index):
            address = self._expressions.address(memory, index.base)
            self._lines.add(f"{self._helpers.store(value.type)}({address}, {value.text});")
        else:
            self._lines.add(f"{memory.name}[{self._expressions.code(index).text}] = {value.text};")

    def _allocate(self, node: tirx.AllocBuffer) -> None:
        buffer = node.buffer
        if buffer in self._unread:
            return
        element, count = CType.of(buffer.dtype), math.prod(int(extent) for extent in buffer.shape)
        size = -(-element.bytes * count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        name = self._expressions.unique(buffer.name)
        if self._stack_bytes + size > STACK_BYTES:
            self._memories[buffer] = Memory(name, element)
            kind = self._helpers.type(element)
            self._lines.add(f"{kind} *const {name} = ({kind} *)({WORKSPACE} + {self._workspace_bytes});")
            self._workspace_bytes += size
            return
        self._stack_bytes += size
        cut = self._buffers.lanes_of(buffer, count)
        self._memories[buffer] = Memory(name, element, cut)
        held = CType(element.letter, element.bits, cut) if cut > 1 else element
        aligned = "" if held.lanes > 1 else f" __attribute__((aligned({ALIGNMENT_BYTES})))"
        self._lines.add(f"{self._helpers.type(held)} {name}[{count // cut}]{aligned};")

    def _evaluate(self, node: tirx.Evaluate) -> None:
        value = node.value
        if is_call(value, "tirx.call_llvm_intrin") and is_call(value.args[1], "tirx.address_of"):
            load = value.args[1].args[0]
            self._lines.add(
                f"__builtin_prefetch({self._expressions.address(self._memory(load.source), load.indices[0])});"
            )
        elif not isinstance(value, tirx.IntImm):
            raise CompileError(f"kernel {self._name} has {str(value)[:100]}, which isn't written as C")

    _STATEMENTS: ClassVar[Mapping[type, Callable[["_KernelPrinter", Any], None]]] = {
        tirx.AllocBuffer: _allocate,
        tirx.AttrStmt: _body,
        tirx.Bind: _bind,
        tirx.BufferStore: _store,
        tirx.DeclBuffer: _view,
        tirx.Evaluate: _evaluate,
        tirx.For: _loop,
        tirx.IfThenElse: _if,
        tirx.SeqStmt: _sequence,
        tirx.While: _while,
    }


def identifier(name: str) -> str:
    """Return a kernel's name as C spells names; none is that of a function of the C library."""
    return "kernel_" + "".join(letter if letter.isalnum() else "_" for letter in name.lstrip("_"))


def _words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text).split()
