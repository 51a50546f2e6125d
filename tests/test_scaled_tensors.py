"""FP8 weights read as float32 are what torch makes of the same bytes, whatever rows are asked for."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram_export.safetensors_file import SafetensorsFile
from engram_export.scaled_tensors import ScaledTensors, weight_block
from engram_runtime.errors import CheckpointError

NAN_BITS = (0x7F, 0xFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledWeight:
    """A weight, the tile that shares a scale and the name its scales have."""

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    block: tuple[int, int]
    scales_name: str
    exponents: bool
    seed: int

    def tensors(self) -> dict[str, Tensor]:
        """Draw the weight, every byte that is a number, and its scales."""
        rng = np.random.default_rng(self.seed)
        bits = rng.permutation(np.resize(np.setdiff1d(np.arange(256), NAN_BITS), int(np.prod(self.shape))))
        counts = [-(-size // length) for size, length in zip(self.shape, self.tile, strict=True)]
        if self.exponents:
            scales = torch.from_numpy(rng.integers(90, 160, counts).astype(np.uint8)).view(torch.float8_e8m0fnu)
        else:
            scales = torch.from_numpy(rng.uniform(1e-4, 10, counts).astype(np.float32))
        payload = torch.from_numpy(bits.astype(np.uint8).reshape(self.shape)).view(torch.float8_e4m3fn)
        return {"proj.weight": payload, self.scales_name: scales, "norm.weight": torch.ones(3)}

    def expected(self) -> Tensor:
        """Return the weight as torch reads it."""
        tensors = self.tensors()
        scales = tensors[self.scales_name].float()
        for axis, (size, length) in enumerate(zip(self.shape, self.tile, strict=True)):
            scales = scales.repeat_interleave(length, dim=axis).narrow(axis, 0, size)
        return tensors["proj.weight"].float() * scales


@st.composite
def scaled_weights(draw: st.DrawFn) -> ScaledWeight:
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    block = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    # Along each axis a block, one value or all values share a scale.
    tile = tuple(draw(st.sampled_from([part, 1, size])) for part, size in zip(block, shape, strict=True))
    experts = draw(st.integers(0, 3))
    return ScaledWeight(
        shape=(experts, *shape) if experts else shape,
        tile=(1, *tile) if experts else tile,
        block=block,
        scales_name=draw(st.sampled_from(["proj.scale", "proj.weight_scale_inv", "proj.weight_scale"])),
        exponents=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


def opened(folder: Path, tensors: dict[str, Tensor], block: tuple[int, int] = (2, 2)) -> ScaledTensors:
    """Save tensors and open them."""
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return ScaledTensors(SafetensorsFile(folder / "model.safetensors"), block)


@settings(deadline=None)
@given(weight=scaled_weights(), data=st.data())
def test_rows_are_those_torch_reads(weight: ScaledWeight, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, weight.shape[0]))
    stop = data.draw(st.integers(start, weight.shape[0]))
    with TemporaryDirectory() as folder:
        tensors = opened(Path(folder), weight.tensors(), weight.block)
        expected = weight.expected().numpy()
        assert sorted(tensors.names()) == ["norm.weight", "proj.weight"]
        assert tensors.shape("proj.weight") == weight.shape
        np.testing.assert_array_equal(tensors.read("proj.weight"), expected, strict=True)
        np.testing.assert_array_equal(tensors.read_rows("proj.weight", start, stop), expected[start:stop], strict=True)


def test_one_scale_of_a_whole_tensor(tmp_path: Path) -> None:
    payload = torch.tensor([[1.5, -448.0], [0.001953125, 0.0]])
    stored = {"proj.weight": payload.to(torch.float8_e4m3fn), "proj.weight_scale": torch.tensor(0.25)}
    np.testing.assert_array_equal(opened(tmp_path, stored).read_rows("proj.weight", 1, 2), [[0.00048828125, 0.0]])
    np.testing.assert_array_equal(opened(tmp_path, stored).read("proj.weight"), (payload * 0.25).numpy())


def test_other_tensors_are_read_as_before_and_keep_what_looks_like_a_scale(tmp_path: Path) -> None:
    stored = {"gate.weight": torch.arange(6.0).reshape(3, 2).bfloat16(), "gate.scale": torch.ones(1)}
    tensors = opened(tmp_path, stored)
    assert sorted(tensors.names()) == ["gate.scale", "gate.weight"]
    np.testing.assert_array_equal(tensors.read_rows("gate.weight", 1, 3), [[2, 3], [4, 5]])


FLOAT8_WEIGHT = torch.ones(4, 6).to(torch.float8_e4m3fn)


def test_scales_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        opened(tmp_path, {"proj.weight": FLOAT8_WEIGHT}).shape("proj.weight")
    assert str(raised.value) == (
        "proj.weight is F8_E4M3 without scales, expected proj.weight_scale_inv or proj.weight_scale or proj.scale"
    )


def test_scales_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        opened(tmp_path, {"proj.weight": FLOAT8_WEIGHT, "proj.scale": torch.ones(2, 2)}).shape("proj.weight")
    assert str(raised.value) == ("proj.scale has shape [2, 2], proj.weight [4, 6] wants one scale for each [2, 2]")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_scale_that_is_not_finite(tmp_path: Path, value: str) -> None:
    scales = torch.ones(2, 3)
    scales[1, 2] = float(value)
    tensors = opened(tmp_path, {"proj.weight": FLOAT8_WEIGHT, "proj.scale": scales})
    np.testing.assert_array_equal(tensors.read_rows("proj.weight", 0, 2), np.ones((2, 6)))
    with pytest.raises(CheckpointError) as raised:
        tensors.read_rows("proj.weight", 2, 3)
    assert str(raised.value) == f"proj.scale has scale {value} at [1, 2], expected finite scales; download it again"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_scale_that_is_not_finite_is_found_before_its_weight_is_read(tmp_path: Path, value: str) -> None:
    scales = torch.ones(2, 3)
    scales[1, 2] = float(value)
    with pytest.raises(CheckpointError) as raised:
        opened(tmp_path, {"proj.weight": FLOAT8_WEIGHT, "proj.scale": scales}).shape("proj.weight")
    assert str(raised.value) == f"proj.scale has scale {value} at [1, 2], expected finite scales; download it again"


def test_a_dtype_that_cant_be_read_is_found_before_its_weight_is_read(tmp_path: Path) -> None:
    tensors = opened(tmp_path, {"proj.weight": torch.ones(4, 6, dtype=torch.float64)})
    with pytest.raises(CheckpointError) as raised:
        tensors.shape("proj.weight")
    assert str(raised.value) == (
        f"tensor 'proj.weight' of {tmp_path / 'model.safetensors'} has dtype F64, wanted F32, F16 or BF16; convert the "
        f"checkpoint"
    )


def test_an_exponent_that_is_not_a_number(tmp_path: Path) -> None:
    exponents = torch.full((2, 3), 127, dtype=torch.uint8)
    exponents[0, 1] = 255
    with pytest.raises(CheckpointError) as raised:
        opened(tmp_path, {"proj.weight": FLOAT8_WEIGHT, "proj.scale": exponents}).read("proj.weight")
    assert str(raised.value) == "proj.scale has scale nan at [0, 1], expected finite scales; download it again"


def test_the_block_is_that_of_the_config() -> None:
    assert weight_block({"quantization_config": {"weight_block_size": [32, 64]}}) == (32, 64)
    assert weight_block({"quantization_config": None}) == weight_block({}) == (128, 128)
    with pytest.raises(CheckpointError) as raised:
        weight_block({"quantization_config": {"weight_block_size": [32, 0]}})
    assert str(raised.value) == "'weight_block_size' is [32, 0], wanted two sizes; correct the config"
