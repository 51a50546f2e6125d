"""Bundles on an accelerator beside the host: results, what is counted, and what is refused."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.conftest import Command
from tests.tiny import TinyModel, TinySite
from tests.tiny_families import FAMILIES
from tests.workshop import THREADS, Workshop, copy_folder, random_ids

from engram_compilers.build import compile_bundle
from engram_runtime import LLM
from engram_runtime.bundle import Bundle
from engram_runtime.errors import CompileError, TargetError
from engram_runtime.executor import load_executor
from engram_runtime.npu.commands_file import CommandsFile, read_commands
from engram_runtime.npu.device import Cost, Product
from engram_runtime.npu.executor import NpuExecutor
from engram_runtime.npu.geometry import SystolicArray
from engram_runtime.npu.ledger import Ledger
from engram_runtime.npu.report import phase_figures, phase_lines
from engram_runtime.session import Session
from engram_targets import load_profile

pytestmark = pytest.mark.slow
SMALL, LARGE, DOTS = "npu-systolic-small", "npu-systolic", "npu-dot-engine"
TOKENS = 10  # of passes of four and of one
LAYER = ("mixer.qkv", "mixer.output", "feed_forward.gate_up", "feed_forward.down")
DENSE = [  # linear layers of a tiny model with a site and a tied head
    *(f"layers.0.{name}" for name in LAYER),
    *("sites.1.key_proj", "sites.1.value_proj"),
    *(f"layers.1.{name}" for name in LAYER),
    "embedding",
]


def dense(workshop: Workshop, quant: str) -> Bundle:
    return workshop.bundle(workshop.checkpoint(TinyModel(), TinySite()), quant=quant)


def experts(workshop: Workshop, quant: str) -> Bundle:
    return workshop.bundle(workshop.family(FAMILIES["qwen3_moe"][0]), quant=quant)


MODELS: dict[str, Callable[[Workshop, str], Bundle]] = {"dense": dense, "experts": experts}


class Compiled:
    """Bundles with a library for this machine, of portable kernels, and one for a host with an accelerator."""

    def __init__(self, workshop: Workshop, root: Path) -> None:
        self._workshop = workshop
        self._root = root

    def _host(self, model: str, quant: str) -> Bundle:
        if (model, quant) == ("dense", "int8"):
            return self._workshop.ready()  # which other tests use as well
        bundle = MODELS[model](self._workshop, quant)
        return self._workshop.compiled(bundle, decode_tokens=(1,), prefill_tokens=(4,))

    def bundle(self, model: str, quant: str, target: str) -> Bundle:
        folder = self._root / f"{model}-{quant}-{target}"
        if not folder.exists():
            copy_folder(self._host(model, quant).path, folder)
            profile = dataclasses.replace(load_profile(target), decode_tokens=(1,), prefill_tokens=(4,))
            compile_bundle(Bundle.open(folder), profile)
        return Bundle.open(folder)


@pytest.fixture(scope="module")
def compiled(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(workshop, tmp_path_factory.mktemp("npu"))


def load_npu(bundle: Bundle, target: str) -> NpuExecutor:
    executor = load_executor("tvm", bundle, threads=THREADS, target=target)
    assert isinstance(executor, NpuExecutor)
    return executor


def logits(bundle: Bundle, executor: Any) -> NDArray[np.float32]:
    with Session.open(bundle, executor) as session:
        return np.concatenate(list(session.logits(random_ids(TOKENS))))


@pytest.mark.parametrize(
    ("model", "quant", "target"),
    [
        ("dense", "int8", SMALL),
        pytest.param("experts", "int4", SMALL, marks=pytest.mark.exhaustive),
        *(
            pytest.param(model, quant, target, marks=pytest.mark.exhaustive)
            for model in MODELS
            for quant in ("int8", "int4")
            for target in (SMALL, LARGE, DOTS)
        ),
    ],
)
def test_logits_are_those_of_the_portable_library(compiled: Compiled, model: str, quant: str, target: str) -> None:
    bundle = compiled.bundle(model, quant, target)
    expected = logits(bundle, load_executor("tvm", bundle, threads=THREADS))
    found = logits(bundle, load_npu(bundle, target))
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32), strict=True)


def test_a_text_is_that_of_the_portable_library(compiled: Compiled) -> None:
    bundle = compiled.bundle("dense", "int8", SMALL)
    texts = []
    for target in (None, SMALL):
        with LLM(bundle.path, threads=THREADS, target=target) as llm:
            texts.append(llm.generate(random_ids(5), max_tokens=12).token_ids)
    assert texts[0] == texts[1]


def test_every_linear_layer_runs_on_the_accelerator_and_moves_what_it_must(compiled: Compiled) -> None:
    bundle = compiled.bundle("dense", "int8", SMALL)
    executor = load_npu(bundle, SMALL)
    logits(bundle, executor)
    found = phase_figures(executor.ledger, executor.geometry, TOKENS)
    passes = found["passes"]
    assert [name for name, layer in found["layers"].items() if layer["runs"] == passes] == DENSE
    assert found["traffic"] <= 1.2
    assert found["cycles"] == sum(layer["cycles"] for layer in found["layers"].values())
    assert [wait.passes for wait in executor.ledger.waits.values()] == [passes]


@pytest.mark.exhaustive
def test_an_expert_that_tokens_chose_is_a_run(compiled: Compiled) -> None:
    bundle = compiled.bundle("experts", "int4", SMALL)
    executor = load_npu(bundle, SMALL)
    logits(bundle, executor)
    runs = {name: layer.runs for name, layer in executor.ledger.layers.items() if "experts" in name}
    assert executor.experts_read is not None
    assert sum(runs.values()) == 2 * executor.experts_read  # two layers each


def test_weights_are_in_the_library_once_but_for_an_embedding_that_is_the_head_too(compiled: Compiled) -> None:
    bundle = compiled.bundle("dense", "int8", SMALL)
    executor = load_npu(bundle, SMALL)
    names = [tensor.name.partition(":")[0] for tensor in executor.info.tensors if tensor.dtype == "uint8"]
    assert sorted(name for name in set(names) if names.count(name) > 1) == ["embedding.codes"]


def damaged(compiled: Compiled, folder: Path) -> tuple[Bundle, Path]:
    """Return a copy of a bundle whose machine code is gone, so that what is refused is so before it is loaded."""
    bundle = Bundle.open(copy_folder(compiled.bundle("dense", "int8", SMALL).path, folder))
    library = bundle.file("lib") / SMALL
    (library / "model.so").unlink()
    return bundle, library / "commands.bin"


class InterruptedProgram:
    """A program of any product whose run the user interrupts."""

    product = Product(rows=1, inputs=1, outputs=1, weights="int8")
    weight_bytes = 1

    def run(self, weights: NDArray[np.uint8], planes: NDArray[np.int8]) -> tuple[NDArray[np.int32], Cost]:
        raise KeyboardInterrupt


def refusal(bundle: Bundle) -> str:
    with pytest.raises(TargetError) as caught:
        load_npu(bundle, SMALL)
    return str(caught.value)


def test_a_library_without_its_commands_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    bundle, commands = damaged(compiled, tmp_path / "bundle")
    commands.unlink()
    assert refusal(bundle) == (
        f"{commands} is missing, without which the accelerator has nothing to run; compile the bundle again"
    )


def test_streams_of_another_geometry_are_refused(compiled: Compiled, tmp_path: Path) -> None:
    bundle, commands = damaged(compiled, tmp_path / "bundle")
    file = read_commands(commands)
    assert isinstance(file.geometry, SystolicArray)
    wider = dataclasses.replace(file.geometry, columns=64)
    commands.write_bytes(CommandsFile(wider, file.streams, file.layers).to_bytes())
    assert refusal(bundle) == (
        f"a command stream is for a systolic array of 32 x 32 with its own memories, this one is {wider}; "
        "compile the bundle again"
    )


def test_sound_streams_of_another_library_are_refused(compiled: Compiled, tmp_path: Path) -> None:
    bundle, commands = damaged(compiled, tmp_path / "bundle")
    file = read_commands(commands)
    commands.write_bytes(CommandsFile(file.geometry, file.streams[::-1], file.layers).to_bytes())
    assert refusal(bundle) == f"{commands} is not what was compiled; compile the bundle again"


def test_an_interrupt_of_the_simulator_ends_the_pass(compiled: Compiled) -> None:
    bundle = compiled.bundle("dense", "int8", SMALL)
    executor = load_npu(bundle, SMALL)
    executor.programs = [InterruptedProgram()] * len(executor.programs)
    with pytest.raises(KeyboardInterrupt):
        logits(bundle, executor)


def test_a_model_without_integers_has_nothing_for_an_accelerator(workshop: Workshop, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_folder(dense(workshop, "none").path, tmp_path / "bundle"))
    profile = dataclasses.replace(load_profile(SMALL), decode_tokens=(1,), prefill_tokens=(4,))
    with pytest.raises(CompileError) as caught:
        compile_bundle(bundle, profile)
    assert str(caught.value) == (
        "no layer has weights of int8 or two-level int4, which are what accelerators multiply; export the model with "
        "--quant int8 or --quant int4"
    )
    assert list(bundle.file("lib").iterdir()) == []


def test_an_impossible_geometry_is_refused(compiled: Compiled, tmp_path: Path) -> None:
    bundle, commands = damaged(compiled, tmp_path / "bundle")
    commands.write_bytes(commands.read_bytes().replace(b'"rows": 32', b'"rows": 33'))
    assert refusal(bundle) == f"{commands} has an array of 33 x 32 cells, expected multiples of 32 and 4"


@pytest.mark.parametrize("text", [b"", b"ENGRAMNP", b"ENGRAMNP" + b"\xff" * 8, b"ELF" * 9])
def test_a_file_without_streams_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "commands.bin"
    path.write_bytes(text)
    with pytest.raises(TargetError) as caught:
        read_commands(path)
    assert str(caught.value) == f"{path} of {len(text)} bytes holds no command streams; compile the bundle again"


GEOMETRY = SystolicArray(
    rows=32,
    columns=8,
    weight_bytes=512,
    input_bytes=128,
    accumulator_bytes=256,
    dma_bytes_per_cycle=4,
    dma_latency_cycles=10,
    clock_hz=1000,
)


@given(place=st.integers(0, 300), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, place: int, byte: int) -> None:
    path = tmp_path_factory.mktemp("commands") / "commands.bin"
    data = bytearray(CommandsFile(GEOMETRY, [b"one", b"three"], ["a", "b"]).to_bytes())
    data[place % len(data)] = byte
    path.write_bytes(data)
    with contextlib.suppress(TargetError):
        assert sum(map(len, read_commands(path).streams)) == 8


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "commands.bin"
    path.write_bytes(CommandsFile(GEOMETRY, [b"one", b"three"], ["a", "b"]).to_bytes())
    found = read_commands(path)
    assert (found.geometry, found.streams, found.layers) == (GEOMETRY, [b"one", b"three"], ("a", "b"))


def kept_ledger() -> Ledger:
    """Return a ledger of a pass over one token by two layers of an array that does 256 products a cycle."""
    ledger = Ledger(["layers.0.a", "layers.0.b", "head"], GEOMETRY.clock_hz)
    cost = Cost(
        cycles=100, array_cycles=50, dma_in_cycles=80, macs=2560, weight_bytes=300, input_bytes=20, output_bytes=40
    )
    ledger.add(0, Product(rows=2, inputs=10, outputs=25, weights="int8"), 1, cost)
    ledger.add(1, Product(rows=2, inputs=10, outputs=25, weights="int8"), 2, cost)
    ledger.add_wait(0, 0.4, 100)
    ledger.passes, ledger.host_s = 1, 0.25
    return ledger


def test_figures_are_sums_of_what_was_counted() -> None:
    found = phase_figures(kept_ledger(), GEOMETRY, 1)
    assert (found["ms"], found["tok_s"], found["host_ms"], found["cycles"]) == (200.0, 5.0, 250.0, 200)
    assert found["compulsory_bytes"] == (250 + 10 + 100) + (250 + 20 + 200)
    assert (found["array_use"], found["dma_use"]) == (0.1, 0.8)
    assert found["rows"] == [{"site": 0, "fetch_ms": 400.0, "until_layer_ms": 100.0, "hidden": 0.25}]
    assert list(found["layers"]) == ["layers.0.a", "layers.0.b"]


def test_figures_are_shown_by_layers() -> None:
    found: Mapping[str, Any] = phase_figures(kept_ledger(), GEOMETRY, 1)
    first, rows, _, _, _, layer, whole = phase_lines("decode", found)
    assert first == (
        "decode: 1 tokens in 1 passes, 200.000 ms simulated, 5.0 tok/s; the host's part took 250.0 ms here, measured, "
        "beside it"
    )
    assert rows == (
        "rows of site 0: there after 400.000 ms, measured; the array reaches the layer after 100.000 ms, simulated, "
        "which hides 25% of the wait"
    )
    shares = "2 | 0.2 | 0.001 | 0.000 | 0.000 | 0.867 | 10.0% | 80.0% |"
    assert (layer, whole) == (f"| layers.0 | {shares}", f"| all | {shares}")


def test_simulate_prints_figures_of_a_prompt_and_of_decoding(compiled: Compiled, command: Command) -> None:
    bundle = compiled.bundle("dense", "int8", SMALL)
    options = ("--target", SMALL, "--prompt-tokens", 8, "--tokens", 3)
    found = command("engram", "simulate", bundle.path, *options, "--json").json
    assert (found["accelerator"], found["geometry"]["rows"]) == ("systolic", 32)
    assert [(found[phase]["tokens"], found[phase]["passes"]) for phase in ("prompt", "decode")] == [(8, 2), (3, 3)]
    lines = command("engram", "simulate", bundle.path, *options).out.splitlines()
    assert lines[0].startswith(f"{SMALL}: systolic, rows 32, columns 32, ")
    assert [line for line in lines if line.startswith("| all |")] == [
        list(phase_lines(phase, found[phase]))[-1] for phase in ("prompt", "decode")
    ]


def test_simulate_needs_an_accelerator(compiled: Compiled, command: Command) -> None:
    bundle = compiled.bundle("dense", "int8", SMALL)
    (target,) = (path.name for path in bundle.file("lib").iterdir() if path.name != SMALL)
    outcome = command("engram", "simulate", bundle.path, "--target", target)
    expected = (
        f"engram: target {target} runs on cpu, without an accelerator to simulate; measure it with: "
        f"engram bench {bundle.path} --target {target}\n"
    )
    assert (outcome.code, outcome.err) == (2, expected)


def test_an_accelerator_is_never_chosen_unless_it_is_named(compiled: Compiled, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_folder(compiled.bundle("dense", "int8", SMALL).path, tmp_path / "bundle"))
    for folder in bundle.file("lib").iterdir():
        if folder.name != SMALL:
            (folder / "compile.json").unlink()
    with pytest.raises(TargetError) as caught:
        load_executor("tvm", bundle, threads=THREADS)
    assert str(caught.value) == (
        f"bundle {bundle.path} has no compiled library but for ['{SMALL}'], which --target picks; "
        f"run: engram compile {bundle.path} --target native"
    )


def test_the_description_of_a_library_names_its_device(compiled: Compiled) -> None:
    path = compiled.bundle("dense", "int8", SMALL).file("lib") / SMALL / "compile.json"
    raw = json.loads(path.read_text())
    assert (raw["device"], raw["commands"], sorted(raw["sha256"])) == (
        "npu",
        "commands.bin",
        ["commands", "library", "runtime", "weights"],
    )
