"""What is evaluated: a bundle with the site, its cartridges as they are shipped, and other rows in their place."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.executor import Executor, load_executor
from examples.retrofit.artefacts import int4_rows, read_int4
from examples.retrofit.conditions import Condition, Rows, read_rows
from examples.retrofit.facts import HELD_OUT_QUESTIONS, Fact, read_facts
from examples.retrofit.recall import sample

EXECUTORS = ("tvm", "onnxruntime")
CARTRIDGES = ("dictionary", "manual")
UNTRAINED = "untrained"
FIRST = HELD_OUT_QUESTIONS[:1]
WEIGHTS = ("engram.safetensors", "manual.overlay", "mtp.safetensors")

Figures = dict[str, Any]
Write = Callable[[Path, Bundle, Rows], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What is measured, and on how much of it.

    Attributes:
        asset: the folder with ``manual.overlay`` and the facts of each kind; its table is the bundle's.
        work: holds what is fetched and derived: corpora, rows before rounding, overlays.
        entries: facts asked for of each kind.
        tokens: scored of each corpus.
        checkpoint: what the bundle was exported from.
    """

    bundle: Bundle
    asset: Path
    work: Path
    checkpoint: Path
    entries: int
    tokens: int
    threads: int | None

    def executor(self, name: str) -> Executor:
        """Load one of `EXECUTORS`."""
        return load_executor(name, self.bundle, threads=self.threads)

    def facts(self, kind: str) -> list[Fact]:
        """Return the sample of a cartridge's facts, or of `UNTRAINED` entries."""
        return sample(read_facts(self.asset / f"{kind}.jsonl"), self.entries)

    def cartridge(self, name: str) -> Condition:
        """Return the condition in which a cartridge is in its place as it is shipped."""
        return Condition(name, () if name == "dictionary" else (self.asset / f"{name}.overlay",))

    def variant(self, name: str, kind: str, write: Write, rows: Rows) -> Condition:
        """Return a cartridge with other rows ``[N, d]`` in its place."""
        folder = self.work / "variants"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{kind}.overlay"
        write(path, self.bundle, rows)
        return Condition(name, (path,))

    def trained_rows(self, name: str) -> Rows:
        """Return a cartridge's rows ``[N, d]`` as they were before they were rounded.

        Raises:
            RequestError: nothing has been trained into this work folder, or something else than the asset's rows.
        """
        path = self.work / f"{name}-rows.npy"
        if not path.is_file():
            raise RequestError(
                f"there is no {path}, the rows before they are rounded; train the {name} cartridge first"
            )
        rows: Rows = np.load(path)
        shipped = read_rows(self.bundle, self.cartridge(name).overlays)
        if not np.array_equal(read_int4(*int4_rows(rows)), shipped):
            raise RequestError(f"{path} holds other rows than {self.asset}; evaluate the asset of this work folder")
        return rows

    def digests(self) -> dict[str, str]:
        """Return the sha256 of each file of weights that is measured."""
        return {name: hashlib.sha256((self.asset / name).read_bytes()).hexdigest() for name in WEIGHTS}
