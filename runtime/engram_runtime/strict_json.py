"""JSON read strictly: bounded size, no duplicate keys, every key accounted for, one error class."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engram_runtime.errors import BundleError

MAX_JSON_BYTES = 4 << 20  # a manifest with a thousand tables is about 1 MiB

Value = TypeVar("Value", bool, int, str)


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object a file holds.

    Raises:
        BundleError: no such file, larger than ``max_bytes``, not JSON, not an object, or a key twice.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise BundleError(f"{path} holds {size} bytes, at most {max_bytes} are allowed")
        value = json.loads(path.read_bytes(), object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """An object's keys, each taken once with its type; `finish` refuses those nobody took."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, dict):
            raise BundleError(f"{where} is a {type(values).__name__}, expected an object")
        self._left: dict[str, Any] = dict(values)
        self._where = where

    def take(self, name: str, kind: type[Value]) -> Value:
        """Return key ``name``, which must be of exactly this type."""
        value = self._pop(name)
        if type(value) is not kind:
            self._fail(name, f"a {kind.__name__}", value)
        return value

    def count(self, name: str) -> int:
        """Return key ``name``, an integer from 0 to 2**53 - 1."""
        value = self.take(name, int)
        if not 0 <= value < 2**53:
            self._fail(name, "an integer from 0 to 2**53 - 1", value)
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Return key ``name``, a list of int64."""
        values = self.items(name)
        for value in values:
            if type(value) is not int or not -(2**63) <= value < 2**63:
                self._fail(name, "a list of 64-bit integers", value)
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

    def optional_text(self, name: str) -> str | None:
        """Return key ``name``, a string or null."""
        value = self._pop(name)
        if value is not None and not isinstance(value, str):
            self._fail(name, "a string or null", value)
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

    def _fail(self, name: str, expected: str, value: object) -> NoReturn:
        raise BundleError(f"{self._where}.{name} is {str(value)[:60]!r}, expected {expected}")
