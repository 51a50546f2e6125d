"""The calibration stage of an export: measure once, choose formats by what was measured, and tell what was found."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from engram_export.calibrate import FACTORS, Progress, divergence, write_calibration
from engram_export.calibration_report import CalibrationReport, LinearReport, RoleReport
from engram_export.calibration_text import Windows, calibration_windows, rounding_reason
from engram_export.export_memory import compared_rows
from engram_export.formats import FLOAT, LinearFormat, WeightFormat, calibrated_format, weight_format
from engram_export.journal import Journal
from engram_export.layerwise import one_plane
from engram_export.linear import Int4Linear, Int8Linear
from engram_export.operators import TWO_PLANES
from engram_export.safetensors_file import SafetensorsFile
from engram_export.smoothing import Fold, layer_folds, weight_scales
from engram_export.source import ModelSource
from engram_export.streamed import ReportedRows
from engram_export.text_decoder import Layer
from engram_export.verify import reference_logits
from engram_export.weights_file import SafetensorsWriter
from engram_runtime.safetensors_layout import TensorPlan

CALIBRATION_FILE = "calibration.safetensors"  # in the folder of a bundle until that is whole
PROMOTION_GAIN = 0.25  # nats of divergence that a growth of the weights by as much again must save: 0.0025 for 1 %
PLANE_COST = 0.02  # share of int4's divergence that one plane less of a role's inputs may add
LAYER_PREFIX = re.compile(r"^layers\.\d+\.")


class Staged(Protocol):
    """Shows a stage's progress: of `engram_export.pipeline.Reporter` what is needed here."""

    def stage(self, title: str, total_bytes: int) -> AbstractContextManager[Progress]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """What an export writes: weights, smoothed where that was done, and the format they get."""

    source: ModelSource
    weights: WeightFormat
    report: CalibrationReport | None = None


def read_calibration(source: ModelSource, quant: str, calibration: str) -> Windows | str | None:
    """Return the windows to calibrate on, or why int4 is rounded without, or None for other formats.

    Raises:
        CheckpointError: the model can't be calibrated on the text that was given.
        RequestError: a text that can't be read, or is too short.
    """
    if quant != Int4Linear.label:
        return None
    return rounding_reason(source, calibration) or calibration_windows(source, calibration)


def calibrate(
    source: ModelSource, chosen: WeightFormat, text: Windows | str | None, journal: Journal, reporter: Staged
) -> Calibrated:
    """Calibrate a model, unless ``text``, see `read_calibration`, says otherwise: then ``chosen`` is its format."""
    if isinstance(text, Windows):
        return _calibrate(source, text, journal, reporter)
    return Calibrated(source, chosen, None if text is None else CalibrationReport(method="rounding", reason=text))


def _calibrate(source: ModelSource, windows: Windows, journal: Journal, reporter: Staged) -> Calibrated:
    path = journal.folder / CALIBRATION_FILE
    folds, plans = _folds(source), _int4_plans(source)
    plans += [TensorPlan(FACTORS + fold.producer, "float32", (fold.size,)) for fold in folds]
    with reporter.stage("calibration", sum(plan.bytes for plan in plans)) as progress:

        def write() -> dict[str, float]:
            with SafetensorsWriter(path, plans) as writer:
                return write_calibration(source, windows, writer, progress)

        facts = journal.once(path, write, progress)
    assert facts is not None
    roles = choose_formats(source, facts)
    chosen = {role.role: LinearFormat(role.format, role.planes) for role in roles}
    weights = calibrated_format(lambda name: chosen.get(_role(name)))
    calibrated = _calibrated_source(source, folds, path)
    rows = compared_rows(source.architecture.text.vocab_size, len(windows.held_out[0]))
    report = CalibrationReport(
        method="gptq",
        text=windows.name,
        tokens=sum(map(len, windows.calibration)),
        held_out_tokens=rows * len(windows.held_out),
        int4=facts["kl.int4"],
        chosen=_measure_chosen(source, calibrated, weights, windows.held_out, rows, reporter),
        roles=roles,
        linears=_linear_reports(facts, chosen),
    )
    return Calibrated(calibrated, weights, report)


def choose_formats(source: ModelSource, facts: Mapping[str, float]) -> tuple[RoleReport, ...]:
    """Return the format and planes of each role, by the divergences that `write_calibration` measured."""
    skeleton = source.skeleton(weight_format("int4", lambda name: None))
    total = sum(parameter.nbytes for parameter in skeleton.parameters())
    growth: Counter[str] = Counter()
    for name, module in skeleton.named_modules():
        if isinstance(module, Int4Linear):
            int4 = (module.codes, module.multiplier, module.zero)
            growth[_role(name)] += 2 * module.codes.nbytes - sum(parameter.nbytes for parameter in int4)
    reports = []
    for role, added in growth.items():
        int8, one_plane = facts[f"kl.int8.{role}"], facts[f"kl.one_plane.{role}"]
        promoted = facts["kl.int4"] - int8 >= PROMOTION_GAIN * added / total
        narrow = one_plane - facts["kl.int4"] <= PLANE_COST * facts["kl.int4"]
        reports.append(
            RoleReport(
                role=role,
                format=Int8Linear.label if promoted else Int4Linear.label,
                planes=1 if narrow else TWO_PLANES,
                int8_bytes=added,
                int8=int8,
                one_plane=one_plane,
            )
        )
    return tuple(reports)


def _calibrated_source(source: ModelSource, folds: Sequence[Fold], path: Path) -> ModelSource:
    file = SafetensorsFile(path)
    factors = {fold.producer: file.read(FACTORS + fold.producer) for fold in folds}
    scales = weight_scales(folds, factors, source.weights.shape)
    return dataclasses.replace(source, weights=source.weights.scaled(scales), int4=file)


def _measure_chosen(
    source: ModelSource,
    calibrated: ModelSource,
    weights: WeightFormat,
    held_out: Sequence[Tensor],
    rows: int,
    reporter: Staged,
) -> float:
    """Return the divergence of what will be written: all its weights, and inputs in one plane where that was chosen."""
    total = 0.0
    chosen = _in_planes(weights)
    with reporter.stage("held-out text", source.weights.count() * 4 * len(held_out)) as progress:
        for window in held_out:
            wanted = reference_logits(source, window.numpy(), encoded=ReportedRows(source, progress), last=rows)
            found = reference_logits(calibrated, window.numpy(), chosen, last=rows)
            total += divergence(torch.from_numpy(wanted), torch.from_numpy(found))
    return total / len(held_out)


def _in_planes(weights: WeightFormat) -> WeightFormat:
    """Return a format whose layers round their inputs to one plane where kernels will; of two nothing is lost here."""

    def linear(name: str, in_features: int, out_features: int) -> nn.Module:
        module = weights.make_linear(name, in_features, out_features)
        if module.planes == 1:
            module.register_forward_pre_hook(lambda _, inputs: (one_plane(*inputs),))
        return module

    return dataclasses.replace(weights, make_linear=linear)


def _folds(source: ModelSource) -> list[Fold]:
    layers: Sequence[Layer] = source.skeleton(FLOAT).layers  # type: ignore[assignment]
    return [fold for index, layer in enumerate(layers) for fold in layer_folds(f"layers.{index}", layer)]


def _int4_plans(source: ModelSource) -> list[TensorPlan]:
    modules = source.skeleton(weight_format("int4", lambda name: None)).named_modules()
    return [
        TensorPlan(f"{name}.{key}", str(values.dtype).removeprefix("torch."), tuple(values.shape))
        for name, module in modules
        if isinstance(module, Int4Linear)
        for key, values in module.named_parameters()
    ]


def _linear_reports(facts: Mapping[str, float], chosen: Mapping[str, LinearFormat]) -> tuple[LinearReport, ...]:
    names = [fact.removeprefix("weight_error.") for fact in facts if fact.startswith("weight_error.")]
    return tuple(
        LinearReport(
            name=name,
            format=chosen[_role(name)].label,
            planes=chosen[_role(name)].planes,
            weight_error=facts[f"weight_error.{name}"],
            output_error=facts[f"output_error.{name}"],
        )
        for name in names
    )


def _role(name: str) -> str:
    return LAYER_PREFIX.sub("", name)
