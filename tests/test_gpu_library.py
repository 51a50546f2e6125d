"""Libraries for GPUs: run by pocl on the processor, their sources compiled by nvcc, and what is refused."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.conftest import Command
from tests.opencl import needs_opencl, opencl_profile
from tests.tiny_families import FAMILIES
from tests.workshop import Workshop, copy_folder, random_ids

from engram_compilers.build import compile_bundle
from engram_compilers.gpu import checking
from engram_compilers.gpu.checking import check_source, nvcc
from engram_compilers.gpu.sources import generate
from engram_compilers.kernels import activation, gpu
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, CompileError, RequestError, TargetError
from engram_runtime.executor import PendingRows, load_executor
from engram_runtime.gpu.plan import AwaitRows, ForwardPass, Launch, Place, read_plan
from engram_runtime.gpu.running import BoundPass, Memory
from engram_runtime.library import find_library
from engram_runtime.manifest import GraphSpec, TensorSpec
from engram_runtime.parallel.group import Group
from engram_runtime.session import Session
from engram_targets import GpuProfile, load_profile

TOKENS, CONTINUED = 11, 16
TARGET = "opencl"
FAMILY_CASES = [
    pytest.param(name, quant, marks=pytest.mark.exhaustive) for name in FAMILIES for quant in ("none", "int8")
]
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="needs nvcc of NVIDIA's CUDA toolkit: see docs/gpu.md")


def greedy(bundle: Bundle, executor: str, target: str | None) -> tuple[list[int], NDArray[np.float32]]:
    """Return what a text is continued with, and all logits."""
    with Session.open(bundle, load_executor(executor, bundle, threads=1, target=target)) as session:
        logits = list(session.logits(random_ids(TOKENS)))
        token_ids = []
        for _ in range(CONTINUED):
            token_ids.append(int(logits[-1][-1].argmax()))
            logits.append(session.decode(token_ids[-1:]))
        return token_ids, np.concatenate(logits)


@pytest.fixture(scope="module")
def bundle(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle with a site that has a window, compiled for this machine and for OpenCL."""
    folder = copy_folder(workshop.ready().path, tmp_path_factory.mktemp("gpu") / "bundle")
    compile_bundle(Bundle.open(folder), opencl_profile())
    return Bundle.open(folder)


@needs_opencl
def test_an_opencl_library_continues_a_text_as_the_processors_does(bundle: Bundle) -> None:
    token_ids, logits = greedy(bundle, "tvm", None)
    found_ids, found = greedy(bundle, "tvm", TARGET)
    assert found_ids == token_ids
    np.testing.assert_allclose(found, logits, atol=2e-3)


def test_a_plan_of_other_kernels_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("pyopencl", reason="needs pyopencl: pip install 'engram-edge[opencl]'")
    copy = Bundle.open(copy_folder(bundle.path, tmp_path / "bundle"))
    folder, info = find_library(copy, TARGET)
    plan = folder / info.files["commands"]
    plan.write_text(json.dumps(json.loads(plan.read_text()), indent=1))  # as sound as before
    with pytest.raises(TargetError) as caught:
        load_executor("tvm", copy, threads=1, target=TARGET)
    assert str(caught.value) == f"{plan} is not what was compiled; compile the bundle again"


@needs_opencl
def test_a_row_has_the_bits_of_a_pass_of_its_own(bundle: Bundle) -> None:
    loaded = load_executor("tvm", bundle, threads=1, target=TARGET)
    with Session.open(bundle, loaded) as session:
        together = np.concatenate(list(session.logits(random_ids(8))))
    with Session.open(bundle, loaded) as session:
        apart = np.concatenate([session.decode([token_id]) for token_id in random_ids(8)])
    np.testing.assert_array_equal(together, apart, strict=True)


@needs_opencl
def test_two_sessions_on_one_device_do_not_disturb_each_other(bundle: Bundle) -> None:
    loaded = load_executor("tvm", bundle, threads=1, target=TARGET)
    with Session.open(bundle, loaded) as session, Session.open(bundle, loaded) as other:
        alone = [session.decode([token_id]) for token_id in random_ids(6)]
        session.trim(4)
        for token_id, wanted in zip(random_ids(6)[2:], alone[2:], strict=True):
            other.decode([token_id + 1])
            np.testing.assert_array_equal(session.decode([token_id]), wanted, strict=True)


@needs_opencl
def test_a_session_copies_what_another_one_has_on_the_device(bundle: Bundle) -> None:
    loaded = load_executor("tvm", bundle, threads=1, target=TARGET)
    with Session.open(bundle, loaded) as session, Session.open(bundle, loaded) as other:
        session.decode(random_ids(6))
        other.copy(session, 6)
        np.testing.assert_array_equal(other.decode([7]), session.decode([7]), strict=True)


@needs_opencl
def test_what_a_driver_refuses_is_said_in_one_line() -> None:
    from engram_runtime.gpu.opencl import open_device

    with pytest.raises(TargetError) as caught:
        open_device("__kernel void f(__global int* x) { y = 1; }", 1)
    said = str(caught.value)
    assert re.match(r"OpenCL device .+ failed, free its memory or update its driver: ", said)
    assert "\n" not in said


@needs_opencl
def test_the_command_prints_the_same_text(bundle: Bundle, command: Command) -> None:
    texts = [
        command("engram", "run", bundle.path, "ab cd", "--max-tokens", 6, *more) for more in ([], ["--target", TARGET])
    ]
    assert [text.code for text in texts] == [0, 0]
    assert texts[0].out == texts[1].out


@needs_opencl
def test_continuations_that_share_caches_are_refused(bundle: Bundle) -> None:
    loaded = load_executor("tvm", bundle, threads=1, target=TARGET)
    with Session.open(bundle, loaded) as session, pytest.raises(RequestError) as caught:
        Group(session, 2)
    name = loaded.caches_on  # type: ignore[attr-defined]
    assert str(caught.value) == (
        f"several continuations share the caches of their text, which lie on {name}; ask for one, or use a library "
        "for a processor"
    )


@needs_opencl
@pytest.mark.parametrize(("name", "quant"), FAMILY_CASES)
def test_every_family_continues_a_text_as_the_processors_library_does(
    workshop: Workshop, name: str, quant: str, tmp_path: Path
) -> None:
    plain = workshop.bundle(workshop.family(FAMILIES[name][0]), quant=quant)
    if name == "qwen4_exp":
        with pytest.raises(CompileError) as caught:
            compile_bundle(Bundle.open(copy_folder(plain.path, tmp_path / "bundle")), opencl_profile())
        assert str(caught.value) == (
            "operator engram.IndexedAttention has no kernel for GPUs; compile for a processor: --target native"
        )
        return
    made = Bundle.open(copy_folder(workshop.compiled(plain).path, tmp_path / "bundle"))
    compile_bundle(made, opencl_profile())
    token_ids, logits = greedy(made, "tvm", None)
    found_ids, found = greedy(made, "tvm", TARGET)
    assert found_ids == token_ids
    np.testing.assert_allclose(found, logits, atol=2e-2)


@needs_nvcc
@pytest.mark.parametrize("name", ["cuda-sm80", pytest.param("cuda-sm90", marks=pytest.mark.exhaustive)])
def test_nvcc_compiles_cuda_sources(bundle: Bundle, name: str) -> None:
    profile = load_profile(name)
    assert isinstance(profile, GpuProfile)
    said: list[str] = []
    few = dataclasses.replace(profile, decode_tokens=(1,), prefill_tokens=(8,), cache_dtype="float16")
    result = compile_bundle(bundle, few, said.append)
    assert said[-1] == f"checking the source by {nvcc()}"
    names = {path.name for path in result.folder.iterdir()}
    assert names == {"compile.json", "kernels.cu", "program.json", "weights.bin"}
    with pytest.raises(TargetError) as caught:
        load_executor("tvm", bundle, threads=1, target=name)
    assert str(caught.value).startswith(f"library {name} is for device 'cuda', this runtime runs ['cpu', ")


@needs_nvcc
def test_sources_that_nvcc_refuses_are_no_library(tmp_path: Path) -> None:
    (tmp_path / "kernels.cu").write_text("__global__ void f(int x) { y = x; }")
    with pytest.raises(CompileError) as caught:
        check_source(tmp_path / "kernels.cu", _gpu("cuda-sm80"), lambda text: None)
    assert str(caught.value).startswith("nvcc refuses the kernels of cuda-sm80: ")
    assert 'identifier "y" is undefined' in str(caught.value)


def test_sources_stay_unchecked_where_there_is_no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checking, "nvcc", lambda: None)
    said: list[str] = []
    check_source(tmp_path / "kernels.cu", _gpu("cuda-sm80"), said.append)
    assert said == ["leaving the source unchecked: nvcc isn't installed"]


def _gpu(name: str) -> GpuProfile:
    profile = load_profile(name)
    assert isinstance(profile, GpuProfile)
    return profile


def test_every_function_of_a_metal_source_stands_after_one_head() -> None:
    kernels = {"add 1": gpu.activation.add(2, 70), "add 2": gpu.activation.add(3, 70)}
    sources = generate(kernels, _gpu("metal"))
    assert sources.text.count("#include <metal_stdlib>") == 1
    assert [f"kernel void {name}(" in sources.text for name in ("add_1_kernel", "add_2_kernel")] == [True, True]
    (launch,) = sources.launches["add 2"]
    assert (launch.function, launch.blocks, launch.threads) == ("add_2_kernel", (3, 1, 1), (128, 1, 1))
    assert sorted(launch.arguments) == [0, 1, 2]  # type: ignore[type-var]


def test_a_block_of_more_threads_than_the_target_has_is_refused() -> None:
    with pytest.raises(CompileError) as caught:
        generate({"add": gpu.activation.add(2, 70)}, opencl_profile(max_threads=64))
    assert str(caught.value) == (
        "kernel add_kernel needs blocks of more than the 64 threads or 32768 bytes of shared memory that opencl "
        "allows; choose smaller prefill_tokens in a profile of your own"
    )


def test_a_machine_without_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    cl = pytest.importorskip("pyopencl")
    from engram_runtime.gpu import opencl

    monkeypatch.setattr(cl, "get_platforms", lambda: [])
    with pytest.raises(TargetError) as caught:
        opencl.open_device("", 1)
    assert str(caught.value) == (
        "no OpenCL device was found; install the driver of your GPU, or pocl-opencl-icd to run on the processor"
    )


def _first_step(raw: dict[str, Any]) -> list[Any]:
    step: list[Any] = raw["passes"]["forward_1_1"]["steps"][0]
    return step


def _set(index: int, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda raw: _first_step(raw).__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(version=9), "{path} has version 9, this runtime reads 1; it needs a newer engram-edge"),
        (lambda raw: raw.update(more=1), "program.json has unknown keys ['more']; it may need a newer engram-edge"),
        (
            _set(1, [0, 1, 1]),
            "{where} launches [0, 1, 1], expected three sizes of 1 to 2147483647; compile again",
        ),
        (
            _set(3, [["disk", 1, 1]]),
            "{where} is ['disk', 1, 1], which is no place; compile again",
        ),
        (
            _set(0, 7),
            "{where} has step [7, [1, 1, 1], [1, 1, 1], [['weight', 0, 4]]], which is none; compile again",
        ),
        (
            _set(3, [["scratch", 512, 1024]]),
            "{where} has scratch memory of 1024 bytes, not Place(kind='scratch', key=512, bytes=1024); compile again",
        ),
        (
            _set(3, [["temporary", 0, 4]]),
            "{where} has temporary memory of 0 bytes, not Place(kind='temporary', key=0, bytes=4); compile again",
        ),
        (
            lambda raw: raw["passes"]["forward_1_1"]["results"].append(["float32", [2], ["output", 0, 4]]),
            "{where} has result ['float32', [2], ['output', 0, 4]], which is none; compile again",
        ),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    launch = ["f", [1, 1, 1], [1, 1, 1], [["weight", 0, 4]]]
    raw = {
        "version": 1,
        "temporary_bytes": 0,
        "passes": {"forward_1_1": {"steps": [launch], "results": [], "scratch_bytes": 1024}},
    }
    change(raw)
    path = tmp_path / "program.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(BundleError) as caught:
        read_plan(path)
    assert str(caught.value) == message.format(path=path, where="program.json.passes.forward_1_1")


class RecordingDevice:
    """A device of numpy arrays that only notes what is asked of it."""

    name = "recording"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def allocate(self, size: int) -> NDArray[np.uint8]:
        return np.zeros(size, np.uint8)

    def part(self, buffer: NDArray[np.uint8], offset: int, size: int) -> NDArray[np.uint8]:
        return buffer[offset : offset + size]

    def host_array(self, shape: Any, dtype: str) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def kernel(self, function: str, blocks: Any, threads: Any, arguments: Any) -> str:
        return function

    def upload(self, array: NDArray[Any], buffer: NDArray[np.uint8]) -> None:
        self.calls.append(f"upload {array.nbytes}")

    def download(self, buffer: NDArray[np.uint8], array: NDArray[Any]) -> None:
        self.calls.append(f"download {array.nbytes}")

    def copy(self, source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        target[...] = source

    def launch(self, kernel: str) -> None:
        self.calls.append(kernel)

    def start(self) -> None:
        self.calls.append("start")

    def finish(self) -> None:
        self.calls.append("finish")


SPEC = GraphSpec(
    file="",
    weights="",
    inputs=(
        TensorSpec(name="token_ids", dtype="int64", shape=("T",)),
        TensorSpec(name="rows.site", dtype="float32", shape=("T", 3)),
    ),
    outputs=(),
    states=(),
)


def bound(device: RecordingDevice, *steps: object) -> BoundPass:
    """Bind a pass of one token, a result and a window on a device."""
    forward = ForwardPass(
        steps=steps,  # type: ignore[arg-type]
        results=(),
        scratch_bytes=0,
    )
    memory = Memory(device, [], {"window": device.allocate(8)}, device.allocate(1), device.allocate(1))
    return BoundPass(memory, forward, SPEC, {"T": 1, "R": 1})


def test_the_device_works_while_rows_are_waited_for() -> None:
    device = RecordingDevice()
    before, after = (Launch(name, (1, 1, 1), (1, 1, 1), ()) for name in ("before", "after"))

    def fill(out: NDArray[np.float32]) -> None:
        device.calls.append("fill")

    rows = PendingRows((1, 3), fill)
    window = np.zeros(2, np.float32)
    run = bound(device, before, AwaitRows(0), after).run
    run({"token_ids": np.array([5])}, [("site", rows)], {"window": window})
    assert device.calls == [
        *("upload 8", "upload 8", "before", "start", "fill", "upload 12", "after", "download 8", "finish"),
    ]


def test_a_device_is_waited_for_where_rows_cannot_be_read() -> None:
    device = RecordingDevice()

    def fail(out: NDArray[np.float32]) -> None:
        raise TargetError("no rows")

    with pytest.raises(TargetError, match="no rows"):
        bound(device, AwaitRows(0)).run({}, [("site", PendingRows((1, 3), fail))], {})
    assert device.calls == ["start", "finish"]


@pytest.mark.parametrize("place", [Place("state", "key.9", 4), Place("weight", 3, 4), Place("input", "x", 4)])
def test_a_plan_of_another_bundle_is_refused(place: Place) -> None:
    with pytest.raises(BundleError) as caught:
        bound(RecordingDevice(), Launch("f", (1, 1, 1), (1, 1, 1), (place,)))
    assert str(caught.value) == (
        f"the library's plan names {place.kind} {place.key!r}, which this bundle lacks; compile it again"
    )


def test_a_plan_that_awaits_rows_of_no_table_is_refused() -> None:
    with pytest.raises(BundleError) as caught:
        bound(RecordingDevice(), AwaitRows(1))
    assert str(caught.value) == "the library's plan awaits rows of table 1, this bundle has 1; compile it again"


def test_a_kernel_for_processors_is_none_for_a_gpu() -> None:
    with pytest.raises(CompileError) as caught:
        generate({"add": activation.add(2, 64)}, opencl_profile())
    assert str(caught.value) == "kernel add is one for processors; compile for one: --target native"
