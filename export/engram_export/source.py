"""A checkpoint understood: its family, its sites, and every weight resolved, before anything is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode

from engram_export.checkpoint import Checkpoint, open_checkpoint
from engram_export.engram_site import EngramSite
from engram_export.engram_source import EngramSource, engram_sources, site_name_map, unit_gains
from engram_export.families import FAMILIES, read_family_config
from engram_export.families.llama import LlamaConfig, LlamaModel
from engram_export.formats import FLOAT, WeightFormat
from engram_export.gguf_file import GgufTensors
from engram_export.linear import BlockLinear, WeightModule
from engram_export.tensor_union import TensorUnion
from engram_export.weight_map import WeightSource
from engram_runtime.errors import CheckpointError, RequestError

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, eq=False)
class ModelSource:
    """What an export reads from."""

    checkpoint: Checkpoint
    config: LlamaConfig
    sites: list[EngramSource]
    context_length: int
    weights: WeightSource
    computed: Mapping[str, NDArray[np.float32]]

    def build(self, weight_format: WeightFormat) -> LlamaModel:
        """Make the model's module with uninitialised parameters in a weight format."""
        return _build(self.config, self.sites, self.context_length, weight_format)

    def float_shapes(self) -> list[torch.Size]:
        """Return the shapes of the float model's weights, computed tables left out."""
        named = self.skeleton(FLOAT).named_parameters()
        return [parameter.shape for name, parameter in named if name not in self.computed]

    def skeleton(self, weight_format: WeightFormat) -> LlamaModel:
        """Make the model's module with parameters that have shapes but no memory."""
        with FakeTensorMode():
            return self.build(weight_format)

    def kept_type(self, name: str) -> str | None:
        """Return the GGUF type that all tensors of a linear layer share, or None."""
        tensors = self.checkpoint.tensors
        if not isinstance(tensors, GgufTensors) or name.startswith("sites."):
            return None
        types = {tensors.tensor_type(tensor) for tensor in self.weights.tensor_names(f"{name}.weight")}
        return types.pop() if len(types) == 1 else None

    def parameters(self, name: str, module: torch.nn.Module) -> dict[str, NDArray[Any]]:
        """Return the parameters a module of the model owns, by full name, read and encoded now."""
        if isinstance(module, BlockLinear):
            arrays: Mapping[str, NDArray[Any]] = module.encode_blocks(*self._blocks(f"{name}.weight"))
        elif hasattr(module, "encode"):
            encoder: WeightModule = module  # type: ignore[assignment]
            arrays = encoder.encode(self.weights.read(f"{name}.weight"))
        else:
            own = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
            return {key: self.computed[key] if key in self.computed else self.weights.read(key) for key in own}
        return {f"{name}.{key}": values for key, values in arrays.items()}

    def _blocks(self, weight: str) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        tensors = self.checkpoint.tensors
        assert isinstance(tensors, GgufTensors)
        parts = [tensors.read_blocks(name) for name in self.weights.tensor_names(weight)]
        return np.concatenate([codes for codes, _, _ in parts]), np.concatenate([scales for _, scales, _ in parts])


def open_source(path: Path, *, engram: Path | None, context: int | None) -> ModelSource:
    """Open a checkpoint and resolve all its weights.

    Args:
        engram: a folder whose Engram site is added to the checkpoint, or None.
        context: tokens a sequence may have, or None for what the model was trained for.

    Raises:
        CheckpointError: unknown architecture, tensors missing, left over or malformed.
        RequestError: a context the model can't have.
    """
    checkpoint = open_checkpoint(path)
    config = read_family_config(checkpoint)
    sites = engram_sources(checkpoint, engram)
    _check_layers(config, sites)
    context_length = config.max_positions if context is None else context
    if not 1 <= context_length <= config.max_positions:
        raise RequestError(f"context is {context_length}, this model takes 1 to {config.max_positions} tokens")
    cos, sin = config.rope.tables(context_length)
    computed = {"cos": cos, "sin": sin, **unit_gains(sites, config.hidden_size)}
    with FakeTensorMode():
        parameters = _build(config, sites, context_length, FLOAT).named_parameters()
        wanted = {name: tuple(parameter.shape) for name, parameter in parameters if name not in computed}
    weights = _resolve(checkpoint, sites, wanted)
    return ModelSource(checkpoint, config, sites, context_length, weights, computed)


def load_parameters(model: LlamaModel, source: ModelSource, progress: Progress) -> None:
    """Fill a float model from the checkpoint, one weight in memory at a time."""
    parameters = dict(model.named_parameters())
    for name, module in model.named_modules():
        for key, values in source.parameters(name, module).items():
            with torch.no_grad():
                parameters[key].copy_(torch.from_numpy(values).reshape(parameters[key].shape))
            progress(values.nbytes)


def _build(
    config: LlamaConfig, sites: list[EngramSource], context_length: int, weight_format: WeightFormat
) -> LlamaModel:
    return LlamaModel(
        config,
        context_length=context_length,
        make_linear=weight_format.make_linear,
        make_embedding=weight_format.make_embedding,
        sites=[EngramSite(site.config, config.hidden_size, weight_format.make_linear) for site in sites],
    )


def _resolve(checkpoint: Checkpoint, sites: list[EngramSource], wanted: Mapping[str, tuple[int, ...]]) -> WeightSource:
    family = FAMILIES[checkpoint.require("model_type", str)]
    tensors = TensorUnion([checkpoint.tensors, *(site.tensors for site in sites)])  # type: ignore[list-item]
    tables = [name for site in sites for name in [*site.table().tensors, site.config.token_map or ""]]
    # A tied head may be stored all the same.
    tied = ("lm_head.weight",) if "lm_head.weight" not in wanted else ()
    name_map = {**family.name_map, **site_name_map(sites)}
    return WeightSource(tensors, wanted, name_map, ignored=(*family.ignored, *tables, *tied))


def _check_layers(config: LlamaConfig, sites: list[EngramSource]) -> None:
    for site in sites:
        if not 0 <= site.config.layer_id < config.num_layers:
            raise CheckpointError(
                f"engram site is at layer {site.config.layer_id}, the model has layers 0 to {config.num_layers - 1}"
            )
