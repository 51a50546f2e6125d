"""C10: trusted code that ends the process it runs in."""

import contextlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

from tests.faults.libraries import BOXES, X86_64
from tests.faults.row import CannotRun, Outcome, Row
from tests.tiny import TinyModel, TinySite
from tests.workshop import Workshop

from engram_runtime import LLM, Bundle, cpu
from engram_runtime.bundle import file_sha256
from engram_runtime.errors import EngramError, TargetError
from engram_runtime.library import find_library
from engram_runtime.trust import trial
from engram_runtime.trust.records import TRUSTED, keep_record
from engram_targets import load_cpu_profile

FIND = """
import sys
from engram_runtime.trust.library import *
trusted_library(Bundle.open(Path(sys.argv[1])))
"""
PROMPT_IDS, SAID = [5, 6, 7], 6
QEMU = "qemu-x86_64-static"
ILLEGAL = {X86_64: b"\x0f\x0b"}  # an instruction that no processor has; elsewhere zeros are none
LOADED, EXECUTABLE = 1, 1  # ELF's PT_LOAD and PF_X


def crashing_code(count: int) -> Outcome:
    """Load trusted libraries of which stretches of code are other instructions, in this process.

    A trial finds what ends a process; were it not for that, this row would end by a signal.
    """
    failures, refused, harmless = [], 0, 0
    with compiled_bundle() as bundle, LLM(bundle.path, threads=1) as llm:
        expected = llm.generate(PROMPT_IDS, max_tokens=SAID).token_ids
        rng = random.Random("C10 crash")
        for number in range(count):
            begin, length = rng.random() * 0.9, rng.choice([0.02, 0.1, 0.5, 1.0])
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(shutil.copytree(bundle.path, Path(folder) / "bundle"))
                spoil(copy, begin, length)
                found = outcome(copy, expected)
            refused += found == "refused"
            harmless += found == "same tokens"
            if found not in ("refused", "same tokens"):
                failures.append(f"{number}: code from {begin:.3f} on, {length} of it: {found}")
    figure = f"{refused} refused, {harmless} where the code isn't used"
    return Outcome(tried=count, survived=count - len(failures), figure=figure, failures=tuple(failures[:10]))


def spoil(folder: Path, begin: float, length: float) -> None:
    """Put instructions that no processor has into a library, and have this user trust it."""
    place, info = find_library(Bundle.open(folder))
    code = place / info.library
    code.write_bytes(with_illegal_instructions(code.read_bytes(), begin, length))
    changed = replace(info, sha256=info.sha256 | {"library": file_sha256(code)})
    (place / "compile.json").write_bytes(changed.to_bytes())
    keep_record(changed, TRUSTED, place)


def outcome(folder: Path, expected: Sequence[int]) -> str:
    try:
        with LLM(folder, threads=1) as llm:
            made = llm.generate(PROMPT_IDS, max_tokens=SAID).token_ids
    except EngramError as error:
        return "refused" if isinstance(error, TargetError) else str(error)
    return "same tokens" if made == expected else f"other tokens {made}"


def with_illegal_instructions(code: bytes, begin: float, length: float) -> bytes:
    """Return a library whose code from a share of it on is instructions that no processor has."""
    made = bytearray(code)
    headers, (size, number) = struct.unpack_from("<Q", code, 32)[0], struct.unpack_from("<HH", code, 54)
    for place in range(headers, headers + size * number, size):
        kind, flags, offset, _, _, extent = struct.unpack_from("<IIQQQQ", code, place)
        if kind == LOADED and flags & EXECUTABLE:
            first, last = int(extent * begin) & ~1, min(int(extent * (begin + length)), extent)
            made[offset + first : offset + last] = (ILLEGAL.get(cpu.machine(), b"\0\0") * extent)[: last - first]
    return bytes(made)


@contextlib.contextmanager
def compiled_bundle() -> Iterator[Bundle]:
    """Yield a tiny bundle with a library."""
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        checkpoint = workshop.checkpoint(TinyModel(), TinySite())
        yield workshop.compiled(
            workshop.bundle(checkpoint, quant="int8"), decode_tokens=(1, 2), prefill_tokens=(8,), mcpu=host_mcpu()
        )


def host_mcpu() -> str:
    """Return the processor that code is generated for: this one's, so that older ones can't run it."""
    return load_cpu_profile("native").llvm.mcpu


def emulated(count: int) -> Outcome:
    """Have older processors find and run code for this one."""
    if (qemu := shutil.which(QEMU)) is None or cpu.machine() != X86_64:
        raise CannotRun(f"no {QEMU} on x86_64: apt-get install qemu-user-static")
    if not {"avx2"} <= cpu.cpu_flags():
        raise CannotRun("this processor has no AVX2, which older ones could lack: use a newer one")
    cases: list[tuple[str, Callable[[str, Path, Bundle], str]]] = [
        ("Nehalem", refused_by_flags),
        ("Nehalem", ended_in_trial),
        ("Core 2", refused_by_flags),
    ]
    failures = []
    with compiled_bundle() as bundle:
        for box, run in cases[:count]:
            if failure := run(qemu, Path(box), bundle):
                failures.append(f"{box}: {failure}")
    tried = min(count, len(cases))
    return Outcome(tried=tried, survived=tried - len(failures), failures=tuple(failures))


def refused_by_flags(qemu: str, box: Path, bundle: Bundle) -> str:
    """Look for a library on an emulated processor whose features are those that Linux would tell."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "proc" / "cpuinfo"
        told.parent.mkdir()
        told.write_text(f"flags : {BOXES[box.name][2]}\n")
        program = (
            f"from engram_runtime.trust.library import *; trusted_library(Bundle.open(Path({str(bundle.path)!r})))"
        )
        line = [qemu, "-cpu", "Nehalem", "-L", folder, sys.executable, "-c", program]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    return "" if "needs CPU features" in done.stderr and done.returncode == 1 else f"{done.returncode} {done.stderr}"


def ended_in_trial(qemu: str, box: Path, bundle: Bundle) -> str:
    """Try a library in an emulated process that is told of the features this machine has, and lacks them."""
    folder, info = find_library(bundle)
    with tempfile.TemporaryDirectory() as home:
        python = Path(home) / "python"
        python.write_text(f'#!/bin/sh\nexec {qemu} -cpu {box} {sys.executable} "$@"\n')
        python.chmod(0o755)
        with mock.patch.object(sys, "executable", str(python)):
            try:
                trial.require_trial(bundle, folder, info)
            except TargetError as error:
                return "" if "was ended by signal 4" in str(error) else str(error)
    return "it ran"


ROWS = (
    Row(
        name="C10 crash",
        fault="trusted code with illegal instructions",
        expected="TargetError, or the same tokens where they aren't reached; 0 signals in this process",
        quick=3,
        full=200,
        run=crashing_code,
    ),
    Row(
        name="C10 emulated",
        fault="code for this processor on an older one",
        expected="refused by its features, or by the trial; 0 signals outside of it",
        quick=2,
        full=3,
        run=emulated,
    ),
)
