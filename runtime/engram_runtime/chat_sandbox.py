"""A jinja2 sandbox in which no template can loop, recurse or grow without end."""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.filters import FILTERS, do_indent, make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_RENDER_S = 0.9  # of the thread's own time, so that a busy machine refuses nothing; what is under way ends in 0.1
MAX_VALUE_SIZE = 8 << 20  # characters of one value: twice the longest prompt
MAX_WORK = 64 << 20  # characters of all values a rendering makes: 16 copies of the longest prompt
ITEM_SIZE = 64  # characters that take the memory and time of one item of a list
MAX_INTEGER_BITS = 4096
MAX_FORMAT_CHARS = 100  # strftime may write 256 characters for each of its format, json an indent for each item

_FILTERS = """
abs capitalize count d default dictsort e escape first float groupby int items last length list lower map max min reject
rejectattr reverse round safe select selectattr sort string title trim unique upper wordcount
"""
_STRING_METHODS = """
capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace
istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip
split splitlines startswith strip swapcase title upper
"""
# What a template may call on plain values: nothing that pads, formats or changes in place.
SAFE_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(_STRING_METHODS.split()),
    bytes: frozenset(),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    int: frozenset(),
    float: frozenset({"is_integer"}),
}


class TemplateRefusal(TemplateError):
    """The template itself refused, by calling ``raise_exception``."""


class Meter:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + MAX_RENDER_S
        self._work_left = MAX_WORK

    def spend(self, work: int) -> None:
        """Take the ``work`` characters of a new value off, and look at the clock."""
        if work > MAX_VALUE_SIZE:
            raise SecurityError(f"it makes a value of more than {MAX_VALUE_SIZE} characters")
        self._work_left -= work
        if self._work_left < 0:
            raise SecurityError(f"it makes more than {MAX_WORK} characters on its way")
        if time.thread_time() > self._deadline:
            raise SecurityError(f"it takes more than {MAX_RENDER_S:g} s")

    def spend_on(self, value: object, times: int = 1) -> None:
        """Take off the size of a value written out, where what is held twice counts twice."""
        if isinstance(value, Mapping):
            value = [*value.keys(), *value.values()]
        if isinstance(value, list | tuple):
            self.spend(times * ITEM_SIZE * len(value))
            for item in value:
                self.spend_on(item, times)
        else:
            self.spend(times * (len(value) if isinstance(value, str | range) else 1))


_current_meter: ContextVar[Meter] = ContextVar("_current_meter")


@contextmanager
def metered_rendering() -> Iterator[Meter]:
    """Give the rendering inside a meter of its own."""
    token = _current_meter.set(meter := Meter())
    try:
        yield meter
    finally:
        _current_meter.reset(token)


def _join_strings(pieces: Iterable[str]) -> str:
    return "".join(_spent(pieces, 0))


def _spent(pieces: Iterable[str], separator_chars: int) -> Iterator[str]:
    meter = _current_meter.get()
    size = 0
    for piece in pieces:
        piece_size = 1 + len(piece) + separator_chars
        size += piece_size
        meter.spend(size if size > MAX_VALUE_SIZE else piece_size)
        yield piece


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of transformers' chat templates, less what they don't need, with every step metered.

    A value is taken off the meter with its full size when it is made, so printing or comparing it later is bounded.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_join_strings)

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters = {
            **{name: _metered(FILTERS[name]) for name in _FILTERS.split()},
            **{"indent": _indent, "join": _join, "replace": _replace, "tojson": _to_json},
            **{"(turn)": _take_turn, "(value)": _take_value},  # of MeteredSyntax; no template can write such a name
        }
        self.globals = {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": MeteredNamespace,
            "raise_exception": _raise_exception,
            "range": self.globals["range"],
            "strftime_now": lambda format: _format_time(now(), format),
        }

    def compile_metered(self, source: str) -> Template:
        """Compile a template so that it asks the meter at every turn of a loop."""
        tree = MeteredSyntax().visit(self.parse(source))
        return self.from_string(tree.set_environment(self))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow the methods of plain values by name, and what jinja2 allows of others."""
        for kind, methods in SAFE_METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once; jinja2 would print an unsafe attribute as an empty string."""
        raise SecurityError(f"it uses the attribute {attribute!r} of a {type(obj).__name__}, which is not allowed")

    def wrap_str_format(self, value: Any) -> None:
        """Refuse ``str.format``: one width in it is a gigabyte."""
        if super().wrap_str_format(value) is not None:
            self.unsafe_undefined(value.__self__, value.__name__)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Take the result of an operation off the meter before it is made."""
        _spend_on_operation(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method and take its result off the meter; before, where it can be large."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", None)
        if isinstance(owner, str) and name == "replace":
            obj = functools.partial(_replace_in, owner)
        if isinstance(owner, str) and name == "join":
            obj = functools.partial(_join_items, owner)
        result = super().call(context, obj, *args, **kwargs)
        _current_meter.get().spend_on(result)
        return result


class MeteredSyntax(NodeTransformer):
    """Rewrites what jinja2 compiles to plain Python, past the sandbox: loops, literals, slices and ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        turn = _filter_node(nodes.Const(None), "(turn)", node)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter_node(nodes.List(node.nodes, lineno=node.lineno), "join", node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filter_node(node, "(value)", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if is_target else _filter_node(node, "(value)", node)

    visit_Dict = visit_Tuple = visit_List

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> NoReturn:
        raise TemplateSyntaxError("autoescape is not available", node.lineno)


def _filter_node(value: nodes.Expr, name: str, place: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=place.lineno)


class MeteredNamespace(Namespace):
    """A namespace that takes no underscored names and shows nothing of its values when printed."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self, {})
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise SecurityError(f"it puts {name!r} into a namespace, which is not allowed")
        _current_meter.get().spend(1)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _spend_on_operation(operator: str, left: Any, right: Any) -> None:
    meter = _current_meter.get()
    if operator == "%" and isinstance(left, str):
        raise SecurityError("it formats a string with %, which is not allowed")
    if operator == "+":
        meter.spend_on(left)
        meter.spend_on(right)
    if isinstance(left, int) and isinstance(right, int):
        num_bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * right}
        if num_bits.get(operator, 0) > MAX_INTEGER_BITS:
            raise SecurityError(f"it makes an integer of more than {MAX_INTEGER_BITS} bits")
    elif operator == "*" and isinstance(left, int) != isinstance(right, int):
        times, value = (left, right) if isinstance(left, int) else (right, left)
        meter.spend_on(value, max(times, 0))


def _metered(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the mark by which jinja2 passes the environment
    def metered(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        _current_meter.get().spend_on(result)
        return result

    return metered


@pass_context  # keeps jinja2 from calling it while compiling
def _take_turn(context: Context, value: None) -> None:
    _current_meter.get().spend(1)


@pass_context
def _take_value(context: Context, value: Any) -> Any:
    _current_meter.get().spend_on(value)
    return value


@pass_environment
def _join(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return _join_items(str(d), map(str, items))


def _join_items(separator: str, items: Iterable[str]) -> str:
    return separator.join(_spent(items, len(separator)))


def _replace(s: str, old: str, new: str, count: int | None = None) -> str:
    return _replace_in(str(s), str(old), str(new), -1 if count is None else count)


def _replace_in(text: str, old: str, new: str, *count: int) -> str:
    _current_meter.get().spend(len(text) + text.count(old) * len(new))
    return text.replace(old, new, *count)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    num_chars = len(width) if isinstance(width, str) else max(width, 0)
    _current_meter.get().spend(len(s) + (1 + len(s.splitlines())) * num_chars)
    return do_indent(s, width, first, blank)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if (len(indent) if isinstance(indent, str) else indent or 0) > MAX_FORMAT_CHARS:
        raise SecurityError(f"it indents json by more than {MAX_FORMAT_CHARS} characters")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _join_strings(encoder.iterencode(x))


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _format_time(moment: datetime, format: str) -> str:
    if len(format) > MAX_FORMAT_CHARS:
        raise SecurityError(
            f"it formats the time with {len(format)} characters, at most {MAX_FORMAT_CHARS} are allowed"
        )
    return moment.strftime(format)
