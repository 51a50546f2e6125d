"""A checkpoint understood: its family, its sites, and every weight resolved, before anything is written."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engram_export.checkpoint import Checkpoint, open_checkpoint
from engram_export.decoder import Decoder
from engram_export.draft_head import DraftHead, DraftLayer
from engram_export.draft_source import PREFIX, VOCABULARY, DraftSource, draft_source
from engram_export.engram_site import EngramSite
from engram_export.engram_source import EngramSource, engram_sources, site_name_map, unit_gains
from engram_export.experts import Experts
from engram_export.families import Architecture, read_architecture
from engram_export.families.llama import LlamaArchitecture
from engram_export.formats import FLOAT, WeightFormat
from engram_export.gguf_file import GgufTensors
from engram_export.host_table import TableSource
from engram_export.linear import BlockLinear, Int4Linear, WeightModule
from engram_export.safetensors_file import SafetensorsFile
from engram_export.scaled_tensors import scaled_tensors
from engram_export.tensor_union import TensorUnion
from engram_export.text_decoder import TextDecoder
from engram_export.weight_map import Joined, ReadRows, Slice, WeightSource, row_slices
from engram_runtime.errors import CheckpointError, RequestError

LAYER = re.compile(r"layers\.\d+")


@dataclass(frozen=True, slots=True, eq=False)
class ModelSource:
    """What an export reads from."""

    checkpoint: Checkpoint
    architecture: Architecture
    sites: list[EngramSource]
    tables: list[TableSource]  # in the order the module takes their rows
    context_length: int
    weights: WeightSource
    computed: Mapping[str, ReadRows]  # parameters no checkpoint holds
    int4: SafetensorsFile | None = None  # parameters of int4 layers that were calibrated
    draft: DraftSource | None = None
    takes_embeddings: bool = False  # whether positions may be given as embeddings

    def build(self, weight_format: WeightFormat, *, context_length: int | None = None) -> Decoder:
        """Make the model's module with uninitialised parameters in a weight format, for another context if given."""
        model = _build(self.architecture, self.sites, context_length or self.context_length, weight_format)
        model.tells_hidden = self.draft is not None or self.takes_embeddings
        return model

    def build_draft(self, weight_format: WeightFormat, *, context_length: int | None = None) -> DraftHead:
        """Make the draft head's module, likewise; only for a model that has one."""
        assert self.draft is not None
        return _build_draft(self.architecture, self.draft, context_length or self.context_length, weight_format)

    def skeleton(self, weight_format: WeightFormat) -> Decoder:
        """Make the model's module with parameters that have shapes but no memory."""
        with FakeTensorMode():
            return self.build(weight_format)

    def draft_skeletons(self, weight_format: WeightFormat) -> list[DraftHead]:
        """Make the draft head's module likewise, if there is one."""
        with FakeTensorMode():
            return [] if self.draft is None else [self.build_draft(weight_format)]

    def kept_type(self, name: str) -> str | None:
        """Return the GGUF type that all tensors of a linear layer share, or None."""
        tensors = self.checkpoint.tensors
        if not isinstance(tensors, GgufTensors) or name.startswith(("sites.", PREFIX)):
            return None
        types = {tensors.tensor_type(tensor) for tensor in self.weights.tensor_names(f"{name}.weight")}
        return types.pop() if len(types) == 1 else None

    def parameters(self, name: str, module: nn.Module) -> Iterator[Slice]:
        """Yield the parameters a module of the model owns, by full name, read and encoded slice by slice."""
        if hasattr(module, "label"):  # a weight format of `engram_export.linear`
            encoder: WeightModule = module  # type: ignore[assignment]
            for start, stop in self.row_slices(name):
                arrays = self.encode(name, encoder, start, stop)
                yield from ((f"{name}.{key}", start, values) for key, values in arrays.items())
            return
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}".lstrip(".")
            read = self.computed.get(full) or partial(self.weights.read_rows, full)
            yield from ((full, start, read(start, stop)) for start, stop in row_slices(parameter.shape))

    def row_slices(self, name: str) -> list[tuple[int, int]]:
        """Return row ranges of the weight of module ``name``, see `engram_export.weight_map.row_slices`."""
        return self.weights.row_slices(f"{name}.weight")

    def encode(self, name: str, module: WeightModule, start: int, stop: int) -> Mapping[str, NDArray[Any]]:
        """Return a module's parameters for rows of its weight, read and encoded now."""
        if isinstance(module, BlockLinear):
            return module.encode_blocks(*self._blocks(f"{name}.weight", start, stop))
        if isinstance(module, Int4Linear) and self.int4 is not None:
            return {key: self.int4.read_raw_rows(f"{name}.{key}", start, stop) for key, _ in module.named_parameters()}
        return module.encode(self.weights.read_rows(f"{name}.weight", start, stop))

    def _blocks(self, weight: str, start: int, stop: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        tensors = self.checkpoint.tensors
        assert isinstance(tensors, GgufTensors)
        parts, first = [], 0
        for name in self.weights.tensor_names(weight):
            end = first + tensors.shape(name)[0]
            if start < end and first < stop:
                parts.append(tensors.read_blocks(name, max(start, first) - first, min(stop, end) - first))
            first = end
        return np.concatenate([codes for codes, _, _ in parts]), np.concatenate([scales for _, scales, _ in parts])


def open_source(path: Path, *, engram: Path | None, context: int | None, embeddings: bool = False) -> ModelSource:
    """Open a checkpoint and resolve all its weights.

    Args:
        engram: a folder whose Engram site or draft head, or both, are added to the checkpoint, or None.
        context: tokens a sequence may have, or None for what the model was trained for.
        embeddings: have the decoder take input embeddings, too.

    Raises:
        CheckpointError: unknown architecture, or one that takes no input embeddings; tensors missing, left over or
            malformed.
        RequestError: a context the model can't have.
    """
    checkpoint = open_checkpoint(path)
    architecture = read_architecture(checkpoint)
    sites = engram_sources(checkpoint, engram)
    draft = None if engram is None else draft_source(engram, architecture.text.vocab_size)
    _check_layers(architecture, sites)
    max_positions = architecture.text.max_positions
    context_length = max_positions if context is None else context
    if not 1 <= context_length <= max_positions:
        raise RequestError(f"context is {context_length}, this model takes 1 to {max_positions} tokens")
    with FakeTensorMode():
        skeleton = _build(architecture, sites, context_length, FLOAT)
        if embeddings and not isinstance(skeleton, TextDecoder):
            raise CheckpointError(
                f"models of {architecture.text.family!r} take no input embeddings, only those of one residual stream "
                f"and an embedding alone, like llama and qwen3; export without --embeddings"
            )
        parameters = dict(skeleton.named_parameters())
        if draft is not None:
            parameters |= _build_draft(architecture, draft, context_length, FLOAT).named_parameters()
    computed = {**skeleton.computed(), **unit_gains(sites), **({} if draft is None else draft.computed())}
    wanted = {name: tuple(values.shape) for name, values in parameters.items() if name not in computed}
    tables = _tables(checkpoint, architecture, sites)
    weights = _resolve(checkpoint, architecture, sites, draft, tables, wanted)
    by_site = {table.site: table for table in tables}
    ordered = [by_site[table.site] for table in skeleton.table_inputs()]
    return ModelSource(
        checkpoint,
        architecture,
        sites,
        ordered,
        context_length,
        weights,
        computed,
        draft=draft,
        takes_embeddings=embeddings,
    )


def has_experts(source: ModelSource) -> bool:
    """Return whether tokens of the model choose among experts."""
    return any(isinstance(module, Experts) for module in source.skeleton(FLOAT).modules())


def load_own_parameters(model: nn.Module, source: ModelSource) -> None:
    """Fill the parameters of a model from the checkpoint, those of a layer while it runs."""
    layers = {name: module for name, module in model.named_modules() if LAYER.fullmatch(name)}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(partial(_load_layer, source, name))
        layer.register_forward_hook(_drop_parameters)
    for name, module in model.named_modules():
        if not any(name == layer or name.startswith(f"{layer}.") for layer in layers):
            load_parameters(source, name, module)


def _load_layer(source: ModelSource, prefix: str, layer: nn.Module, inputs: object) -> None:
    for parameter in layer.parameters():
        parameter.data.untyped_storage().resize_(parameter.nbytes)
    for name, module in layer.named_modules(prefix=prefix):
        load_parameters(source, name, module)


def load_parameters(source: ModelSource, name: str, module: nn.Module) -> None:
    """Fill the parameters a module of the model owns, those of its parts left out."""
    for key, start, values in source.parameters(name, module):
        parameter = module.get_parameter(key.rpartition(".")[2])
        parameter.data[start : start + len(values)] = torch.from_numpy(values).reshape(-1, *parameter.shape[1:])


def _drop_parameters(layer: nn.Module, inputs: object, output: object) -> None:
    for parameter in layer.parameters():
        parameter.data.untyped_storage().resize_(0)


def _build(
    architecture: Architecture, sites: list[EngramSource], context_length: int, weight_format: WeightFormat
) -> Decoder:
    hidden_size = architecture.text.hidden_size
    modules = [EngramSite(site.config, hidden_size, weight_format.make_linear) for site in sites]
    return architecture.build(context_length, weight_format, modules)


def _build_draft(
    architecture: Architecture, draft: DraftSource, context_length: int, weight_format: WeightFormat
) -> DraftHead:
    if not isinstance(architecture, LlamaArchitecture):
        raise CheckpointError(
            f"a draft head is added to models of llama and qwen3, this is {architecture.text.family!r}; "
            f"take the mtp block out of the folder's config"
        )
    text = dataclasses.replace(architecture.text, rms_norm_eps=draft.config.norm_eps)
    layer = dataclasses.replace(architecture, text=text).layer(
        f"{PREFIX}layers.0", text.num_layers, context_length, weight_format
    )
    own = DraftLayer(draft.config, text.hidden_size, layer, weight_format)
    return DraftHead(text, own, architecture.rope, context_length=context_length, weights=weight_format)


def _tables(checkpoint: Checkpoint, architecture: Architecture, sites: list[EngramSource]) -> list[TableSource]:
    vocab_size = architecture.text.vocab_size
    own = [site.table_with_map(vocab_size, checkpoint.tokenizer_json) for site in sites]
    return [*architecture.tables(checkpoint), *own]


def _resolve(
    checkpoint: Checkpoint,
    architecture: Architecture,
    sites: list[EngramSource],
    draft: DraftSource | None,
    tables: list[TableSource],
    wanted: Mapping[str, tuple[int, ...]],
) -> WeightSource:
    own: object = checkpoint.tensors
    added = [site.tensors for site in sites if site.tensors is not own]
    drafts = [] if draft is None else [draft.tensors]
    tensors = TensorUnion([scaled_tensors(checkpoint), *added, *drafts])  # type: ignore[list-item]
    elsewhere = {name for table in tables for name in table.tensors}
    elsewhere |= {site.config.token_map for site in sites if site.config.token_map is not None}
    elsewhere.add(VOCABULARY)
    # A tied head may be stored all the same.
    if "lm_head.weight" not in wanted:
        elsewhere.add("lm_head.weight")
    site_names = {name: Joined(*names) for name, names in site_name_map(sites).items()}
    name_map = {**architecture.name_map(), **site_names, **({} if draft is None else draft.name_map())}
    return WeightSource(tensors, wanted, name_map, ignored=architecture.ignored, ignored_names=elsewhere)


def _check_layers(architecture: Architecture, sites: list[EngramSource]) -> None:
    layers = architecture.text.num_layers
    for site in sites:
        if not 0 <= site.config.layer_id < layers:
            raise CheckpointError(
                f"engram site is at layer {site.config.layer_id}, the model has layers 0 to {layers - 1}"
            )
