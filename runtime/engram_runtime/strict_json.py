"""JSON read strictly: bounded size, no duplicate keys, every key accounted for, one error class."""

import json
import os
import re
import reprlib
import stat
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engram_runtime.errors import BundleError

MAX_JSON_BYTES = 4 << 20  # a manifest with a thousand tables is about 1 MiB
KIND_NAMES = {bool: "true or false", int: "an integer", str: "a string"}
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # JSON can spell them, but no file name can hold them

Value = TypeVar("Value", bool, int, str)


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object a file holds.

    Raises:
        BundleError: no such file, larger than ``max_bytes``, not JSON, not an object, or a key twice.
    """
    return parse_json_object(read_json_bytes(path, max_bytes=max_bytes), str(path))


def read_json_bytes(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a file; raises BundleError where there is none, or it is larger than ``max_bytes``.

    A device or a pipe, which may have no end, is not read.
    """
    try:
        # Without O_NONBLOCK a pipe in place of the file would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path} is not a plain file")
            if status.st_size > max_bytes:
                raise BundleError(f"{path} holds {status.st_size} bytes, at most {max_bytes} are allowed")
            return file.read(max_bytes)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from error


def parse_json_object(text: bytes | str, where: str) -> dict[str, Any]:
    """Return the object a text is; raises BundleError where it isn't JSON, not an object, or has a key twice."""
    try:
        value = json.loads(text, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


def version_error(what: str, found: int, newest: int, older: str) -> BundleError:
    """Return what is said of a format version that isn't read; ``older`` is what to do about one of the past."""
    advice = older if found < newest else "it needs a newer engram-edge"
    return BundleError(f"{what} version {found}, this runtime reads {newest}; {advice}")


def parse_facts(metadata: Mapping[str, str] | None, key: str, advice: str) -> "Fields":
    """Return the JSON object under a key of a safetensors file's metadata.

    Raises:
        BundleError: there is none, it is too large or not JSON; ``advice`` says where such files come from.
    """
    text = (metadata or {}).get(key)
    if text is None:
        raise BundleError(f"its metadata has no {key!r}; {advice}")
    if len(text) > MAX_JSON_BYTES:
        raise BundleError(f"its metadata holds {len(text)} characters, at most {MAX_JSON_BYTES} are allowed")
    return Fields(parse_json_object(text, "its metadata"), key)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r} stands twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """An object's keys, each taken once with its type; `finish` refuses those nobody took."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, dict):
            raise BundleError(f"{where} is {reprlib.repr(values)}, expected an object")
        self._left: dict[str, Any] = dict(values)
        self._where = where

    def take(self, name: str, kind: type[Value]) -> Value:
        """Return key ``name``, which must be of exactly this type."""
        value = self._pop(name)
        if type(value) is not kind:
            self._fail(name, KIND_NAMES[kind], value)
        if type(value) is str:
            self._check_text(name, value)
        return value

    def value(self, name: str) -> object:
        """Return key ``name``, whatever its type."""
        return self._pop(name)

    def count(self, name: str, *, least: int = 0) -> int:
        """Return key ``name``, an integer from ``least`` to 2**53 - 1."""
        value = self.take(name, int)
        if not least <= value < 2**53:
            self._fail(name, f"an integer from {least} to 2**53 - 1", value)
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Return key ``name``, a list of int64."""
        return self._int64s(name, self.items(name))

    def integer_lists(self, name: str) -> tuple[tuple[int, ...], ...]:
        """Return key ``name``, a list of lists of int64."""
        lists = self.items(name)
        for values in lists:
            if not isinstance(values, list):
                self._fail(name, "a list of lists", values)
        return tuple(self._int64s(name, values) for values in lists)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return key ``name``, a list of finite numbers."""
        values = self.items(name)
        for value in values:
            if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
                self._fail(name, "a list of finite numbers", value)
        return tuple(float(value) for value in values)

    def number(self, name: str) -> float:
        """Return key ``name``, a finite number."""
        value = self._pop(name)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            self._fail(name, "a finite number", value)
        return float(value)

    def given(self, name: str) -> bool:
        """Whether key ``name`` is there and not null; a null is taken."""
        if self._left.get(name) is not None:
            return True
        self._left.pop(name, None)
        return False

    def texts(self, name: str) -> tuple[str, ...]:
        """Return key ``name``, a list of strings."""
        values = self.items(name)
        for value in values:
            if not isinstance(value, str):
                self._fail(name, "a list of strings", value)
            self._check_text(name, value)
        return tuple(values)

    def items(self, name: str) -> list[Any]:
        """Return key ``name``, a list."""
        value = self._pop(name)
        if not isinstance(value, list):
            self._fail(name, "a list", value)
        return value

    def fields(self, name: str) -> "Fields":
        """Return key ``name``, an object."""
        return Fields(self._pop(name), f"{self._where}.{name}")

    def objects(self, name: str) -> "list[Fields]":
        """Return key ``name``, a list of objects."""
        return [Fields(item, f"{self._where}.{name}[{index}]") for index, item in enumerate(self.items(name))]

    def named_objects(self, name: str) -> "dict[str, Fields]":
        """Return key ``name``, an object whose values are objects."""
        values = self.fields(name).remaining()
        return {key: Fields(value, f"{self._where}.{name}.{key}") for key, value in values.items()}

    def optional_text(self, name: str) -> str | None:
        """Return key ``name``, a string or null."""
        value = self._pop(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self._fail(name, "a string or null", value)
        self._check_text(name, value)
        return value

    def remaining(self) -> Mapping[str, Any]:
        """Return and take all keys that are left."""
        left, self._left = self._left, {}
        return left

    def finish(self) -> None:
        """Refuse keys nobody took."""
        if self._left:
            raise BundleError(f"{self._where} has unknown keys {sorted(self._left)}; it may need a newer engram-edge")

    def _pop(self, name: str) -> Any:
        if name not in self._left:
            raise BundleError(f"{self._where} has no key {name!r}")
        return self._left.pop(name)

    def _int64s(self, name: str, values: list[Any]) -> tuple[int, ...]:
        for value in values:
            if type(value) is not int or not -(2**63) <= value < 2**63:
                self._fail(name, "a list of 64-bit integers", value)
        return tuple(values)

    def _check_text(self, name: str, value: str) -> None:
        if NOT_TEXT.search(value):
            self._fail(name, "text without NUL and lone surrogates", value)

    def _fail(self, name: str, expected: str, value: object) -> NoReturn:
        # reprlib, as a value may be nested too deeply for repr.
        raise BundleError(f"{self._where}.{name} is {reprlib.repr(value)}, expected {expected}")
