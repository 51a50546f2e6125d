"""Files from strangers: the faults' survey sees what goes wrong, and each known attack is refused with its own text."""

import ctypes
import json
import os
import pickle
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.faults import parsers_survey
from tests.faults.parsers_code import Bomb
from tests.faults.parsers_corpus import EXPECTED, found_texts
from tests.faults.parsers_json import MANIFEST
from tests.faults.parsers_paths import opens_outside
from tests.faults.parsers_survey import Parser, survey
from tests.test_bundle import GRAPH, write_bundle

from engram_export.exact_graph import open_exact_executor
from engram_export.journal import Journal
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError
from engram_runtime.executors.onnxruntime_session import load
from engram_runtime.onnx_places import check_places
from engram_runtime.strict_json import read_json_object


def a_parser(number: int) -> None:
    """Treat a file as no parser may, each number in its own way."""
    if number == 1:
        raise ValueError("a foreign error")
    if number == 2:
        ctypes.string_at(0)
    if number == 3:
        end = time.process_time() + 0.7
        while time.process_time() < end:
            pass
    if number == 4:
        np.ones(100 << 20, dtype=np.uint8)
    if number == 5:
        raise BundleError("x" * 30_000)
    if number == 6:
        raise BundleError("refused")


def test_the_survey_sees_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers_survey, "MOST_CPU_S", 0.5)
    monkeypatch.setattr(parsers_survey, "input_of", lambda parser, index: str(index).encode())
    parser = Parser(
        name="numbers",
        damaged=lambda rng: b"",
        use=lambda path: a_parser(int(path.read_text())),
        refusals=(BundleError,),
        sound=b"0",
    )
    outcome = survey((parser, 7))
    told = [re.sub("[.0-9]+ (s|MiB)$", r"N \1", failure) for failure in outcome.failures]
    assert told == [
        "numbers 1: builtins.ValueError: a foreign error",
        "numbers 2: the process ended by SIGSEGV",
        "numbers 3: it took N s",
        "numbers 4: memory grew by N MiB",
        f"numbers 5: an error of 30000 characters: {'x' * 100}",
    ]
    assert (outcome.tried, outcome.survived) == (7, 2)


def test_the_trap_for_pickles_springs(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_file_opened_outside_is_noted(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/own").write_text("")
    (tmp_path / "secret").write_text("")
    with opens_outside(tmp_path / "bundle") as found:
        (tmp_path / "bundle/own").read_text()
        (tmp_path / "bundle/../secret").read_text()
    assert found == [str(tmp_path / "secret")]


def test_known_attacks_are_refused_with_their_own_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert dict(found_texts()) == json.loads(EXPECTED.read_text())


def test_damaged_manifests_are_bundle_errors() -> None:
    assert survey((MANIFEST, 300)).failures == ()


@pytest.mark.parametrize("open_executor", [partial(load, target=None), open_exact_executor])
def test_no_executor_opens_a_graph_whose_weights_lie_elsewhere(
    tmp_path: Path, open_executor: Callable[..., object]
) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "bundle"))
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": "../secret", "offset": "0", "length": "16"}.items():
        tensor.external_data.add(key=key, value=value)
    graph = bundle.file(GRAPH)
    graph.write_bytes(onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(initializer=[tensor])).SerializeToString())
    with pytest.raises(BundleError) as caught:
        open_executor(bundle, threads=1)
    place = "{'location': '../secret', 'offset': '0', 'length': '16'}"
    assert str(caught.value) == (
        f"{graph} has a tensor said to lie at {place}, outside weights.safetensors of 256 bytes; "
        f"export the bundle again"
    )


def test_a_field_that_other_readers_take_for_a_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    graph_key = 7 << 3 | 2  # and bit 32, which protobuf in C++ drops
    (tmp_path / "graph").write_bytes(bytes([graph_key | 128, 128, 128, 128, 1 << 4, 0]))
    with pytest.raises(BundleError) as caught:
        check_places(tmp_path / "graph", tmp_path / "weights")
    assert str(caught.value) == (
        f"{tmp_path / 'graph'} is not an ONNX file: the key at byte 0 has more than 32 bits; export the bundle again"
    )


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_json_is_read_from_plain_files_only(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "compile.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(BundleError) as caught:
        read_json_object(path)
    assert str(caught.value) == f"{path} is not a plain file"


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"path": "../x", "bytes": 1}', b"[" * 5000, b'{"path": 1}'])
def test_a_damaged_journal_is_another_export_s(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(json.dumps({"fingerprint": "f", "version": 2}).encode() + b"\n" + line + b"\n")
    (tmp_path / "export").mkdir()
    with path.open("r+b") as stream:
        assert Journal(stream, tmp_path / "export", "f").dropped
