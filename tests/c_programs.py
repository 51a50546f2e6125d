"""C programs of packed folders, built here: as a library that ctypes calls, or to be run."""

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

SOURCES = Path(str(resources.files("engram_compilers.c").joinpath("sources")))
RUNTIME = sorted(path for path in SOURCES.glob("*.c") if path.name != "main.c")
STRICT = ("-std=c11", "-pedantic", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", "-ffp-contract=off")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
BUILD_S, RUN_S = 120, 120


def zig(triple: str) -> list[str]:
    """Return the command of a C compiler for another machine."""
    return [sys.executable, "-m", "ziglang", "cc", "-target", triple]


def build(out: Path, sources: Sequence[Path], *flags: str, compiler: Sequence[str] = ("gcc",)) -> Path:
    """Compile sources to a program or a library, with every warning an error."""
    include = [f"-I{folder}" for folder in {path.parent for path in sources}]
    command: list[str | Path] = [*compiler, *STRICT, *flags, *include, "-o", out, *sources, "-lm"]
    subprocess.run(command, check=True, timeout=BUILD_S)
    return out


def run(command: Sequence[str | Path], given: str = "") -> tuple[int, str, str]:
    """Run a program; returns its exit code, what it printed and what it said on standard error."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=RUN_S, check=False)
    return done.returncode, done.stdout, done.stderr


class _Error(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char * 320),)


class _Model(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("vocab_size", ctypes.c_int32),
        ("context_length", ctypes.c_size_t),
        ("num_end_ids", ctypes.c_size_t),
        ("end_ids", ctypes.POINTER(ctypes.c_int32)),
        ("weights_bytes", ctypes.c_uint64),
        ("state_bytes", ctypes.c_uint64),
        ("scratch_bytes", ctypes.c_uint64),
    )


ADDRESS = ctypes.c_void_p
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "about": (ctypes.POINTER(_Model), ()),
    "open": (ADDRESS, (ctypes.c_char_p, ADDRESS)),
    "step": (ctypes.POINTER(ctypes.c_float), (ADDRESS, ADDRESS, ctypes.c_size_t, ADDRESS)),
    "greedy": (ctypes.c_int32, (ADDRESS, ADDRESS)),
    "ends": (ctypes.c_int, (ctypes.c_int32,)),
    "length": (ctypes.c_size_t, (ADDRESS,)),
    "reset": (ctypes.c_int, (ADDRESS, ADDRESS)),
    "close": (None, (ADDRESS,)),
    "verify": (ctypes.c_int, (ctypes.c_char_p, ADDRESS)),
}


class CError(Exception):
    """What the C runtime says of a call that failed."""


class CLibrary:
    """The functions of ``engram.h``."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = self.function(name)
            function.restype, function.argtypes = result, arguments

    def function(self, name: str) -> Any:
        return getattr(self.c, f"engram_{name}")

    @property
    def about(self) -> _Model:
        return self.function("about")().contents  # type: ignore[no-any-return]

    def verify(self, folder: Path) -> None:
        error = _Error()
        if self.function("verify")(str(folder).encode(), ctypes.byref(error)):
            raise CError(error.text.decode())

    def greedy(self, logits: NDArray[np.float32]) -> int:
        error = _Error()
        token_id: int = self.function("greedy")(logits.ctypes.data, ctypes.byref(error))
        if token_id < 0:
            raise CError(error.text.decode())
        return token_id


class CText:
    """An ``engram``: a packed model with one text."""

    def __init__(self, library: CLibrary, folder: Path) -> None:
        self._library = library
        self._error = _Error()
        self._handle = library.function("open")(str(folder).encode(), ctypes.byref(self._error))
        if not self._handle:
            raise CError(self._error.text.decode())

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Add tokens; returns a copy of the logits ``[V]``."""
        ids = np.array(token_ids, dtype=np.int32)
        error = ctypes.byref(self._error)
        logits = self._library.function("step")(self._handle, ids.ctypes.data, len(ids), error)
        if not logits:
            raise CError(self._error.text.decode())
        return np.ctypeslib.as_array(logits, (self._library.about.vocab_size,)).copy()

    def reset(self) -> None:
        assert self._library.function("reset")(self._handle, ctypes.byref(self._error)) == 0

    def __len__(self) -> int:
        length: int = self._library.function("length")(self._handle)
        return length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.function("close")(self._handle)
