"""A model's graphs and the one file of their weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from engram_export.formats import WeightFormat
from engram_export.journal import Journal
from engram_export.onnx_graph import TracedGraph, trace, trace_draft
from engram_export.source import ModelSource
from engram_export.weights_file import WEIGHTS_ALIGNMENT, SafetensorsWriter
from engram_runtime.manifest import DECODER, DRAFT_HEAD, GraphSpec
from engram_runtime.safetensors_layout import SafetensorsLayout, TensorPlan

GRAPH_FOLDER, WEIGHTS_FILE, VOCABULARY_FILE = "graph", "weights.safetensors", "mtp.vocabulary.int32"
Progress = Callable[[int], None]
Stage = Callable[[str, int], AbstractContextManager[Progress]]  # shows a title and how far of so many bytes


def trace_graphs(source: ModelSource, weights: WeightFormat) -> dict[str, TracedGraph]:
    """Trace the decoder and, where there is one, its draft head."""
    embedding_width = source.architecture.text.hidden_size if source.takes_embeddings else 0
    graphs = {DECODER: trace(lambda: source.build(weights), embedding_width)}
    if source.draft is not None:
        graphs[DRAFT_HEAD] = trace_draft(lambda: source.build_draft(weights))
    return graphs


def write_graphs(
    source: ModelSource, graphs: Mapping[str, TracedGraph], journal: Journal, stage: Stage
) -> dict[str, GraphSpec]:
    """Stream the weights from the checkpoint into one file of the bundle, a slice at a time, and write the graphs.

    A weight that several graphs use, by its name, stands there once.
    """
    folder = journal.folder / GRAPH_FOLDER
    plans = list({plan.name: plan for graph in graphs.values() for plan in graph.weights()}.values())
    modules = {name: module for graph in graphs.values() for name, module in graph.skeleton.named_modules()}
    folder.mkdir(exist_ok=True)
    path = folder / WEIGHTS_FILE
    with stage("weights", sum(plan.bytes for plan in plans)) as progress:
        journal.once(path, lambda: write_weights(source, modules, plans, path, progress), progress)
    offsets = SafetensorsLayout.of(plans, alignment=WEIGHTS_ALIGNMENT).offsets
    return {name: graph.save(folder / f"{name}.onnx", WEIGHTS_FILE, offsets) for name, graph in graphs.items()}


def write_weights(
    source: ModelSource,
    modules: Mapping[str, nn.Module],
    plans: Sequence[TensorPlan],
    path: Path,
    progress: Progress,
) -> None:
    """Write the planned parameters of modules, by name."""
    names = {plan.name for plan in plans}
    with SafetensorsWriter(path, plans) as writer:
        for name, module in modules.items():
            for key, start, values in source.parameters(name, module):
                if key in names:
                    writer.write_rows(key, start, values)
                    progress(values.nbytes)


def write_vocabulary(source: ModelSource, journal: Journal) -> str | None:
    """Write the ids a draft head tells apart, little-endian int32; returns their file."""
    if source.draft is None:
        return None
    path = journal.folder / GRAPH_FOLDER / VOCABULARY_FILE
    path.write_bytes(source.draft.vocabulary.astype("<i4").tobytes())
    return f"{GRAPH_FOLDER}/{VOCABULARY_FILE}"
