"""The small inline functions generated kernels are written with, each defined where a kernel needs it.

Vectors are those of GCC and clang, which split them where the machine's are shorter. Each function does on every lane
what LLVM's code of the same kernel does, so results are the same bits.
"""

from collections.abc import Sequence

from engram_compilers.c.c_types import CType

_SCALAR_FUNCTIONS = {"fma": "fmaf", "nearbyint": "nearbyintf", "fabs": "fabsf", "sqrt": "sqrtf"}
_SCALAR_FUNCTIONS |= {name: f"{name}f" for name in ("exp", "log", "tanh", "floor", "ceil", "round", "trunc")}

_COMPARISONS = {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}


class Helpers:
    """The helper functions and types of a file, in the order of definition."""

    def __init__(self) -> None:
        self._definitions: dict[str, str] = {}
        self._shuffles: dict[tuple[str, str], str] = {}

    @property
    def text(self) -> str:
        """The definitions."""
        return "\n".join(self._definitions.values())

    def type(self, of: CType) -> str:
        """Return a type's name, defining it."""
        if of.lanes > 1:
            element = of.with_letter(of.mask_letter).element.name
            self._define(of.name, f"typedef {element} {of.name} __attribute__((vector_size({of.bytes})));")
        return of.name

    def splat(self, of: CType) -> str:
        """``v(x)``: x in every lane."""
        lanes = ", ".join(["x"] * of.lanes)
        name, vector = f"splat_{of.name}", self.type(of)
        return self._inline(name, vector, f"{of.element.name} x", f"return ({vector}){{{lanes}}};")

    def ramp(self, of: CType) -> str:
        """``v(x)``: x, x + 1, x + 2, ..."""
        lanes = ", ".join(str(lane) for lane in range(of.lanes))
        name, splat = f"ramp_{of.name}", self.splat(of)
        return self._inline(name, of.name, f"{of.element.name} x", f"return {splat}(x) + ({of.name}){{{lanes}}};")

    def load(self, of: CType) -> str:
        """``v(p)``: the elements from p on, at any address an element may have."""
        unaligned = self._unaligned(of)
        body = f"return *(const {unaligned} *)p;"
        return self._inline(f"load_{of.name}", of.name, f"const {of.element.name} *p", body)

    def store(self, of: CType) -> str:
        """``v(p, x)``: what `load` reads."""
        unaligned = self._unaligned(of)
        body = f"*({unaligned} *)p = x;"
        return self._inline(f"store_{of.name}", "void", f"{of.element.name} *p, {of.name} x", body)

    def select(self, of: CType) -> str:
        """``v(mask, a, b)`` of vectors: a where the mask is -1, b where it is 0."""
        mask = self.type(of.with_letter("i"))
        body = f"return ({of.name})((mask & ({mask})a) | (~mask & ({mask})b));"
        vector = self.type(of)
        return self._inline(f"select_{of.name}", vector, f"{mask} mask, {vector} a, {vector} b", body)

    def extreme(self, name: str, of: CType) -> str:
        """``v(a, b)``: ``min`` or ``max``; b where a is a nan or b is one."""
        sign = "<" if name == "min" else ">"
        kind = self.type(of)
        if of.lanes == 1:
            body = f"return a {sign} b ? a : b;"
        else:
            mask = self.type(of.with_letter("i"))
            body = f"return {self.select(of)}(({mask})(a {sign} b), a, b);"
        how = "INLINE" if of.lanes == 1 else "LANEWISE"
        return self._inline(f"{name}_{self._suffix(of)}", kind, f"{kind} a, {kind} b", body, how)

    def compare(self, sign: str, of: CType) -> str:
        """``v(a, b)`` of vectors: the mask of a comparison."""
        vector, mask = self.type(of), self.type(of.with_letter("b"))
        name, body = f"{_COMPARISONS[sign]}_{of.name}", f"return ({mask})(a {sign} b);"
        return self._inline(name, mask, f"{vector} a, {vector} b", body, "LANEWISE")

    def convert(self, value: str, from_type: CType, to: CType) -> str:
        """Return ``value`` as another type of as many lanes: integers step by step, as GCC has no longer steps."""
        if to.lanes == 1:
            return f"({to.name}){value}"
        if from_type.letter in "iu" and to.letter in "iu":
            while max(from_type.bits, to.bits) > 2 * min(from_type.bits, to.bits):
                bits = from_type.bits * 2 if from_type.bits < to.bits else from_type.bits // 2
                from_type = CType(from_type.letter, bits, to.lanes)
                value = f"__builtin_convertvector({value}, {self.type(from_type)})"
        return f"__builtin_convertvector({value}, {self.type(to)})"

    def reinterpret(self, from_type: CType, to: CType) -> str:
        """``v(x)``: the same bits as another type."""
        name = f"bits_{self._suffix(from_type)}_as_{self._suffix(to)}"
        source, target = self.type(from_type), self.type(to)
        body = f"{target} y; memcpy(&y, &x, sizeof y); return y;"
        return self._inline(name, target, f"{source} x", body)

    def shuffle(self, from_type: CType, operands: Sequence[str], indices: Sequence[int]) -> str:
        """Return lanes ``indices`` of one or two vectors, the second one's counted after the first one's."""
        if len(indices) == 1:
            return f"{operands[indices[0] // from_type.lanes]}[{indices[0] % from_type.lanes}]"
        to = self.type(CType(from_type.letter, from_type.bits, len(indices)))
        vector, lanes = self.type(from_type), ", ".join(str(lane) for lane in indices)
        if len(operands) == 1:
            return f"__builtin_shufflevector({operands[0]}, {operands[0]}, {lanes})"
        body = f"{{ return __builtin_shufflevector(a, b, {lanes}); }}"
        known = self._shuffles.setdefault((vector, lanes), f"shuffle_{vector}_{len(self._shuffles)}")
        self._define(known, f"LANEWISE {to} {known}({vector} a, {vector} b) {body}")
        return f"{known}({', '.join(operands)})"

    def math(self, name: str, of: CType) -> str:
        """Return the name of a function of floats, or of vectors of them."""
        if of.lanes == 1:
            return _SCALAR_FUNCTIONS[name]
        if name == "nearbyint":
            return self._nearbyint(of)
        if name == "fabs":
            return self._fabs(of)
        vector = self.type(of)
        letters = "abc" if name == "fma" else "a"
        arguments = ", ".join(f"{letter}[i]" for letter in letters)
        loop = f"for (int i = 0; i < {of.lanes}; i++) y[i] = {_SCALAR_FUNCTIONS[name]}({arguments});"
        parameters = ", ".join(f"{vector} {letter}" for letter in letters)
        return self._inline(f"{name}_{of.name}", vector, parameters, f"{vector} y; {loop} return y;", "CALLED")

    def _fabs(self, of: CType) -> str:
        vector, bits = self.type(of), self.type(of.with_letter("i"))
        body = f"return ({vector})(({bits})x & 0x7fffffff);"
        return self._inline(f"fabs_{of.name}", vector, f"{vector} x", body)

    def _nearbyint(self, of: CType) -> str:
        """Adding 2^23 rounds what is smaller to a whole number; larger numbers are whole."""
        vector, bits = self.type(of), self.type(of.with_letter("i"))
        size, select = self._fabs(of), self.select(of)
        body = (
            f"const {vector} size = {size}(x), whole = (size + 8388608.0f) - 8388608.0f; "
            f"const {bits} sign = ({bits})x & INT32_MIN; "
            f"return {select}(({bits})(size < 8388608.0f), ({vector})(({bits})whole | sign), x);"
        )
        return self._inline(f"nearbyint_{of.name}", vector, f"{vector} x", body, "LANEWISE")

    def _unaligned(self, of: CType) -> str:
        name, vector = f"{of.name}_anywhere", self.type(of)
        self._define(name, f"typedef {vector} {name} __attribute__((aligned({of.element.bytes}), may_alias));")
        return name

    def _suffix(self, of: CType) -> str:
        return f"{of.mask_letter}{of.bits}" if of.lanes == 1 else of.name

    def _inline(self, name: str, result: str, parameters: str, body: str, how: str = "INLINE") -> str:
        self._define(name, f"{how} {result} {name}({parameters}) {{ {body} }}")
        return name

    def _define(self, name: str, definition: str) -> None:
        self._definitions.setdefault(name, definition)
