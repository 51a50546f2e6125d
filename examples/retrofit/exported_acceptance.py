"""Acceptance of the exported head's drafts, on text that the bundle itself writes greedily."""

from collections.abc import Sequence

import click
import numpy as np
import torch
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.draft_head import DraftHead
from engram_runtime.executor import Executor
from engram_runtime.generation import decode_tokens
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer
from examples.retrofit.acceptance import agreement
from examples.retrofit.mtp_commands import MAX_NEW_TOKENS, MIN_GENERATED
from examples.retrofit.mtp_data import Example
from examples.retrofit.mtp_head import MAX_STEPS
from examples.retrofit.prompts import Prompt

GREEDY = SamplingOptions()


def written(bundle: Bundle, executor: Executor, prompts: Sequence[Prompt]) -> list[Example]:
    """Let a bundle without its table continue prompts greedily, and take its states.

    Answers too short to draft in are left out.
    """
    tokenizer = TextTokenizer.load(bundle.path)
    with (
        Session.open(bundle, executor, tables_on=False) as session,
        click.progressbar(prompts, label=f"answers, {executor.name}", width=30) as bar,
    ):
        examples = [_continued(session, tokenizer, prompt) for prompt in bar]
    return [example for example in examples if example.generated >= MIN_GENERATED]


def _continued(session: Session, tokenizer: TextTokenizer, prompt: Prompt) -> Example:
    asked = tokenizer.encode(prompt.rendered(), add_special_tokens=False)
    session.trim(len(session))
    states, said = [], []
    logits = session.prefill(asked)
    for token in decode_tokens(
        session, logits, make_sampler(GREEDY), max_tokens=MAX_NEW_TOKENS, end_ids=tokenizer.eos_token_ids
    ):
        said.append(token)
        states.append(session.hidden.copy())
    return Example(torch.tensor([*asked, *said]), torch.from_numpy(np.concatenate(states)), len(asked), prompt.domain)


def exported_drafts(head: DraftHead, example: Example) -> NDArray[np.int64]:
    """Draft with the exported head from the bundle's states; a `Drafter` of `examples.retrofit.acceptance`."""
    tokens, hidden = example.tokens.tolist(), example.hidden.numpy()
    head.trim(len(head))
    head.extend(tokens[1 : example.start], hidden[: example.start - 1])
    return np.array(
        [
            agreement(
                head.draft(tokens[at : at + 1], hidden[at - 1 : at], MAX_STEPS), tokens[at + 1 : at + 1 + MAX_STEPS]
            )
            for at in range(example.start, len(tokens) - 1)
        ],
        dtype=np.int64,
    )
