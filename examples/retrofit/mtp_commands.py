"""Commands of the draft head: the model writes text, a head is trained on it, and its drafts are counted."""

import json
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.retrofit import acceptance as counting
from examples.retrofit.generation import Continuation
from examples.retrofit.generation import generate as write_on
from examples.retrofit.mtp_artefact import config_block, load_head, save_int8
from examples.retrofit.mtp_data import Example, draft_vocabulary, read_examples
from examples.retrofit.mtp_head import DraftHead, Frozen
from examples.retrofit.mtp_training import Recipe, train
from examples.retrofit.prompts import Prompt, read_prompts, training_prompts

DRAFT_VOCABULARY = 16_384
MIN_GENERATED = 4  # tokens; shorter answers hold no draft to speak of

checkpoint_option = click.option(
    "--checkpoint", type=click.Path(path_type=Path, exists=True), required=True, help="Folder of transformers or GGUF file."
)
work_option = click.option(
    "--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True, help="Work folder."
)


def load(checkpoint: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint on one thread's worth of torch; GGUF weights are dequantised."""
    torch.set_num_threads(1)
    folder, file = (checkpoint, {}) if checkpoint.is_dir() else (checkpoint.parent, {"gguf_file": checkpoint.name})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **file).eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(folder, local_files_only=True, **file)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt, nothing added."""
    ids: list[int] = tokenizer.encode(prompt.rendered(), add_special_tokens=False)
    return ids


@click.command()
@checkpoint_option
@work_option
def train_head(checkpoint: Path, work: Path) -> None:
    """Train a draft head on the text in WORK/generated; goes on where it was stopped."""
    model, tokenizer = load(checkpoint, torch.float32)
    examples = [example for example in read_examples(work / "generated") if example.generated >= MIN_GENERATED]
    single = [index for piece, index in tokenizer.get_vocab().items() if len(piece) == 1]
    always = [*tokenizer.all_special_ids, *single]
    vocabulary = draft_vocabulary(examples, always, model.config.vocab_size, DRAFT_VOCABULARY)
    tokens = sum(example.generated for example in examples)
    click.echo(f"{len(examples)} answers, {tokens:,} generated tokens")
    folder = work / "head"
    train(model, DraftHead(model, vocabulary), examples, folder, Recipe())
    save_int8(folder / "head.safetensors", folder / "mtp.safetensors")
    block = json.dumps(config_block(model, len(vocabulary)), indent=1)
    (folder / "mtp-config.json").write_text(block, encoding="utf-8")
