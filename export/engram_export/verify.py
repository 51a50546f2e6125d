"""Hold an exported bundle against the checkpoint's own float32 model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engram_export.calibration_report import CalibrationReport
from engram_export.checkpoint import Checkpoint
from engram_export.export_memory import VERIFY_TOKENS
from engram_export.formats import FLOAT, WeightFormat
from engram_export.host_table import TableSource
from engram_export.repack import RowErrors
from engram_export.source import ModelSource, load_own_parameters
from engram_export.streamed import EncodedRows, streamed_format
from engram_export.table_writer import checkpoint_site, open_rows
from engram_runtime.bundle import Bundle
from engram_runtime.detokenise import native_errors
from engram_runtime.errors import CheckpointError, VerificationError
from engram_runtime.session import UNLOADED, open_sites

VERIFY_TEXT = "verify_text.txt"
ROUTED_TOLERANCE, ROUTED_AGREEMENT = 2e-2, 0.9  # of most positions of a model with experts
FLOAT_TOLERANCE = 2e-3  # largest logit difference of a float graph: other summation orders over some 30 layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How far two models' logits are apart, over the last positions of a text.

    Attributes:
        median_abs: the median over positions of a position's largest difference.
    """

    tokens: int
    max_abs: float
    median_abs: float
    mean_abs: float
    argmax_agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How far a bundle is from its checkpoint.

    Attributes:
        graph: the graph against torch with the same weights.
        model: the graph, activations in float32, against the float32 model.
        rows: by site, the repacked rows against the checkpoint's.
        calibration: how int4 layers were quantised, or None where there are none.
        draft: the draft head's graph against torch with the same weights and hidden states, or None without a head.
    """

    graph: Parity
    model: Parity
    rows: Mapping[str, RowErrors] = field(default_factory=dict)
    calibration: CalibrationReport | None = None
    draft: Parity | None = None

    @property
    def parities(self) -> Mapping[str, Parity]:
        """What was compared with what, in the order it is told."""
        compared = {"graph, torch, same weights": self.graph, "bundle, float32 checkpoint": self.model}
        return compared if self.draft is None else {**compared, "draft head, torch, same weights": self.draft}


def verify_tokens(checkpoint: Checkpoint, vocab_size: int, context_length: int) -> NDArray[np.int64]:
    """Return the ids of the fixed text, or fixed random ids for a checkpoint without a tokenizer.

    Raises:
        CheckpointError: a tokenizer that can't be read, that gives no tokens, or one of a model with more tokens.
    """
    limit = min(VERIFY_TOKENS, context_length)
    if checkpoint.tokenizer_json is None:
        return np.random.default_rng(0).integers(0, vocab_size, size=limit)
    text = resources.files("engram_export").joinpath(VERIFY_TEXT).read_text(encoding="utf-8")
    with native_errors(CheckpointError, f"the tokenizer of {checkpoint.source} can't be used"):
        token_ids = Tokenizer.from_buffer(checkpoint.tokenizer_json).encode(text).ids[:limit]
    if not token_ids:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.source} gives no tokens for the text that bundles are verified on; give the "
            f"model's own tokenizer.json"
        )
    if (largest := max(token_ids)) >= vocab_size:
        raise CheckpointError(f"the tokenizer gives id {largest}, the model has {vocab_size} tokens")
    return np.array(token_ids, dtype=np.int64)


def reference_logits(
    source: ModelSource,
    token_ids: NDArray[np.int64],
    weights: WeightFormat = FLOAT,
    *,
    encoded: EncodedRows | None = None,
    rows: Sequence[NDArray[np.float32]] | None = None,
    last: int | None = None,
) -> NDArray[np.float32]:
    """Run the torch model; returns ``[T, V]``, or ``[last, V]`` of the last positions.

    Weights are read as they are needed, so memory does not grow with the model.

    Args:
        weights: their format. ``encoded``: where they are read in it; by default they are encoded anew.
        rows: ``[T, C, d]`` for each table, or None to take them straight from the checkpoint.
    """
    tokens = len(token_ids)
    model = source.build(streamed_format(weights, encoded or source), context_length=tokens)
    load_own_parameters(model, source)
    if rows is None:
        rows = [checkpoint_rows(table, source, token_ids) for table in source.tables]
    states = []
    for state in model.state_specs():
        *outer, length, width = state.shape
        states.append(torch.zeros(*outer, tokens if state.rolls_back else length, width))
    with torch.no_grad():
        logits, *_ = model(
            torch.from_numpy(token_ids),
            torch.zeros(1, dtype=torch.int64),
            torch.arange(0 if last is None else tokens - last, tokens),
            [torch.from_numpy(values) for values in rows],
            states,
        )
    values: NDArray[np.float32] = logits.numpy()
    return values


def reference_drafts(
    source: ModelSource,
    token_ids: NDArray[np.int64],
    hidden: NDArray[np.float32],
    weights: WeightFormat,
    *,
    encoded: EncodedRows,
    last: int,
) -> NDArray[np.float32]:
    """Run the torch draft head over ``[T]`` token ids, each after a position with ``hidden [T, D]``.

    Returns ``[last, n]`` of the last positions; arguments as for `reference_logits`.
    """
    tokens = len(token_ids)
    head = source.build_draft(streamed_format(weights, encoded), context_length=tokens)
    load_own_parameters(head, source)
    with torch.no_grad():
        logits, *_ = head(
            torch.from_numpy(token_ids),
            torch.zeros(1, dtype=torch.int64),
            torch.arange(tokens - last, tokens),
            torch.from_numpy(hidden),
            [torch.zeros(state.shape) for state in head.state_specs()],
        )
    values: NDArray[np.float32] = logits.numpy()
    return values


def bundle_rows(bundle: Bundle, token_ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Return the ``[T, C, d]`` rows a bundle gives for a text, site by site."""
    sites = open_sites(bundle, UNLOADED)
    rows = [site.rows([], token_ids) for site in sites]
    for site in sites:
        site.table.close()
    return rows


def compare(reference: NDArray[np.float32], found: NDArray[np.float32]) -> Parity:
    """Compare ``[T, V]`` logits.

    Raises:
        VerificationError: a logit is not a finite number.
    """
    for logits, where in ((reference, "the checkpoint's own model"), (found, "the bundle")):
        if not np.isfinite(logits).all():
            raise VerificationError(f"{int((~np.isfinite(logits)).sum())} logits of {where} are not finite numbers")
    difference = np.abs(reference - found)
    return Parity(
        tokens=len(found),
        max_abs=float(difference.max()),
        median_abs=float(np.median(difference.max(axis=1))),
        mean_abs=float(difference.mean(dtype=np.float64)),
        argmax_agreement=float((reference.argmax(axis=1) == found.argmax(axis=1)).mean()),
    )


def check_parity(parity: Parity, *, routed: bool = False) -> None:
    """Refuse a graph that does not compute what torch computes with the same weights.

    Args:
        routed: the model has experts. Where two are as good as equal, rounding decides which one a token takes; that
            token's logits are then far off and later ones a little, so most positions must agree, not all.

    Raises:
        VerificationError: the logits differ by more than rounding explains.
    """
    if routed and parity.median_abs <= ROUTED_TOLERANCE and parity.argmax_agreement >= ROUTED_AGREEMENT:
        return
    if parity.max_abs > FLOAT_TOLERANCE:
        raise VerificationError(
            f"the graph's logits differ from the model's by {parity.max_abs:.2e} with the same weights, at most "
            f"{FLOAT_TOLERANCE} is rounding; this is another model"
        )


def checkpoint_rows(table: TableSource, source: ModelSource, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the ``[T, C, d]`` rows of a table for a text, read from the checkpoint."""
    with open_rows(table) as rows:
        return checkpoint_site(table, source.architecture.text.vocab_size, rows).rows([], token_ids)
