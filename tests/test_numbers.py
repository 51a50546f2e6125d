"""Numbers that are not finite: refused where they come in, an error where they come out."""

from pathlib import Path

import numpy as np
import pytest
from tests.workshop import THREADS, Workshop, copy_folder

from engram_export.weights_file import SafetensorsWriter, check_finite
from engram_runtime import LLM, Bundle
from engram_runtime.errors import BundleError, CheckpointError, NumericError
from engram_runtime.evaluation.losses import negative_log_likelihood
from engram_runtime.library import find_library
from engram_runtime.openai_api.errors import as_api_error
from engram_runtime.safetensors_layout import TensorPlan

PROMPT = "The tide comes in"
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, value: float, dtype: str) -> None:
    values = np.zeros((3, 4), dtype=dtype)
    values[2, 1] = value
    with SafetensorsWriter(tmp_path / "w", [TensorPlan("gain", dtype, (8, 4))]) as writer:
        writer.write_rows("gain", 0, values[:2])
        with pytest.raises(CheckpointError) as caught:
            writer.write_rows("gain", 5, values)
        writer.write_rows("gain", 2, np.zeros((6, 4), dtype=dtype))
    assert str(caught.value) == f"gain is {value} at [7, 1], expected finite numbers; download the checkpoint again"


def test_finite_values_whose_sum_is_not_are_sound() -> None:
    check_finite("large", 0, np.full(4, np.finfo(np.float32).max, dtype=np.float32))
    check_finite("codes", 0, np.full(4, 255, dtype=np.uint8))


def test_a_scale_of_a_library_that_is_not_finite_is_named(workshop: Workshop, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_folder(workshop.ready().path, tmp_path / "bundle"))
    folder, info = find_library(bundle)
    tensor = next(each for each in info.tensors if each.dtype == "float32")
    weights = np.memmap(folder / info.weights, dtype=np.uint8, mode="r+")
    weights[tensor.offset : tensor.end].view(np.float32)[-1] = NAN
    weights.flush()
    with pytest.raises(BundleError) as caught:
        LLM(bundle.path, threads=THREADS)
    assert str(caught.value) == (
        f"packed tensor {tensor.name} in {folder / info.weights} holds numbers that are not finite; compile the bundle "
        f"again"
    )


def test_a_text_whose_numbers_go_bad_ends_and_the_next_one_is_computed_anew(workshop: Workshop) -> None:
    with LLM(workshop.positional().path, threads=THREADS) as llm:
        expected = llm.generate(PROMPT, max_tokens=4).token_ids
        llm.session.states["value.0"][...] = NAN
        with pytest.raises(NumericError, match=r"^the model produced \d+ logits of \d+ that are nan or infinite, "):
            llm.generate(f"{PROMPT} again", max_tokens=4)
        assert len(llm.session) == 0
        assert llm.generate(PROMPT, max_tokens=4).token_ids == expected


def test_losses_of_bad_logits_are_an_error() -> None:
    with pytest.raises(NumericError):
        negative_log_likelihood(np.array([[0.0, NAN]], dtype=np.float32), np.array([0]))


def test_a_client_is_told_by_a_code() -> None:
    told = as_api_error(NumericError("bad"))
    assert (told.status, told.body()["error"]["code"]) == (500, "numeric_error")
