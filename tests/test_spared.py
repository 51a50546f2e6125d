"""What is spared changes nothing: graphs of a structure that was traced before are those of tracing it again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import spared
from tests.spared import structure
from tests.tiny import TinyModel, TinySite
from tests.workshop import Workshop, export

from engram_export import graph_writer
from engram_export.decoder import Decoder
from engram_export.formats import weight_format
from engram_export.onnx_graph import TracedGraph, trace
from engram_export.source import open_source

MODEL, SITE = TinyModel(), TinySite()


def exported(workshop: Workshop, out: Path) -> dict[str, bytes]:
    export(workshop.checkpoint(MODEL, SITE), out, quant="int8")
    return {path.name: path.read_bytes() for path in out.rglob("*.onnx")}


def test_a_remembered_graph_is_that_of_tracing(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = []

    def counted(build: Callable[[], Decoder], embedding_width: int = 0) -> TracedGraph:
        traces.append(embedding_width)
        return trace(build, embedding_width)

    monkeypatch.setattr(spared, "trace", counted)
    monkeypatch.setattr(graph_writer, "trace", None)  # which this puts something in place of
    spared.remember_traces()
    remembered = [exported(workshop, tmp_path / name) for name in ("first", "second")]
    assert traces == [0]
    monkeypatch.setattr(graph_writer, "trace", trace)
    assert remembered == [exported(workshop, tmp_path / "traced")] * 2
    assert list(remembered[0]) == ["decoder.onnx"]


def structure_of(workshop: Workshop, model: TinyModel, site: TinySite, quant: str, context: int | None) -> str:
    source = open_source(workshop.checkpoint(model, site), engram=None, context=context)
    return structure(source.skeleton(weight_format(quant, source.kept_type)))


def test_what_changes_a_graph_is_another_structure(workshop: Workshop) -> None:
    others = [
        (MODEL, SITE, "int8", None),
        (MODEL, SITE, "int4", None),
        (MODEL, SITE, "int8", 64),
        (dataclasses.replace(MODEL, tied=not MODEL.tied), SITE, "int8", None),
        (MODEL, dataclasses.replace(SITE, convolution=not SITE.convolution), "int8", None),
    ]
    structures = [structure_of(workshop, *each) for each in others]
    assert len(set(structures)) == len(others)
    assert structure_of(workshop, *others[0]) == structures[0]
    assert not any("..." in each or " at 0x" in each for each in structures)
