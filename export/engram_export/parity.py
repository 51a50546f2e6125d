"""Compare a bundle with its checkpoint as transformers runs it: a reference that shares no code with ours."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from engram_export.checkpoint import open_checkpoint
from engram_export.verify import VERIFY_TEXT, check_parity, compare
from engram_runtime.bundle import Bundle
from engram_runtime.commands.evaluate import read_text
from engram_runtime.errors import CheckpointError, RequestError
from engram_runtime.evaluation.losses import negative_log_likelihood
from engram_runtime.evaluation.parity import Logits
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer

WINDOW = 512  # tokens run at once by both


def check_checkpoint(path: Path) -> None:
    """Refuse what is no checkpoint, before the minutes a comparison takes; raises CheckpointError."""
    open_checkpoint(path)


def checkpoint_logits(checkpoint: Path, vocab_size: int) -> Logits:
    """Load a checkpoint, a folder or a GGUF file, in float32; returns what runs tokens through it.

    Raises:
        CheckpointError: its vocabulary is not of ``vocab_size`` tokens.
    """
    folder, file = (checkpoint.parent, checkpoint.name) if checkpoint.is_file() else (checkpoint, None)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,  # no code of the folder's, and no pickles
        use_safetensors=None if file else True,
    )
    if (found := len(model.get_output_embeddings().weight)) != vocab_size:
        raise CheckpointError(
            f"checkpoint {checkpoint} has a vocabulary of {found} tokens, the bundle one of {vocab_size}; give the one "
            "that it was made from"
        )

    def run(token_ids: Sequence[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits: NDArray[np.float32] = model(torch.tensor([token_ids])).logits[0].numpy()
        return logits

    return run


def compare_with_transformers(
    session: Session, bundle: Bundle, checkpoint: Path, text: Path | None, tokens: int
) -> dict[str, Any]:
    """Return logit differences and both perplexities on a text."""
    if text is None:
        content = resources.files("engram_export").joinpath(VERIFY_TEXT).read_text(encoding="utf-8")
    else:
        content = read_text(text)
    token_ids = np.array(TextTokenizer.load(bundle.path).encode(content)[:tokens], dtype=np.int64)
    expected, found, losses = [], [], []
    if len(token_ids) < 2:
        raise RequestError(f"a text of {len(token_ids)} tokens has nothing to compare")
    reference = checkpoint_logits(checkpoint, bundle.manifest.model.vocab_size)
    window = min(WINDOW, bundle.manifest.model.context_length)
    for start in range(0, len(token_ids), window):
        ids = token_ids[start : start + window]
        expected.append(reference(ids.tolist()))
        session.trim(len(session))
        found.append(np.concatenate(list(session.logits(ids.tolist()))))
        losses.append([negative_log_likelihood(part[-1][:-1], ids[1:]) for part in (expected, found)])
    parity = compare(np.concatenate(expected), np.concatenate(found))
    if bundle.manifest.model.quantisation == "none":
        check_parity(parity)
    ours, theirs = (float(np.exp(np.concatenate([pair[side] for pair in losses]).mean())) for side in (1, 0))
    return {
        **asdict(parity),
        "perplexity": ours,
        "float32_perplexity": theirs,
        "perplexity_ratio": ours / theirs,
    }
