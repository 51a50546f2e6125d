"""``docs/targets.md``: what became of every target, from what ``benchmarks/target_matrix.py`` wrote."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_targets import profile_names

MATRIX = Path(__file__).parents[1] / "docs" / "targets-matrix.json"
NATIVELY, UNDER_QEMU, ON_POCL, SIMULATED, NOT_RUN = (
    "natively",
    "under qemu",
    "on a CPU by pocl",
    "in the simulator",
    "no",
)
EVIDENCE = {  # of a profile, by the best way in which one of its libraries has run
    NATIVELY: "hardware",
    UNDER_QEMU: "emulated",
    ON_POCL: "emulated",
    SIMULATED: "simulated",
    NOT_RUN: "compiled",
}
HEADS = ("target", "box", "compiled", "run", "same tokens", "code", "weights")
TITLE = """# Targets

<!-- written by `python -m tools` from docs/targets-matrix.json -->

What became of each target where this project is built, an x86-64 machine with AVX512-VNNI: nothing here has run on Arm,
RISC-V or Apple processors, on graphics processors or on accelerators. `engram targets` says the same of each profile as
its evidence. What a target is for and needs: `engram targets show NAME`.
"""
LEGEND = """
- compiled: a library, or a program from C sources, was made of the model without an error. Of graphics processors
  it is the kernels' source: OpenCL's is compiled by a driver, CUDA's by nvcc where there is one, Metal's by nothing.
- run: a whole model. Kernels of targets that have run none are tested one by one: those of `x86-64-amx` with AMX
  instructions carried out by a signal handler, those of `x86-64-avx-vnni` on AVX512-VNNI, of `riscv64-rvv` under qemu.
- same tokens: 32 tokens, chosen greedily, equal to those of `x86-64-v2`, the portable kernels on x86. Where a target
  has not run, the reason stands in place of that.
- code: the compiled library, sources of a graphics processor, or the program built from C. weights: as packed for the
  target, those of the draft head included.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of a target on a box.

    Attributes:
        box: what it ran on, or would have.
        compiled: whether there is a library, or a program.
        run: `NATIVELY`, ..., `NOT_RUN`.
        reason: why it was not compiled or not run; empty where it was.
        same_tokens: whether its tokens are those of the reference, None where it was not run.
        code_bytes, weights_bytes: of what was compiled, 0 where nothing was.
    """

    target: str
    box: str
    compiled: bool
    run: str
    reason: str
    same_tokens: bool | None
    code_bytes: int
    weights_bytes: int


def targets_page() -> str:
    """Return the page."""
    matrix = json.loads(MATRIX.read_text(encoding="utf-8"))
    parts = [section(name, facts) for name, facts in matrix.items()]
    return "\n".join([TITLE, *parts, LEGEND.strip(), ""])


def section(name: str, facts: dict[str, Any]) -> str:
    """Return the part on a model: the command it comes from, and a table."""
    rows = [Row(**row) for row in facts["rows"]]
    names = ", ".join(f"`{target}`" for target in left_out(rows))
    missing = f"\nNot tried yet by this command: {names}.\n" if names else ""
    return f"## {name}\n\n{facts['model']}: `{facts['command']}`.\n\n{table(rows)}\n{missing}"


def left_out(rows: Sequence[Row]) -> list[str]:
    """Return the targets of which there is no row."""
    return sorted(set(profile_names()) - {row.target for row in rows})


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table."""
    lines = [HEADS, ("---",) * len(HEADS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(row: Row) -> Iterator[str]:
    """Yield what a row of the table holds."""
    yield f"`{row.target}`"
    yield row.box
    yield "yes" if row.compiled else "no"
    yield row.run
    yield row.reason if row.same_tokens is None else ("yes" if row.same_tokens else "**no**")
    yield megabytes(row.code_bytes)
    yield megabytes(row.weights_bytes)


def megabytes(size: int) -> str:
    """Return a size for people, nothing for 0."""
    return f"{size / 1e6:,.2f} MB" if size else ""


def evidence_of(rows: Sequence[Row], target: str) -> str:
    """Return what rows show a target to have run on at best."""
    ways = [row.run for row in rows if row.target == target and row.same_tokens is not False]
    return EVIDENCE[min(ways, key=list(EVIDENCE).index, default=NOT_RUN)]
