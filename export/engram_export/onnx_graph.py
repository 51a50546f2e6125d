"""Trace a model without data and write it as ONNX, its weights referred to in a safetensors file beside it."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engram_export.decoder import Decoder
from engram_export.draft_head import DraftHead
from engram_export.multi_stream_site import MultiStreamSite
from engram_export.onnx_functions import add_functions
from engram_runtime.manifest import ACTIVITY, EMBEDDINGS, HIDDEN, NEXT_HIDDEN, GraphSpec, StateSpec, TensorSpec
from engram_runtime.safetensors_layout import TensorPlan

OPSET = 23  # the first with RMSNormalization
TRACED_TOKENS, TRACED_LOGIT_ROWS = 5, 3  # unlike each other and 1, so that no axis is taken for a constant

# They warn of every weight that has no data yet, and of torchvision, which nothing here uses.
NOISY_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter while it works, its FutureWarnings of its own deprecated names included."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True, slots=True, eq=False)
class TracedGraph:
    """A graph whose weights have names, shapes and dtypes but no data yet; ``skeleton`` is the module it came from."""

    model: ir.Model
    skeleton: nn.Module
    states: tuple[StateSpec, ...]

    def weights(self) -> list[TensorPlan]:
        """Return the weights the graph uses, under the module's parameter names."""
        return [_plan(value) for value in self.model.graph.initializers.values() if value.const_value is None]

    def save(self, path: Path, weights_file: str, offsets: Mapping[str, int]) -> GraphSpec:
        """Write the graph beside its weights; ``offsets`` are those of `weights` in the file of that name."""
        for value in self.model.graph.initializers.values():
            if value.const_value is None:
                plan = _plan(value)
                dtype, shape = ir.DataType.from_numpy(np.dtype(plan.dtype)), ir.Shape(plan.shape)
                value.const_value = ir.ExternalTensor(
                    weights_file, offsets[plan.name], plan.bytes, dtype, shape=shape, name=plan.name
                )
        ir.save(self.model, path)
        graph, folder = self.model.graph, path.parent.name
        state_names = {name for state in self.states for name in (state.name, f"next.{state.name}")}
        return GraphSpec(
            file=f"{folder}/{path.name}",
            weights=f"{folder}/{weights_file}",
            inputs=tuple(_tensor_spec(value) for value in graph.inputs if value.name not in state_names),
            outputs=tuple(_tensor_spec(value) for value in graph.outputs if value.name not in state_names),
            states=self.states,
        )


def trace(build: Callable[[], Decoder], embedding_width: int = 0) -> TracedGraph:
    """Trace the model ``build()`` makes; no parameter gets memory.

    The graph's inputs are token_ids ``[T]``, position ``[1]``, logit_rows ``[R]``, ``rows.<site>`` ``[T, C, d]``, the
    states and, if it takes them, embeddings ``[T, D]``. Its outputs are logits ``[R, V]``, ``activity.<site>``
    ``[T, G, 3]`` of gated sites, hidden ``[T, D]`` if it tells it, and ``next.<state>``.

    Args:
        embedding_width: D of the input embeddings it takes, 0 for none.
    """
    with FakeTensorMode():
        model = build()
        states = model.state_specs()
        tokens, rows_wanted = torch.export.Dim("T"), torch.export.Dim("R")
        arguments = _example_inputs(model, states, embedding_width)
        dynamic: tuple[Any, ...] = (
            {0: tokens},
            {},
            {0: rows_wanted},
            [{0: tokens} for _ in arguments[3]],
            [{} for _ in states],
            *([{0: tokens}] if embedding_width else []),
        )
        graph = _exported(model, arguments, dynamic)
    _optimise(graph, model)
    sites = [f"rows.{table.site}" for table in model.table_inputs()]
    inputs = ["token_ids", "position", "logit_rows", *sites, *(state.name for state in states)]
    inputs += [EMBEDDINGS] if embedding_width else []
    activity = [f"{ACTIVITY}{site}" for site in model.gated_sites()]
    told = [*activity, *([HIDDEN] if model.tells_hidden else [])]
    outputs = ["logits", *told, *(f"next.{state.name}" for state in states)]
    _name_interface(graph, inputs, outputs, {0: "T", 2: "R"})
    return TracedGraph(graph, model, states)


def trace_draft(build: Callable[[], DraftHead]) -> TracedGraph:
    """Trace a draft head.

    The graph's inputs are token_ids ``[T]``, position ``[1]``, logit_rows ``[R]``, hidden ``[T, D]`` and the states;
    its outputs are logits ``[R, n]``, next.hidden ``[T, D]`` and ``next.<state>``.
    """
    with FakeTensorMode():
        head = build()
        states = head.state_specs()
        tokens, rows_wanted = torch.export.Dim("T"), torch.export.Dim("R")
        ids, position, rows = _example_places()
        arguments = (
            ids,
            position,
            rows,
            torch.empty(TRACED_TOKENS, head.hidden_size),
            [torch.empty(state.shape) for state in states],
        )
        graph = _exported(head, arguments, ({0: tokens}, {}, {0: rows_wanted}, {0: tokens}, [{} for _ in states]))
    _optimise(graph, head)
    inputs = ["token_ids", "position", "logit_rows", HIDDEN, *(state.name for state in states)]
    outputs = ["logits", NEXT_HIDDEN, *(f"next.{state.name}" for state in states)]
    _name_interface(graph, inputs, outputs, {0: "T", 2: "R"})
    return TracedGraph(graph, head, states)


def trace_site(build: Callable[[], MultiStreamSite]) -> TracedGraph:
    """Trace a site by itself: from hidden ``[T, G, D]`` and ``rows.<site>`` ``[T, C, d]`` to updated ``[T, G, D]``."""
    with FakeTensorMode():
        site = build()
        config, tokens = site.config, torch.export.Dim("T")
        hidden = torch.empty(TRACED_TOKENS, config.num_streams, config.hidden_size)
        rows = torch.empty(TRACED_TOKENS, config.table.columns, config.table.row_dim)
        graph = _exported(site, (hidden, rows), ({0: tokens}, {0: tokens}))
    _optimise(graph, site)
    _name_interface(graph, ["hidden", f"rows.{config.table.site}"], ["updated"], {0: "T"})
    return TracedGraph(graph, site, ())


def _exported(module: nn.Module, arguments: tuple[Any, ...], dynamic: tuple[Any, ...]) -> ir.Model:
    with _quiet(), torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
        exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert exported is not None
    return exported.model


def _optimise(graph: ir.Model, module: nn.Module) -> None:
    """Take the data that tracing made up from the parameters, so that none is folded, and simplify the rest."""
    parameters = dict(module.named_parameters())
    for name, value in graph.graph.initializers.items():
        if name in parameters:
            value.const_value = None
    with _quiet():
        onnxscript.optimizer.optimize(graph)
    add_functions(graph)  # the optimizer would inline them


def _example_inputs(model: Decoder, states: Sequence[StateSpec], embedding_width: int) -> tuple[Any, ...]:
    rows = [torch.empty(TRACED_TOKENS, table.columns, table.row_dim) for table in model.table_inputs()]
    embeddings = [torch.empty(TRACED_TOKENS, embedding_width)] if embedding_width else []
    return (*_example_places(), rows, [torch.empty(state.shape) for state in states], *embeddings)


def _example_places() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, position and rows of logits."""
    sizes = (TRACED_TOKENS, 1, TRACED_LOGIT_ROWS)
    ids, position, rows = (torch.empty(size, dtype=torch.int64) for size in sizes)
    return ids, position, rows


def _name_interface(graph: ir.Model, inputs: Sequence[str], outputs: Sequence[str], axes: Mapping[int, str]) -> None:
    """Name inputs and outputs; ``axes`` names the first axes of inputs by their number."""
    for value, name in zip(graph.graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(graph.graph.outputs, outputs, strict=True):
        value.name = name
    renamed = {str(graph.graph.inputs[number].shape[0]): name for number, name in axes.items()}  # type: ignore[index]
    for value in (*graph.graph.inputs, *graph.graph.outputs, *(out for node in graph.graph for out in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([renamed.get(str(axis), axis) for axis in value.shape])


def _plan(value: ir.Value) -> TensorPlan:
    spec = _tensor_spec(value)
    return TensorPlan(spec.name, spec.dtype, tuple(int(axis) for axis in spec.shape))


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)
