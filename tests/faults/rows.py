"""All rows of the table of faults, in its order."""

import importlib
import pkgutil
import re
from dataclasses import dataclass

from tests import faults
from tests.faults.row import Row


@dataclass(frozen=True, slots=True)
class Placed:
    """A row and the module whose ``ROWS`` holds it."""

    row: Row
    module: str


def placed_rows() -> list[Placed]:
    """Return the rows of every module of this folder that has ``ROWS``, A1 to D10."""
    names = (f"{faults.__name__}.{module.name}" for module in pkgutil.iter_modules(faults.__path__))
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    placed = [Placed(row, module.__name__) for module in modules for row in getattr(module, "ROWS", ())]
    return sorted(placed, key=lambda each: place(each.row.name))


def place(name: str) -> tuple[str, int, str]:
    """Return what orders the names of rows: A9 before A10, ``C4`` before ``C4 verify``."""
    found = re.fullmatch(r"([A-D])(\d+)(?: (.+))?", name)
    if found is None:
        raise ValueError(f"{name!r} is no name of a row: a letter from A to D and a number, as A1 or A3 onnx")
    letter, number, word = found.groups()
    return letter, int(number), word or ""
