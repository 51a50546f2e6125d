"""Decode by packed C programs and by the Python runtime's libraries on one thread, in turn.

    engram pack build/demo.engram --target c-portable -o build/demo.c && make -C build/demo.c
    python benchmarks/c_program.py build/demo.engram build/demo.c build/demo.c/engram --target x86-64-v2 --target native

Programs and libraries run round by round, so other processes slow them alike; ratios to the first program are taken
within rounds. Their ids are compared: all must be those of the first. Sections of code are those of `size`.
"""

import re
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click

from engram_runtime import LLM

PROMPT = "The capital of France is"
HEADS = ("runner", "tok/s", "least to most", "to the first", "same ids")
DECODED = re.compile(r"decode \d+ tokens in [0-9.]+ s, ([0-9.]+) tok/s")
Run = Callable[[], tuple[float, Sequence[int]]]  # tokens per second and the ids


def run_program(path: Path, folder: Path, prompt: Sequence[int], tokens: int) -> tuple[float, Sequence[int]]:
    """Decode by a packed program."""
    command: list[str | Path] = [path.absolute(), "-d", folder, "-n", str(tokens), "--time", *map(str, prompt)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = DECODED.search(done.stderr)
    assert found is not None
    return float(found[1]), tuple(map(int, done.stdout.split()))


def run_library(llm: LLM, prompt: Sequence[int], tokens: int) -> tuple[float, Sequence[int]]:
    """Decode by a compiled library."""
    llm.session.trim(len(llm.session))
    generation = llm.generate(prompt, max_tokens=tokens)
    return generation.decode_tok_s, generation.token_ids


def print_code_bytes(program: Path) -> None:
    """Print what a program's file holds."""
    sizes = subprocess.run(["size", program], check=True, capture_output=True, text=True).stdout.splitlines()[1].split()
    print(f"{program}: code and constants {sizes[0]} bytes, data {sizes[1]}, zeros {sizes[2]}")


def print_row(name: str, rates: Sequence[float], first: Sequence[float], *, same: bool) -> None:
    """Print what one of them reached in all rounds."""
    ratio = statistics.median(rate / base for rate, base in zip(rates, first, strict=True))
    cells = (
        name,
        f"{statistics.median(rates):.1f}",
        f"{min(rates):.1f} to {max(rates):.1f}",
        f"{ratio:.2f}",
        str(same),
    )
    print(f"| {' | '.join(cells)} |")


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("programs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--target", "targets", multiple=True, default=("native",), help="A library of the bundle.")
@click.option("--tokens", default=32, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(
    bundle: Path, folder: Path, programs: tuple[Path, ...], targets: tuple[str, ...], tokens: int, rounds: int
) -> None:
    """Time PROGRAMS on FOLDER beside libraries of BUNDLE."""
    models = {target: LLM(bundle, threads=1, target=target) for target in targets}
    prompt = next(iter(models.values())).tokenizer.encode(PROMPT)
    runs: dict[str, Run] = {str(path): partial(run_program, path, folder, prompt, tokens) for path in programs}
    runs |= {target: partial(run_library, llm, prompt, tokens) for target, llm in models.items()}
    results = [{name: run() for name, run in runs.items()} for _ in range(rounds)]
    for program in programs:
        print_code_bytes(program)
    print(f"| {' | '.join(HEADS)} |\n|---|---|---|---|---|")
    first = str(programs[0])
    for name in runs:
        rates = [result[name][0] for result in results]
        same = all(result[name][1] == result[first][1] for result in results)
        print_row(name, rates, [result[first][0] for result in results], same=same)


if __name__ == "__main__":
    main()
