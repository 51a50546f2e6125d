"""Instructions of the kernels for Arm: a static figure, where there is no Arm machine to measure their speed on.

The innermost loop with most multiplications of a kernel is counted and, where int4 has one of its own, the loop that
unpacks. Instructions differ in what they take: this says nothing of milliseconds.

    python benchmarks/instruction_counts.py
"""

import re
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import tvm

from engram_compilers.kernels import neon_dotprod, neon_i8mm
from engram_targets import load_cpu_profile

OUTPUTS, INPUTS = 96, 1024
SHAPES = ((1, 1), (1, 2), (2, 2), (3, 2), (8, 2))  # rows and planes
FAMILIES = (
    (neon_dotprod, "aarch64-dotprod", "sdot", 16),
    (neon_i8mm, "aarch64-i8mm", "usmmla", 32),
)  # instruction, and how many products of bytes it makes
BRANCH = re.compile(r"\s+(?:b|b\.\w+|cbn?z|tbn?z)\s.*?(\.L\w+)$")
LABEL = re.compile(r"(\.L\w+):")


def main() -> None:
    """Print a line for each layer and family."""
    print(f"instructions for 64 products, {OUTPUTS} outputs of {INPUTS} inputs")
    for kind in ("int8", "int4"):
        for rows, planes in SHAPES:
            counts = [f"{each[2]} {products_cost(kind, rows, planes, *each):5.1f}" for each in FAMILIES]
            print(f"{kind}, rows {rows}, planes {planes}: {', '.join(counts)}")


def products_cost(
    kind: str, rows: int, planes: int, family: ModuleType, target: str, instruction: str, products: int
) -> float:
    """Return the instructions of the loops that a kernel spends its time in, for 64 products of use."""
    kernel = getattr(family, f"linear_{kind}")(rows, OUTPUTS, INPUTS, planes).with_attr("global_symbol", "layer")
    compiled = tvm.compile(tvm.IRModule({"layer": kernel}), tvm.target.Target(load_cpu_profile(target).llvm.target))
    loops = list(innermost_loops(compiled.mod.inspect_source("asm")))
    multiplying = max(loops, key=lambda loop: loop[instruction])
    made = multiplying[instruction] * products
    cost = multiplying.total() / made
    if rows * planes == 1 and instruction == "usmmla":
        cost *= 2  # half of what it makes is of a row with itself
    unpacking = max((loop for loop in loops if not loop[instruction]), key=lambda loop: loop["mul"])
    if unpacking["mul"]:
        weights = unpacking["mul"] * 16
        cost += unpacking.total() / (weights * rows * planes)
    return 64 * cost


def innermost_loops(assembly: str) -> Iterator[Counter[str]]:
    """Yield the mnemonics of each loop that holds no other one."""
    lines = [line.split("//")[0].rstrip() for line in assembly.splitlines()]
    labels = {match[1]: place for place, line in enumerate(lines) if (match := LABEL.match(line))}
    spans = [
        (labels[match[1]], place)
        for place, line in enumerate(lines)
        if (match := BRANCH.match(line)) and labels.get(match[1], place) < place
    ]
    for start, end in spans:
        if not any(start <= inner and last <= end and (start, end) != (inner, last) for inner, last in spans):
            body = (line.split() for line in lines[start : end + 1] if line.startswith("\t"))
            yield Counter(words[0] for words in body if words and not words[0].startswith("."))


if __name__ == "__main__":
    main()
