"""An executor on a model's C sources: compiled by this machine's compiler, called through ctypes."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.program_runner import Passes, aligned

from engram_compilers.c.model import SOURCE_FILE, WEIGHTS_FILE, EmittedModel, emit_model
from engram_runtime.bundle import Bundle
from engram_runtime.executor import State, StepInputs, aligned_zeros
from engram_runtime.manifest import DECODER
from engram_runtime.tables.decoding import RowDecoder

FLAGS = ("-std=c11", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-pedantic", "-fPIC", "-shared")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc: install it")

AwaitRows = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


class Forward(ctypes.Structure):
    """``engram_forward``."""

    _fields_ = (
        ("tokens", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("run", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)),
    )


def pass_structure(sites: int) -> type[ctypes.Structure]:
    """Return ``engram_pass`` of a model with so many sites."""
    pointers = [(name, ctypes.c_void_p) for name in ("weights", "states", "scratch")]
    pointers += [(name, ctypes.c_void_p) for name in ("token_ids", "position", "logit_rows")]
    rows = ("rows", ctypes.c_void_p * (sites + 1))
    others = [("embeddings", ctypes.c_void_p), ("logits", ctypes.c_void_p), ("await_rows", AwaitRows)]
    fields = (*pointers, rows, *others, ("context", ctypes.c_void_p))
    return type("Pass", (ctypes.Structure,), {"_fields_": fields})


def compiled(folder: Path, *flags: str) -> Path:
    """Compile a model's sources, without a single warning."""
    library = folder / "model.so"
    command = ["gcc", *FLAGS, *flags, "-o", str(library), str(folder / SOURCE_FILE), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    return library


class CExecutor:
    """See `engram_runtime.executor.Executor`."""

    name, threads = "c", 1
    expert_bytes_read = experts_read = None
    float16_states = ()

    def __init__(self, bundle: Bundle, folder: Path, passes: Passes, *flags: str) -> None:
        self.emitted: EmittedModel = emit_model(bundle, passes, folder)
        library = ctypes.CDLL(str(compiled(folder, *flags)))
        forwards = (Forward * len(passes)).in_dll(library, "engram_forwards")
        self.forward: Mapping[tuple[int, int], Callable[..., int]] = {(f.tokens, f.rows): f.run for f in forwards}
        self.weights = aligned(np.fromfile(folder / WEIGHTS_FILE, dtype=np.uint8))
        self._library = library
        self._sizes = sorted({tokens for tokens, _ in passes})
        self._vocab_size = bundle.manifest.model.vocab_size
        self._sites = len(bundle.manifest.tables)

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        sizes: list[int] = []
        while sum(sizes) < count:
            sizes.append(max(size for size in self._sizes if size <= count - sum(sizes)))
        return sizes

    def row_decoder(self, site: str) -> RowDecoder | None:
        return None

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> "CStep":
        return CStep(self, self._vocab_size, pass_structure(self._sites))


@dataclass(slots=True)
class CStep:
    """See `engram_runtime.executor.Step`; the states are its own, told is nothing."""

    executor: CExecutor
    vocab_size: int
    structure: Any
    states: NDArray[np.uint8] = field(init=False)
    told: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = aligned_zeros((self.executor.emitted.state_bytes,), "uint8")

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        scratch = np.full(self.executor.emitted.scratch_bytes + 64, 0xFF, dtype=np.uint8)
        scratch = scratch[-scratch.ctypes.data % 64 :]
        logits = aligned_zeros((len(inputs.logit_rows), self.vocab_size))
        pending = list(inputs.rows.values())
        rows = [aligned(np.full(each.shape, np.nan, dtype=np.float32)) for each in pending]
        arrays: dict[str, NDArray[Any]] = {
            "weights": self.executor.weights,
            "states": self.states,
            "scratch": scratch,
            "token_ids": aligned(inputs.token_ids),
            "position": aligned(np.array([inputs.position], dtype=np.int64)),
            "logit_rows": aligned(inputs.logit_rows),
            "logits": logits,
        }
        if inputs.embeddings is not None:
            arrays["embeddings"] = aligned(inputs.embeddings)

        def fill(_: int, site: int) -> int:
            pending[site].fill(rows[site])
            return 0

        taken = self.structure(
            await_rows=AwaitRows(fill), **{name: array.ctypes.data for name, array in arrays.items()}
        )
        taken.rows[: len(rows)] = [array.ctypes.data for array in rows]
        run = self.executor.forward[len(inputs.token_ids), len(inputs.logit_rows)]
        assert run(ctypes.byref(taken)) == 0
        return logits
