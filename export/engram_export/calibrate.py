"""Calibrate int4 on a text, layer by layer: smooth, quantise by GPTQ, and measure what other choices would change.

Each layer is calibrated on what the layers before it, quantised, make of the text. Windows held out of that measure the
divergence KL(float || candidate) of the next token's distributions, for int4 everywhere, and for int4 with one role at
int8 or with the inputs of one role in one plane. A role is a linear layer's place in its layer: ``feed_forward.down``.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram_export.calibration_text import Windows
from engram_export.export_memory import compared_rows
from engram_export.gptq import quantise_gptq
from engram_export.layerwise import LayerwiseModel, ObservedLinear, open_layers
from engram_export.linear import int4_arrays
from engram_export.operators import TWO_PLANES
from engram_export.quantise import quantise_int8
from engram_export.smoothing import layer_folds, weight_scales
from engram_export.source import ModelSource
from engram_export.weights_file import SafetensorsWriter
from engram_runtime.errors import VerificationError

Floats = NDArray[np.float32]
Progress = Callable[[int], None]
FLOAT32, INT4, INT8, ONE_PLANE = "float32", "int4", "int8", "one_plane"
FACTORS = "smoothing."  # before the parameter that is divided by them


@dataclass(slots=True, eq=False)
class InputStatistics:
    """Of the inputs ``[T, K]`` of a linear layer: largest magnitudes ``[K]``, and the sum of products ``[K, K]``."""

    largest: Tensor
    products: Tensor

    @classmethod
    def of(cls, inputs: int) -> "InputStatistics":
        """Return those of no inputs yet."""
        return cls(torch.zeros(inputs), torch.zeros(inputs, inputs, dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        """Take inputs in."""
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        self.products += x.T @ x


@dataclass(slots=True, eq=False)
class Candidate:
    """Roles in other formats than int4, and the streams ``[T, D]`` of the held-out windows under them."""

    formats: Mapping[str, str]  # by role
    fact: str  # what its divergence is noted as
    hidden: list[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Calibrating:
    """A calibration under way: the model, and how far the text has come through it."""

    model: LayerwiseModel
    windows: Windows
    hidden: list[Tensor]  # of the calibration windows
    candidates: list[Candidate]


def write_calibration(
    source: ModelSource, windows: Windows, writer: SafetensorsWriter, progress: Progress
) -> dict[str, float]:
    """Write int4 parameters and smoothing factors layer by layer; return errors by layer and divergences."""
    model = open_layers(source, len(windows.calibration[0]))
    run = Calibrating(
        model, windows, [model.embed(ids) for ids in windows.calibration], _candidates(model, windows.held_out)
    )
    facts: dict[str, float] = {}
    for index in range(source.architecture.text.num_layers):
        facts |= _calibrate_layer(run, index, writer, progress)
    return facts | _divergences(run)


def roles(model: LayerwiseModel, index: int) -> dict[str, ObservedLinear]:
    """Return the linear layers of a layer by role."""
    modules = model.layer(index).named_modules()
    return {role: module for role, module in modules if isinstance(module, ObservedLinear)}


def _candidates(model: LayerwiseModel, held_out: Sequence[Tensor]) -> list[Candidate]:
    embedded = [model.embed(ids) for ids in held_out]
    found = roles(model, 0)
    chosen = [("kl.float32", dict.fromkeys(found, FLOAT32)), ("kl.int4", {})]
    chosen += [(f"kl.{label}.{role}", {role: label}) for role in found for label in (INT8, ONE_PLANE)]
    return [Candidate(formats, fact, embedded) for fact, formats in chosen]


def _calibrate_layer(run: Calibrating, index: int, writer: SafetensorsWriter, progress: Progress) -> dict[str, float]:
    model = run.model
    model.load(index, model.source)
    products = _smooth(run, index, writer)
    facts: dict[str, float] = {}
    variants: dict[str, dict[str, Floats]] = {}
    for role, linear in roles(model, index).items():
        name, weight = f"layers.{index}.{role}", linear.weight.numpy()
        int4 = quantise_gptq(weight, products[role])
        for key, values in int4_arrays(int4).items():
            writer.write(f"{name}.{key}", values)
            progress(values.nbytes)
        variants[role] = {FLOAT32: weight, INT4: int4.dequantise(), INT8: quantise_int8(weight).dequantise()}
        facts |= _errors(name, weight, variants[role][INT4], products[role])
    _advance(run, index, variants)
    model.drop(index)
    return facts


def _smooth(run: Calibrating, index: int, writer: SafetensorsWriter) -> dict[str, NDArray[np.float64]]:
    """Smooth a loaded layer; return the products of the smoothed inputs by role."""
    model, name = run.model, f"layers.{index}"
    linears = roles(model, index)
    statistics = _observe(run, index)
    folds = layer_folds(name, model.layer(index))
    factors, products = {}, {}
    for fold in folds:
        consumers = [consumer.removeprefix(f"{name}.") for consumer in fold.consumers]
        weights = [linears[role].weight.numpy() for role in consumers]
        values = fold.factors(statistics[consumers[0]].largest.numpy(), weights)
        factors[fold.producer] = values
        writer.write(FACTORS + fold.producer, values)
        columns = values[fold.places].astype(np.float64)
        for role in consumers:
            products[role] = statistics[role].products.numpy() / np.outer(columns, columns)
    scales = weight_scales(folds, factors, model.source.weights.shape)
    model.load(index, dataclasses.replace(model.source, weights=model.source.weights.scaled(scales)))
    return products


def _observe(run: Calibrating, index: int) -> dict[str, InputStatistics]:
    linears = roles(run.model, index)
    statistics = {role: InputStatistics.of(linear.weight.shape[1]) for role, linear in linears.items()}
    for role, linear in linears.items():
        linear.observe = statistics[role].add
    run.model.run(index, run.hidden, run.windows.calibration)
    for role, linear in linears.items():
        linear.observe = None
        if not statistics[role].largest.isfinite().all():
            raise VerificationError(f"inputs of layers.{index}.{role} are not finite numbers on the calibration text")
    return statistics


def _advance(run: Calibrating, index: int, variants: Mapping[str, Mapping[str, Floats]]) -> None:
    """Take the streams of the text and of all candidates through a layer."""
    _choose(run, index, variants, {})
    run.hidden[:] = run.model.run(index, run.hidden, run.windows.calibration)
    for candidate in run.candidates:
        _choose(run, index, variants, candidate.formats)
        candidate.hidden = run.model.run(index, candidate.hidden, run.windows.held_out)


def _choose(
    run: Calibrating, index: int, variants: Mapping[str, Mapping[str, Floats]], formats: Mapping[str, str]
) -> None:
    for role, linear in roles(run.model, index).items():
        label = formats.get(role, INT4)
        linear.planes = 1 if label == ONE_PLANE else TWO_PLANES
        linear.weight.data = torch.from_numpy(variants[role][INT4 if label == ONE_PLANE else label])


def _errors(name: str, weight: Floats, found: Floats, products: NDArray[np.float64]) -> dict[str, float]:
    """Return the relative errors of a weight ``[N, K]`` and of its outputs for inputs with these products."""
    single = products.astype(np.float32)

    def ratio(error: NDArray[np.float32], size: NDArray[np.float32]) -> float:
        return float(np.sqrt(max(error.sum(dtype=np.float64), 0) / (size.sum(dtype=np.float64) or 1)))

    error = found - weight
    return {
        f"weight_error.{name}": ratio(error * error, weight * weight),
        f"output_error.{name}": ratio((error @ single) * error, (weight @ single) * weight),
    }


def _divergences(run: Calibrating) -> dict[str, float]:
    reference, *others = run.candidates
    rows = compared_rows(run.model.source.architecture.text.vocab_size, len(run.windows.held_out[0]))
    sums = dict.fromkeys((candidate.fact for candidate in others), 0.0)
    for window, hidden in enumerate(reference.hidden):
        wanted = _logits(run.model, hidden[-rows:])
        for candidate in others:
            found = _logits(run.model, candidate.hidden[window][-rows:])
            sums[candidate.fact] += divergence(wanted, found)
    return {fact: total / len(reference.hidden) for fact, total in sums.items()}


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Return the mean over positions of KL(wanted || found), in nats, for logits ``[T, V]``."""
    wanted, found = wanted.log_softmax(dim=-1), found.log_softmax(dim=-1)
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean(dtype=torch.float64))


def _logits(model: LayerwiseModel, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.logits(hidden)
