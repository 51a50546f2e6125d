"""Calibration of int4: GPTQ against rounding, exact folds, formats by measured divergence, resumption, refusals."""

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tests.conftest import Command
from tests.test_quantise import levels
from tests.tiny import TinyModel, TinySite
from tests.tiny_families import TinyFamily
from tests.workshop import SilentReporter, Workshop, copy_folder, export, export_options, files_of, random_ids
from transformers import AutoModelForCausalLM

from engram_compilers import signatures
from engram_compilers.onnx_model import read_onnx_model
from engram_compilers.signatures import PLANES_KEY
from engram_export import calibration, weight_map
from engram_export.calibration import CALIBRATION_FILE, choose_formats
from engram_export.calibration_text import BUILT_IN, HELD_OUT, calibration_windows
from engram_export.export_memory import MAX_WINDOWS
from engram_export.formats import FLOAT, weight_format
from engram_export.gptq import DAMPING, error_feedback, quantise_gptq
from engram_export.layerwise import one_plane
from engram_export.pipeline import Progress, export_bundle
from engram_export.quantise import BLOCK, quantise_int4, zero_range
from engram_export.smoothing import Fold, layer_folds, weight_scales
from engram_export.source import ModelSource, open_source
from engram_export.verify import reference_logits
from engram_runtime.bundle import MODEL_CARD, Bundle
from engram_runtime.errors import CheckpointError, RequestError, VerificationError

PLAIN = TinyModel()
QWEN = TinyModel(family="qwen3", tied=False)
SITE = TinySite()
ROLES = ("mixer.qkv", "mixer.output", "feed_forward.gate_up", "feed_forward.down")
REPORT = "golden/calibration.json"
# What other summation orders may change: measured values, and the digests of the files that hold them.
MEASURED = ("golden/golden.json", REPORT, MODEL_CARD, "engram.json")


def correlated(rng: np.random.Generator, mixing: NDArray[np.float64], tokens: int) -> NDArray[np.float32]:
    """Draw inputs ``[T, K]``, a few of whose directions carry most of the energy, as activations do."""
    return np.asarray(rng.standard_normal((tokens, len(mixing))) @ mixing, dtype=np.float32)


def products(inputs: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.asarray(inputs.T.astype(np.float64) @ inputs)


@pytest.mark.parametrize("seed", range(3))
def test_on_fresh_inputs_gptq_is_nearer_than_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mixing = np.diag(np.arange(1, 97) ** -0.7) @ rng.standard_normal((96, 96))
    weight = rng.standard_normal((48, 96)).astype(np.float32)
    found = quantise_gptq(weight, products(correlated(rng, mixing, 400))).dequantise()
    fresh = correlated(rng, mixing, 400)
    errors = [np.linalg.norm(fresh @ (values - weight).T) for values in (found, quantise_int4(weight).dequantise())]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_inputs_that_are_not_correlated_leave_plain_rounding(scale: float) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    found, expected = quantise_gptq(weight, np.diag(rng.random(64)) * scale), quantise_int4(weight)
    for part in ("codes", "multiplier", "zero", "scale"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))


def test_the_feedback_is_that_of_the_inverse_in_the_paper() -> None:
    """There column j's error moves column k by U[j, k] / U[j, j], U the upper Cholesky factor of the inverse."""
    rng = np.random.default_rng(2)
    given_products, weight = products(correlated(rng, rng.standard_normal((32, 32)), 100)), rng.standard_normal((4, 32))
    damped = given_products + DAMPING * given_products.diagonal().mean() * np.eye(32)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    theirs = weight.copy()
    for j in range(32):
        error = (theirs[:, j] - np.rint(theirs[:, j])) / upper[j, j]
        theirs[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    ours, feedback = weight.copy(), error_feedback(given_products).astype(np.float64)
    for k in range(32):
        ours[:, k] += (weight - np.rint(ours))[:, :k] @ feedback[:k, k]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


SPREAD = st.floats(-(2.0**20), 2.0**20, width=32)


@settings(deadline=None, max_examples=40)
@given(arrays(np.float32, (2, 2 * BLOCK), elements=SPREAD), arrays(np.float32, (3, 2 * BLOCK), elements=SPREAD))
def test_whatever_is_quantised_kernels_can_hold(weight: NDArray[np.float32], inputs: NDArray[np.float32]) -> None:
    found = quantise_gptq(weight, products(inputs))
    assert found.codes.max() <= 15
    assert np.abs(levels(found) + 0.5).max() <= 127.5
    ranges = np.array([zero_range(int(value)) for value in found.multiplier.ravel()])
    assert (ranges[:, 0] <= found.zero.ravel()).all()
    assert (found.zero.ravel() <= ranges[:, 1]).all()
    assert np.isfinite(found.dequantise()).all()


def test_one_plane_is_a_multiple_of_the_row_scale() -> None:
    x = torch.tensor([[127.0, 1.4, -0.6], [0.0, 0.0, 0.0], [-254.0, 3.1, 2.9]])
    expected = torch.tensor([[127.0, 1.0, -1.0], [0.0, 0.0, 0.0], [-254.0, 4.0, 2.0]])
    assert torch.equal(one_plane(x), expected)


def test_factors_are_powers_of_two_that_share_a_magnitude_between_inputs_and_weights() -> None:
    fold = Fold("norm.weight", 0, ["linear"], np.array([0, 1, 2, 3, 0]))
    inputs = np.array([16, 1, 0, 3, 64], dtype=np.float32)
    weight = np.array([[1, -1, 1, 0, 0.5], [0.5, 4, 1, 0, 1]], dtype=np.float32)
    assert fold.factors(inputs, [weight]).tolist() == [8.0, 0.5, 1.0, 1.0]


def smoothed(source: ModelSource, seed: int) -> ModelSource:
    """Smooth a source by random factors."""
    rng = np.random.default_rng(seed)
    layers: Any = source.skeleton(FLOAT).layers
    folds = [fold for index, layer in enumerate(layers) for fold in layer_folds(f"layers.{index}", layer)]
    factors = {fold.producer: np.exp2(rng.integers(-6, 7, fold.size)).astype(np.float32) for fold in folds}
    scales = weight_scales(folds, factors, source.weights.shape)
    return dataclasses.replace(source, weights=source.weights.scaled(scales))


@pytest.mark.parametrize("model", [PLAIN, QWEN], ids=lambda model: model.family)
def test_a_smoothed_model_has_the_same_bits(workshop: Workshop, model: TinyModel) -> None:
    source = open_source(workshop.checkpoint(model, SITE), engram=None, context=None)
    token_ids = np.array(random_ids(40))
    changed = smoothed(source, 3)
    name = "layers.1.feed_forward.down.weight"
    assert not np.array_equal(changed.weights.read(name), source.weights.read(name))
    np.testing.assert_array_equal(reference_logits(changed, token_ids), reference_logits(source, token_ids))


def calibrated(workshop: Workshop, model: TinyModel, **changes: Any) -> Path:
    checkpoint = workshop.checkpoint(model, SITE)
    return workshop.bundle(checkpoint, quant="int4", calibration=BUILT_IN, **changes).path


def report_of(bundle: Path) -> Any:
    return json.loads((bundle / REPORT).read_text())


@pytest.mark.parametrize(
    "model", [PLAIN, pytest.param(QWEN, marks=pytest.mark.exhaustive)], ids=lambda model: model.family
)
def test_a_calibrated_bundle_diverges_less_than_one_that_was_rounded(
    workshop: Workshop, tmp_path: Path, model: TinyModel
) -> None:
    checkpoint = workshop.checkpoint(model, SITE)
    rounded = export(checkpoint, tmp_path / "bundle", quant="int4").model
    found = report_of(calibrated(workshop, model))
    assert [role["role"] for role in found["roles"]] == list(ROLES)
    assert [linear["name"] for linear in found["linears"]] == [f"layers.{n}.{role}" for n in (0, 1) for role in ROLES]
    assert all(0 < linear["output_error"] < linear["weight_error"] < 0.2 for linear in found["linears"])
    parity = json.loads((calibrated(workshop, model) / "golden" / "golden.json").read_text())["parity"]
    assert parity["mean_abs"] < rounded.mean_abs


def test_the_same_export_writes_the_same_bundle(workshop: Workshop, tmp_path: Path) -> None:
    whole = files_of(calibrated(workshop, PLAIN))
    export(workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle", quant="int4", calibration=BUILT_IN)
    assert files_of(tmp_path / "bundle") == whole
    assert CALIBRATION_FILE not in whole


def test_slices_are_calibrated_as_the_whole(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files_of(calibrated(workshop, QWEN))
    monkeypatch.setattr(weight_map, "SLICE_BYTES", 5000)
    export(workshop.checkpoint(QWEN, SITE), tmp_path / "bundle", quant="int4", calibration=BUILT_IN)
    found = files_of(tmp_path / "bundle")
    assert found.keys() == whole.keys()
    assert {name for name in whole if found[name] != whole[name]} <= set(MEASURED)


class Interrupted(SilentReporter):
    """Interrupts an export where a stage begins, and notes the progress of the calibration."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self.calibration: list[int] = []

    @contextlib.contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Progress]:
        if title == self.title:
            raise KeyboardInterrupt
        yield self.calibration.append if title == "calibration" else lambda count: None


@pytest.mark.parametrize(
    "stage", ["verify", *(pytest.param(stage, marks=pytest.mark.exhaustive) for stage in ("weights", "digests"))]
)
def test_an_interrupted_export_is_not_calibrated_again(workshop: Workshop, tmp_path: Path, stage: str) -> None:
    options = export_options(workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle", quant="int4", calibration=BUILT_IN)
    first, second = Interrupted(stage), Interrupted("none")
    with pytest.raises(KeyboardInterrupt):
        export_bundle(options, first)
    export_bundle(options, second)
    assert len(first.calibration) > 1
    assert len(second.calibration) == 1
    assert files_of(tmp_path / "bundle") == files_of(calibrated(workshop, PLAIN))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.exhaustive
def test_another_text_is_another_export(workshop: Workshop, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The tide goes out and a table of rows is read. " * 100)
    checkpoint, out = workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle"
    options = export_options(checkpoint, out, quant="int4", calibration=str(text))
    with pytest.raises(KeyboardInterrupt):
        export_bundle(options, Interrupted("weights"))
    text.write_text("The tide comes in and rows are added to the stream. " * 100)
    again = Interrupted("none")
    export_bundle(options, again)
    assert len(again.calibration) > 1
    assert report_of(out)["text"] == str(text)


@pytest.fixture
def source(workshop: Workshop) -> ModelSource:
    return open_source(workshop.checkpoint(PLAIN, SITE), engram=None, context=None)


def chosen(source: ModelSource, facts: Mapping[str, float]) -> dict[str, tuple[str, int]]:
    return {report.role: (report.format, report.planes) for report in choose_formats(source, facts)}


BASE = {"kl.int4": 0.1} | {f"kl.int8.{role}": 0.1 for role in ROLES} | {f"kl.one_plane.{role}": 0.11 for role in ROLES}
DOWN_GROWTH = 2 * 64 * (128 - 128 // 2 - 128 // 32 - 2)  # of both layers: codes, less packed codes and headers


def test_without_a_gain_everything_is_int4_in_two_planes(source: ModelSource) -> None:
    assert chosen(source, BASE) == dict.fromkeys(ROLES, ("int4", 2))


@pytest.mark.parametrize(("share", "label"), [(0.99, "int4"), (1.01, "int8")])
def test_a_role_becomes_int8_where_that_is_worth_its_bytes(source: ModelSource, share: float, label: str) -> None:
    report = choose_formats(source, BASE)[-1]
    assert report.int8_bytes == DOWN_GROWTH
    skeleton = source.skeleton(weight_format("int4", lambda name: None))
    growth = DOWN_GROWTH / sum(parameter.nbytes for parameter in skeleton.parameters())
    gain = calibration.PROMOTION_GAIN * growth * share
    assert chosen(source, BASE | {"kl.int8.feed_forward.down": 0.1 - gain})["feed_forward.down"] == (label, 2)


@pytest.mark.parametrize(("cost", "planes"), [(0.99, 1), (1.01, 2)])
def test_a_role_has_one_plane_where_that_costs_little(source: ModelSource, cost: float, planes: int) -> None:
    one_plane = 0.1 * (1 + calibration.PLANE_COST * cost)
    assert chosen(source, BASE | {"kl.one_plane.mixer.output": one_plane})["mixer.output"] == ("int4", planes)


def planes_of(bundle: Path) -> dict[str, str]:
    """Return the planes that nodes of a graph ask for, by weight."""
    graph = onnx.load(bundle / "graph" / "decoder.onnx", load_external_data=False).graph
    return {
        node.input[1]: entry.value for node in graph.node for entry in node.metadata_props if entry.key == PLANES_KEY
    }


def test_formats_and_planes_stand_in_the_graph(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "PROMOTION_GAIN", -100.0)
    monkeypatch.setattr(calibration, "PLANE_COST", 100.0)
    export(workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle", quant="int4", calibration=BUILT_IN)
    layers = [f"layers.{layer}.{role}" for layer in (0, 1) for role in ROLES]
    assert planes_of(tmp_path / "bundle") == {f"{name}.codes": "1" for name in layers}
    decoder = Bundle.open(tmp_path / "bundle").manifest.decoder
    read = read_onnx_model(tmp_path / "bundle" / decoder.file, tmp_path / "bundle" / decoder.weights)
    quantised = [node for node in read.nodes if node.operator == "com.microsoft.MatMulNBits"]
    assert [signatures.planes_of(node) for node in quantised].count(1) == len(layers)
    report = report_of(tmp_path / "bundle")
    assert {(linear["format"], linear["planes"]) for linear in report["linears"]} == {("int8", 1)}
    assert report["chosen"] < report["int4"]


def test_int8_asks_for_no_planes_and_has_no_report(workshop: Workshop) -> None:
    bundle = workshop.uncompiled().path
    assert planes_of(bundle) == {}
    assert not (bundle / REPORT).exists()


def test_held_out_windows_are_not_calibrated_on(source: ModelSource) -> None:
    windows = calibration_windows(source, BUILT_IN)
    held_out = {tuple(window.tolist()) for window in windows.held_out}
    assert len(windows.calibration) + len(windows.held_out) == MAX_WINDOWS
    assert len(held_out) == MAX_WINDOWS // HELD_OUT
    assert held_out.isdisjoint(tuple(window.tolist()) for window in windows.calibration)


MIXTURE = TinyFamily(
    model_type="mixtral",
    sizes={
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
)
OTHER_LAYERS = "calibration knows layers of attention and SwiGLU, 'mixtral' has others"


def test_what_is_not_calibrated_says_why(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    options = ("-o", tmp_path / "bundle", "--quant", "int4")
    outcome = command("engram-export", workshop.family(MIXTURE), *options)
    assert f"int4 by plain rounding: {OTHER_LAYERS}\n" in outcome.out
    assert report_of(tmp_path / "bundle")["method"] == "rounding"
    outcome = command("engram-export", workshop.checkpoint(PLAIN), *options, "--force", "--calibration", "none")
    assert "int4 by plain rounding: --calibration none\n" in outcome.out
    assert report_of(tmp_path / "bundle")["reason"] == "--calibration none"
    assert "int4 by plain rounding: `--calibration none`\n" in (tmp_path / "bundle" / MODEL_CARD).read_text()


def test_the_command_prints_what_it_found(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    checkpoint = workshop.checkpoint(PLAIN, SITE)
    outcome = command("engram-export", checkpoint, "-o", tmp_path / "bundle", "--quant", "int4", "--json")
    assert outcome.json["calibration"] == report_of(tmp_path / "bundle")
    printed = command("engram-export", checkpoint, "-o", tmp_path / "bundle", "--quant", "int4", "--force").out
    assert (
        f"int4 calibrated on 3456 tokens of the built-in text: KL(float32 || bundle) is "
        f"{outcome.json['calibration']['chosen']:.4f} nats on 384 others\n" in printed
    )
    card = (tmp_path / "bundle" / MODEL_CARD).read_text()
    assert "int4 calibrated on 3,456 tokens of the text `built-in`: KL(float32 || bundle) is " in card


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "calibration text {text} has 0 tokens, wanted 384 to 3840; give a longer one"),
        (b"tide ", "calibration text {text} has 3 tokens, wanted 384 to 3840; give a longer one"),
        (b"\xff", "text {text} is not UTF-8 at byte 0; convert it"),
        (None, "text {text} can't be read: No such file or directory"),
    ],
    ids=["empty", "short", "no-text", "missing"],
)
def test_a_text_that_can_not_be_used_is_refused(
    workshop: Workshop, tmp_path: Path, content: bytes | None, message: str
) -> None:
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        export(workshop.checkpoint(PLAIN), tmp_path / "bundle", quant="int4", calibration=str(text))
    assert str(caught.value) == message.format(text=text)
    assert not (tmp_path / "bundle").exists()


def test_a_text_is_refused_where_it_would_have_no_effect(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        export(workshop.checkpoint(PLAIN), tmp_path / "bundle", quant="int8", calibration="text")
    assert str(caught.value) == "--calibration text is for --quant int4, this is int8; leave it out"


def test_tables_alone_take_no_text(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    options = ("-o", tmp_path / "bundle", "--tables-only", "--calibration", "text")
    outcome = command("engram-export", workshop.checkpoint(PLAIN), *options)
    assert (outcome.code, outcome.err) == (
        2,
        "engram-export: --calibration text is for --quant int4, this is int8; leave it out\n",
    )


def test_a_text_is_refused_where_layers_are_not_known(workshop: Workshop, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("tide")
    with pytest.raises(CheckpointError) as caught:
        export(workshop.family(MIXTURE), tmp_path / "bundle", quant="int4", calibration=str(text))
    assert str(caught.value) == f"{OTHER_LAYERS}; leave out --calibration {text}"


def test_a_checkpoint_without_a_tokenizer_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = copy_folder(workshop.checkpoint(PLAIN), tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        export(checkpoint, tmp_path / "bundle", quant="int4", calibration=BUILT_IN)
    assert str(caught.value) == (
        "checkpoint has no tokenizer.json to encode the calibration text with; add it or export with --calibration none"
    )


def test_a_model_that_gives_no_numbers_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = copy_folder(workshop.checkpoint(PLAIN), tmp_path / "checkpoint")
    weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][5] = torch.nan
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError) as caught:
        export(checkpoint, tmp_path / "bundle", quant="int4", calibration=BUILT_IN)
    assert str(caught.value) == "inputs of layers.1.mixer.qkv are not finite numbers on the calibration text"


def test_a_permuted_copy_computes_the_same(workshop: Workshop) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "permuted_copy.py"
    spec = importlib.util.spec_from_file_location("permuted_copy", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    model = AutoModelForCausalLM.from_pretrained(workshop.checkpoint(QWEN), dtype=torch.float32)
    ids = torch.tensor([random_ids(30)])
    with torch.no_grad():
        expected = model(ids).logits
        before = [layer.self_attn.o_proj.weight.clone() for layer in model.model.layers]
        benchmark.permute(model)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert not any(
        torch.equal(layer.self_attn.o_proj.weight, old) for layer, old in zip(model.model.layers, before, strict=True)
    )
