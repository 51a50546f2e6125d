"""Compile a model for every target, run what can be run here, and compare the tokens.

    python -m benchmarks.target_matrix [--bundle build/demo.engram --name "The demo model"] [--target NAME] [--write]

Without a bundle it is a random model of two layers with an Engram site, compiled for passes of single tokens only.
Each target is compiled in a copy of the bundle, then run natively, under qemu, on pocl or in the simulator, or the
reason is told. The reference is the portable library on x86. With --write the rows go to docs/targets-matrix.json, of
which `python -m tools` makes docs/targets.md; rows of targets that were not asked for stay as they were.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import click
from tests.target_boxes import Task, rows_of

from engram_compilers.build import compile_bundle
from engram_runtime import LLM
from engram_runtime.bundle import Bundle
from engram_runtime.tokenizer import TextTokenizer
from engram_targets import Profile, load_profile, profile_names
from tools.target_matrix import MATRIX, Row, table

REFERENCE, TOKENS = "x86-64-v2", 32
TINY_MODEL = "Two layers with an Engram site, int8, random weights, passes of single tokens"
TINY, TINY_IDS, PROMPT = "A tiny model", (3, 14, 15, 26, 35), "The capital of France is"


def few_passes(profile: Profile) -> Profile:
    """Return a profile that is quick to compile."""
    return dataclasses.replace(profile, decode_tokens=(1,), prefill_tokens=())


def tiny_bundle(home: Path) -> Path:
    """Export a random model."""
    from tests.workshop import Workshop  # on use, as it loads torch

    return Workshop(home).uncompiled().path


def reference_tokens(bundle: Path, prompt: Sequence[int], profile: Profile) -> tuple[int, ...]:
    """Return what the portable library on x86 says."""
    compile_bundle(Bundle.open(bundle), profile)
    with LLM(bundle, target=REFERENCE) as llm:
        return tuple(llm.generate(prompt, max_tokens=TOKENS).token_ids)


def write(name: str, model: str, rows: Sequence[Row]) -> None:
    """Put rows into the file, in place of those of the same targets."""
    matrix = json.loads(MATRIX.read_text(encoding="utf-8")) if MATRIX.exists() else {}
    made = {row.target for row in rows}
    kept = [Row(**row) for row in matrix.get(name, {"rows": []})["rows"] if row["target"] not in made]
    every = sorted([*kept, *rows], key=lambda row: row.target)
    options = "" if name == TINY else f' --bundle {model} --name "{name}"'
    matrix[name] = {
        "model": TINY_MODEL if name == TINY else model,
        "command": f"python -m benchmarks.target_matrix{options} --write",
        "rows": [dataclasses.asdict(row) for row in every],
    }
    MATRIX.write_text(json.dumps(matrix, indent=1) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option("--bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--name", help="What the page calls the model of --bundle.")
@click.option("--target", "targets", multiple=True, type=click.Choice(profile_names()))
@click.option("--write", "written", is_flag=True)
def main(bundle: Path | None, name: str | None, targets: tuple[str, ...], written: bool) -> None:
    if (bundle is None) != (name is None) or name == TINY:
        raise click.UsageError(f"--bundle and --name go together, and {TINY!r} is the random one")
    with tempfile.TemporaryDirectory() as home:
        copy = Path(home) / "copy"
        shutil.copytree(bundle or tiny_bundle(Path(home)), copy)
        profiles = [load_profile(target) for target in (REFERENCE, *(targets or profile_names()))]
        reference, *others = map(few_passes, profiles) if bundle is None else profiles
        prompt = TINY_IDS if bundle is None else TextTokenizer.load(copy).encode(PROMPT)
        expected = cache(partial(reference_tokens, copy, prompt, reference))
        task = Task(copy, Path(home), tuple(prompt), expected, TOKENS)
        rows: list[Row] = []
        for profile in others:
            rows += rows_of(task, profile)
            click.echo(table(rows[-1:]).splitlines()[-1])
            if written:
                write(name or TINY, str(bundle), rows)
    click.echo(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
