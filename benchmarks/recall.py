"""Recall of the pilot's facts: greedy answers that state the definition word for word, tables on and off.

python benchmarks/recall.py build/demo.engram
"""

import json
from pathlib import Path

import click

from engram_runtime import LLM

FACTS = Path(__file__).parents[1] / "assets" / "smollm2-engram-pilot" / "facts.jsonl"
QUESTION = "<|im_start|>user\nTell me what {term} is.<|im_end|>\n<|im_start|>assistant\n"
MAX_TOKENS = 64


def recalls(llm: LLM, term: str, definition: str, *, restated: bool) -> bool:
    """Whether the greedy answer is the definition; the prompt ends with the restated term, or the model restates it."""
    question = QUESTION.format(term=term)
    if restated:
        stated = llm.generate(f"{question}{term[0].upper()}{term[1:]}:", max_tokens=MAX_TOKENS).text
    else:
        stated = llm.generate(question, max_tokens=MAX_TOKENS).text.partition(":")[2]
    return stated.strip().rstrip(".") == definition.strip().rstrip(".")


def recall(
    bundle: Path, executor: str, *, tables_on: bool, restated: bool, facts: list[dict[str, str]]
) -> tuple[int, int]:
    """Return how many trained and how many untrained facts are recalled."""
    known = {True: 0, False: 0}
    with (
        LLM(bundle, executor, tables_on=tables_on) as llm,
        click.progressbar(facts, label=f"{executor}, tables {'on' if tables_on else 'off'}") as bar,
    ):
        for fact in bar:
            known[bool(fact["trained"])] += recalls(llm, fact["term"], fact["definition"], restated=restated)
    return known[True], known[False]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--executor", "executors", multiple=True, default=["tvm", "onnxruntime"])
@click.option("--restated/--free", default=True, help="End the prompt with the term, or let the model restate it.")
def main(bundle: Path, executors: tuple[str, ...], restated: bool) -> None:
    """Print recalled facts of BUNDLE for each executor, tables on and off."""
    facts = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
    trained = sum(bool(fact["trained"]) for fact in facts)
    for executor in executors:
        for tables_on in (True, False):
            known, unknown = recall(bundle, executor, tables_on=tables_on, restated=restated, facts=facts)
            click.echo(
                f"{executor:12} tables {'on ' if tables_on else 'off'}  trained {known}/{trained} "
                f"({known / trained:.1%})  untrained {unknown}/{len(facts) - trained}"
            )


if __name__ == "__main__":
    main()
