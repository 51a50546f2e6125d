"""TIR's expressions as C."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import tvm_ffi
from tvm import ir, tirx

from engram_compilers.c.c_types import CType
from engram_compilers.c.lines import Lines
from engram_compilers.c.memories import Memory
from engram_compilers.c.tir_nodes import Node, is_call, whole_vector
from engram_compilers.c.vector_helpers import Helpers
from engram_runtime.errors import CompileError

ATOM, UNARY, PRODUCT, SUM, OTHER = range(5)  # how loosely an expression's outermost operator binds

_ARITHMETIC = {tirx.Add: ("+", SUM), tirx.Sub: ("-", SUM), tirx.Mul: ("*", PRODUCT)}
_ARITHMETIC |= {tirx.Div: ("/", PRODUCT), tirx.Mod: ("%", PRODUCT)}
_BITS = {ir.prim.LShift: "<<", ir.prim.RShift: ">>", ir.prim.BitwiseAnd: "&", ir.prim.BitwiseOr: "|"}
_BITS |= {ir.prim.BitwiseXor: "^"}
_COMPARISONS = {tirx.EQ: "==", tirx.NE: "!=", tirx.LT: "<", tirx.LE: "<=", tirx.GT: ">", tirx.GE: ">="}
_LOGIC = {tirx.And: ("&&", "&"), tirx.Or: ("||", "|")}
_EXTREMES = {tirx.Min: "min", tirx.Max: "max"}
_MATH = ("fma", "nearbyint", "fabs", "sqrt", "exp", "log", "tanh", "floor", "ceil", "round", "trunc")


def _intrinsics() -> Mapping[int, str]:
    number = tvm_ffi.get_global_func("target.llvm_lookup_intrinsic_id")
    return {int(number(f"llvm.{name}")): name for name in _MATH}


MATH_BY_INTRINSIC = _intrinsics()


@dataclass(frozen=True, slots=True)
class Code:
    """An expression in C, its type, and how loosely its outermost operator binds."""

    text: str
    type: CType
    level: int = ATOM

    def within(self, level: int) -> str:
        """Return the text as an operand, in parentheses if it binds more loosely than ``level``."""
        return self.text if self.level <= level else f"({self.text})"


class Expressions:
    """Prints the expressions of one kernel; what they bind becomes constants in ``lines``."""

    def __init__(self, kernel: str, helpers: Helpers, lines: Lines, memory: Callable[[tirx.Var], Memory]) -> None:
        self._kernel = kernel
        self._helpers = helpers
        self._lines = lines
        self._memory = memory
        self._names: dict[tirx.Var, Code] = {}
        self._used: dict[str, int] = {}

    def unique(self, wanted: str) -> str:
        """Return a name that nothing in the kernel has yet."""
        base = "".join(letter if letter.isalnum() else "_" for letter in wanted or "buffer")
        number = self._used[base] = self._used.get(base, -1) + 1
        return self.unique(f"{base}_{number}") if number else base

    def bind(self, variable: tirx.Var, value: Node) -> None:
        """Define a constant for a variable."""
        code = self.code(value)
        name = self.unique(variable.name)
        self._lines.add(f"const {self._helpers.type(code.type)} {name} = {code.text};", defines=name)
        self._names[variable] = Code(name, code.type)

    def define(self, variable: tirx.Var) -> Code:
        """Return the name of a variable that a loop declares."""
        self._names[variable] = Code(self.unique(variable.name), CType.of(variable.ty.dtype))
        return self._names[variable]

    def code(self, node: Node) -> Code:
        """Return an expression as C.

        Raises:
            CompileError: C can't express it.
        """
        kind = type(node)
        if kind in _ARITHMETIC:
            return self._arithmetic(node, *_ARITHMETIC[kind])
        if kind in _BITS:
            return self._bits(node, _BITS[kind])
        if kind in _COMPARISONS:
            return self._comparison(node, _COMPARISONS[kind])
        if kind in _LOGIC:
            return self._logic(node, *_LOGIC[kind])
        if kind in _EXTREMES:
            a, b = self.code(node.a), self.code(node.b)
            return Code(f"{self._helpers.extreme(_EXTREMES[kind], a.type)}({a.text}, {b.text})", a.type)
        return self._other(node)

    def _other(self, node: Node) -> Code:
        print_one = self._EXPRESSIONS.get(type(node))
        if print_one is None:
            raise self._unknown(f"{type(node).__name__} {node}")
        return print_one(self, node)

    def _integer(self, node: tirx.IntImm) -> Code:
        return integer(int(node.value), CType.of(node.ty.dtype))

    def _number(self, node: tirx.FloatImm) -> Code:
        return number(float(node.value), CType.of(node.ty.dtype))

    def _variable(self, node: tirx.Var) -> Code:
        return self._names[node]

    def _let(self, node: tirx.Let) -> Code:
        self.bind(node.var, node.value)
        return self.code(node.body)

    def _splat(self, node: tirx.Broadcast) -> Code:
        kind = CType.of(node.ty.dtype)
        return Code(f"{self._helpers.splat(kind)}({self.code(node.value).text})", kind)

    def _ramp(self, node: tirx.Ramp) -> Code:
        if not whole_vector(node):
            raise self._unknown(f"{node}")
        kind = CType.of(node.ty.dtype)
        return Code(f"{self._helpers.ramp(kind)}({self.code(node.base).text})", kind)

    def _not(self, node: tirx.Not) -> Code:
        return Code(f"!{self.code(node.a).within(UNARY)}", CType("b", 32), UNARY)

    def _arithmetic(self, node: Node, sign: str, level: int) -> Code:
        a, b = self.code(node.a), self.code(node.b)
        code = Code(f"{a.within(level)} {sign} {b.within(level - 1)}", a.type, level)
        if a.type.lanes == 1 and a.type.bits < 32:  # C would compute, and keep, an int
            return Code(f"({a.type.name})({code.text})", a.type, UNARY)
        return code

    def _bits(self, node: Node, sign: str) -> Code:
        a, b = self.code(node.a), self.code(node.b)
        code = Code(f"{a.within(UNARY)} {sign} {b.within(UNARY)}", a.type, OTHER)
        if sign == "<<" and a.type.lanes == 1 and a.type.bits < 32:
            return Code(f"({a.type.name})({code.text})", a.type, UNARY)
        return code

    def _comparison(self, node: Node, sign: str) -> Code:
        a, b = self.code(node.a), self.code(node.b)
        if a.type.lanes == 1:
            return Code(f"{a.within(SUM)} {sign} {b.within(SUM)}", CType("b", 32), OTHER)
        return Code(f"{self._helpers.compare(sign, a.type)}({a.text}, {b.text})", a.type.with_letter("b"))

    def _logic(self, node: Node, sign: str, of_masks: str) -> Code:
        a = self.code(node.a)
        with self._lines.aside() as lines:
            b = self.code(node.b)
        if a.type.lanes > 1:
            self._lines.extend(lines)
            return Code(f"{a.within(UNARY)} {of_masks} {self._as_mask(b, a.type).within(UNARY)}", a.type, OTHER)
        if not lines.lines:
            return Code(f"{a.within(UNARY)} {sign} {b.within(UNARY)}", a.type, OTHER)
        name = self.unique("both" if sign == "&&" else "either")
        self._lines.add(f"int {name} = {a.text};")
        with self._lines.block(f"if ({name})" if sign == "&&" else f"if (!{name})"):
            self._lines.extend(lines)
            self._lines.add(f"{name} = {b.text};")
        return Code(name, a.type)

    def _as_mask(self, value: Code, like: CType) -> Code:
        """Return a mask in the width of another one's elements."""
        if value.type.bits == like.bits:
            return value
        mask = like.with_letter("b")
        return Code(self._helpers.convert(value.text, value.type.with_letter("i"), like.with_letter("i")), mask)

    def _cast(self, node: tirx.Cast) -> Code:
        value, kind = self.code(node.value), CType.of(node.ty.dtype)
        if value.type.lanes > 1 and value.type.letter == "b":
            raise self._unknown(f"{node}")
        if kind.lanes == 1:
            return Code(f"({kind.name}){value.within(UNARY)}", kind, UNARY)
        return Code(self._helpers.convert(value.text, value.type, kind), kind)

    def _select(self, node: tirx.Select) -> Code:
        condition, yes, no = (self.code(part) for part in (node.condition, node.true_value, node.false_value))
        if condition.type.lanes == 1:
            return Code(f"({condition.text} ? {yes.text} : {no.text})", yes.type)
        mask = self._as_mask(condition, yes.type)
        return Code(f"{self._helpers.select(yes.type)}({mask.text}, {yes.text}, {no.text})", yes.type)

    def _shuffle(self, node: tirx.Shuffle) -> Code:
        vectors = [self.code(vector) for vector in node.vectors]
        kind = vectors[0].type
        if len(vectors) > 2 or any(vector.type != kind for vector in vectors) or kind.lanes == 1:
            raise self._unknown(f"{node}")
        named = [self._named(vector) for vector in vectors]
        to = CType(kind.letter, kind.bits, len(node.indices))
        return Code(self._helpers.shuffle(kind, named, [int(index.value) for index in node.indices]), to)

    def _named(self, code: Code) -> str:
        """Return a name for an expression that is used several times."""
        if code.text.isidentifier():
            return code.text
        name = self.unique("part")
        self._lines.add(f"const {self._helpers.type(code.type)} {name} = {code.text};", defines=name)
        return name

    def _load(self, node: ir.TensorLoad) -> Code:
        memory, index = self._memory(node.source), node.indices[0]
        kind = CType.of(node.ty.dtype)
        if place := self.part_of_vector(memory, index):
            return Code(place, kind)
        if whole_vector(index):
            return Code(f"{self._helpers.load(kind)}({self.address(memory, index.base)})", kind)
        return Code(f"{memory.name}[{self.code(index).text}]", kind)

    def part_of_vector(self, memory: Memory, index: Node) -> str:
        """Return a vector, or one of its elements, in an array of vectors that is indexed by elements; "" in others."""
        lanes = memory.cut
        if lanes == 1:
            return ""
        base = index.base if whole_vector(index) else index
        known = isinstance(base, tirx.IntImm)
        whole = f"{memory.name}[{int(base.value) // lanes if known else 0}]"
        if whole_vector(index):
            return whole
        return f"{whole}[{int(base.value) % lanes if known else self.code(base).text}]"

    def address(self, memory: Memory, base: Node) -> str:
        """Return a pointer to an element."""
        if isinstance(base, tirx.IntImm) and base.value == 0:
            return memory.name
        return f"{memory.name} + {self.code(base).within(SUM)}"

    def _call(self, node: ir.Call) -> Code:
        if is_call(node, "tirx.call_llvm_pure_intrin") and int(node.args[0].value) in MATH_BY_INTRINSIC:
            kind = CType.of(node.ty.dtype)
            name = self._helpers.math(MATH_BY_INTRINSIC[int(node.args[0].value)], kind)
            return Code(f"{name}({', '.join(self.code(argument).text for argument in node.args[1:])})", kind)
        if is_call(node, "tirx.reinterpret"):
            return self._reinterpret(self.code(node.args[0]), CType.of(node.ty.dtype))
        if is_call(node, "prim.if_then_else", "tirx.if_then_else"):
            return self._if_then_else(*node.args)
        if is_call(node, "tirx.likely"):
            return self.code(node.args[0])
        raise self._unknown(f"{node}")

    def _reinterpret(self, value: Code, kind: CType) -> Code:
        if kind.lanes > 1 and value.type.lanes > 1:
            return Code(f"({self._helpers.type(kind)}){value.within(UNARY)}", kind, UNARY)
        return Code(f"{self._helpers.reinterpret(value.type, kind)}({value.text})", kind)

    def _if_then_else(self, condition: Node, yes: Node, no: Node) -> Code:
        """Evaluate only one of two values, as the other may not be there."""
        chosen = self.code(condition)
        with self._lines.aside() as first:
            a = self.code(yes)
        with self._lines.aside() as second:
            b = self.code(no)
        if not first.lines and not second.lines:
            return Code(f"({chosen.text} ? {a.text} : {b.text})", a.type)
        name = self.unique("chosen")
        self._lines.add(f"{self._helpers.type(a.type)} {name};")
        for opening, lines, value in ((f"if ({chosen.text})", first, a), ("else", second, b)):
            with self._lines.block(opening):
                self._lines.extend(lines)
                self._lines.add(f"{name} = {value.text};")
        return Code(name, a.type)

    def _unknown(self, what: str) -> CompileError:
        return CompileError(f"kernel {self._kernel} has {what[:100]}, which isn't written as C")

    _EXPRESSIONS: ClassVar[Mapping[type, Callable[["Expressions", Any], Code]]] = {
        ir.Call: _call,
        ir.TensorLoad: _load,
        tirx.Broadcast: _splat,
        tirx.Cast: _cast,
        tirx.FloatImm: _number,
        tirx.IntImm: _integer,
        tirx.Let: _let,
        tirx.Not: _not,
        tirx.Ramp: _ramp,
        tirx.Select: _select,
        tirx.Shuffle: _shuffle,
        tirx.Var: _variable,
    }


def integer(value: int, kind: CType) -> Code:
    """Return an integer or a truth value as C."""
    if kind.bits == 64:
        text = f"{'U' if kind.letter == 'u' else ''}INT64_C({value})"
    elif value == -(2**31):
        text = "INT32_MIN"
    else:
        text = f"{value}u" if kind == CType("u", 32) else str(value)
    return Code(text, kind, UNARY if value < 0 else ATOM)


def number(value: float, kind: CType) -> Code:
    """Return a float32 as C: the shortest decimal that stands for it."""
    narrow = np.float32(value)
    if np.isnan(narrow):
        return Code("NAN", kind)
    text = "INFINITY" if np.isinf(narrow) else f"{abs(narrow)!s}f"
    return Code(f"-{text}", kind, UNARY) if np.signbit(narrow) else Code(text, kind)
