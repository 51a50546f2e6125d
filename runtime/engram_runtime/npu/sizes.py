"""Read a table of sizes, as profiles and libraries give an accelerator's."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_runtime.errors import TargetError

MOST = 2**40  # no scratchpad, width or clock comes near


def parsed_sizes(what: str, names: Sequence[str], raw: Mapping[str, Any]) -> dict[str, int]:
    """Return the table if it has these names and integers from 0 to 2**40; else raise TargetError."""
    if raw.keys() != set(names):
        raise TargetError(f"{what} has keys {sorted(raw)}, expected {sorted(names)}")
    for name in names:
        if type(raw[name]) is not int or not 0 <= raw[name] <= MOST:
            raise TargetError(f"{what} has {name} {raw[name]!r}, expected an integer from 0 to {MOST}")
    return dict(raw)
