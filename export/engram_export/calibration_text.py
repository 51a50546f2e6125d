"""The text int4 is calibrated on, as windows of token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engram_export.export_memory import MAX_WINDOWS, WINDOW
from engram_export.formats import FLOAT
from engram_export.smoothing import is_dense
from engram_export.source import ModelSource
from engram_export.text_decoder import TextDecoder
from engram_runtime.commands.evaluate import read_text
from engram_runtime.detokenise import native_errors
from engram_runtime.errors import CheckpointError, RequestError

BUILT_IN, NONE = "built-in", "none"  # what --calibration may be, or a file
BUILT_IN_TEXT = "calibration_text.txt"
HELD_OUT = 10  # one window in so many measures instead, from the first on


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Windows of a text, token ids ``[T]`` each: to calibrate on, and to measure with; ``name`` is the text's."""

    name: str
    calibration: Sequence[Tensor]
    held_out: Sequence[Tensor]


def check_calibration(quant: str, calibration: str) -> None:
    """Refuse a text that would have no effect, or that can't be read; raises RequestError."""
    if calibration in (BUILT_IN, NONE):
        return
    if quant != "int4":
        raise RequestError(f"--calibration {calibration} is for --quant int4, this is {quant}; leave it out")
    _read_text(calibration)


def rounding_reason(source: ModelSource, calibration: str) -> str | None:
    """Return why the int4 layers of a model are rounded without calibration, or None if they are calibrated.

    Raises:
        CheckpointError: a text was given, and the model can't be calibrated on it.
    """
    if calibration == NONE:
        return "--calibration none"
    if _can_calibrate(source):
        return None
    reason = f"calibration knows layers of attention and SwiGLU, {source.architecture.text.family!r} has others"
    if calibration != BUILT_IN:
        raise CheckpointError(f"{reason}; leave out --calibration {calibration}")
    return reason


def _can_calibrate(source: ModelSource) -> bool:
    """Return whether a model is a text decoder all of whose layers are attention and SwiGLU."""
    model = source.skeleton(FLOAT)
    return isinstance(model, TextDecoder) and all(map(is_dense, model.layers))


def calibration_windows(source: ModelSource, calibration: str) -> Windows:
    """Split a text into windows of equal length; what is left at its end is not used.

    Raises:
        CheckpointError: no tokenizer to encode it with, or one that can't be used.
        RequestError: a file that can't be read, or too short a text.
    """
    tokenizer = source.checkpoint.tokenizer_json
    if tokenizer is None:
        raise CheckpointError(
            f"{source.checkpoint.source} has no tokenizer.json to encode the calibration text with; "
            f"add it or export with --calibration none"
        )
    with native_errors(CheckpointError, f"the tokenizer of {source.checkpoint.source} can't be used"):
        token_ids = Tokenizer.from_buffer(tokenizer).encode(_read_text(calibration)).ids
    vocab_size = source.architecture.text.vocab_size
    if token_ids and max(token_ids) >= vocab_size:
        raise CheckpointError(f"the tokenizer gives id {max(token_ids)}, the model has {vocab_size} tokens")
    return _split(calibration, token_ids, min(WINDOW, source.architecture.text.max_positions))


def _split(name: str, token_ids: Sequence[int], window: int) -> Windows:
    count = min(len(token_ids) // window, MAX_WINDOWS)
    if count < 2:
        raise RequestError(
            f"calibration text {name} has {len(token_ids)} tokens, wanted {2 * window} to {MAX_WINDOWS * window}; "
            f"give a longer one"
        )
    ids = torch.tensor(token_ids[: count * window], dtype=torch.int64)
    windows = list(ids.reshape(count, window))
    held_out = windows[::HELD_OUT]
    del windows[::HELD_OUT]
    return Windows(name=name, calibration=windows, held_out=held_out)


def _read_text(calibration: str) -> str:
    if calibration == BUILT_IN:
        return resources.files("engram_export").joinpath(BUILT_IN_TEXT).read_text(encoding="utf-8")
    return read_text(Path(calibration))
