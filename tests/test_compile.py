"""Compiled bundles compute what onnxruntime does, and the same bits for any tokens at once, threads and kernels."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from tests.reference import dequantised_weights, reference_logits
from tests.steps import ready_rows
from tests.tiny import TinyModel, TinySite, site_files
from tests.workshop import (
    THREADS,
    Workshop,
    bundle_logits,
    copy_folder,
    files_of,
    open_session,
    random_ids,
    stepwise_logits,
    tiny_profile,
)

from engram_compilers.build import compile_bundle
from engram_compilers.lowering import CONVERTERS
from engram_runtime.bundle import Bundle, file_sha256
from engram_runtime.cpu import cpu_flags
from engram_runtime.errors import BundleError, CompileError, TableError, TargetError
from engram_runtime.executor import EXECUTORS, State, StepInputs, allocate_states, load_executor
from engram_runtime.session import Session, open_sites
from engram_runtime.site import Site
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.store import TableStore

UNTIED = TinyModel(tied=False)
QWEN = TinyModel(family="qwen3", head_dim=32)
WINDOW_SITE, PLAIN_SITE = TinySite(), TinySite(convolution=False, gains=False, payload="float16")
TOKENS = 23  # 8 + 8 + 4 + 2 + 1: every number of tokens that any of them is compiled for takes part

HAS_VNNI = "avx512_vnni" in cpu_flags()
needs_avx2 = pytest.mark.skipif(not {"avx2", "fma"} <= cpu_flags(), reason="this machine's processor has no avx2")
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="this machine's processor has no avx512_vnni")
NATIVE = "avx512_vnni" if HAS_VNNI else "portable"


def int4_bundle(workshop: Workshop) -> Bundle:
    return workshop.bundle(workshop.checkpoint(UNTIED, PLAIN_SITE), quant="int4")


def compiled_bundle(workshop: Workshop, name: str) -> Bundle:
    """Return one of the compiled bundles the tests run on; int8's portable kernels are all parallel."""
    match name:
        case "int8":
            return workshop.ready()
        case "int8-vnni":
            return workshop.compiled(workshop.uncompiled(), "avx512_vnni", decode_tokens=(1, 4))
        case "int4":
            return workshop.compiled(int4_bundle(workshop), decode_tokens=(1, 4))
        case "int4-vnni":
            return workshop.compiled(int4_bundle(workshop), "avx512_vnni", decode_tokens=(1, 4))
        case "float":
            return workshop.compiled(workshop.bundle(workshop.checkpoint(QWEN)), NATIVE)
        case "kept-q4_0":
            return workshop.compiled(workshop.bundle(workshop.gguf(Kind.Q4_0, UNTIED), quant="keep"))
        case "kept-q4_0-vnni":
            return workshop.compiled(workshop.bundle(workshop.gguf(Kind.Q4_0, UNTIED), quant="keep"), "avx512_vnni")
        case _:
            return workshop.compiled(workshop.bundle(workshop.gguf(Kind.Q8_0, UNTIED), quant="keep"), NATIVE)


ALL = [
    "int8",
    pytest.param("int8-vnni", marks=needs_vnni),
    "int4",
    pytest.param("int4-vnni", marks=needs_vnni),
    "float",
    "kept-q4_0",
    pytest.param("kept-q4_0-vnni", marks=[needs_vnni, pytest.mark.slow, pytest.mark.exhaustive]),
    pytest.param("kept-q8_0", marks=pytest.mark.slow),
]


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


# tvm rounds activations to 16 bits per row, 0.003 % of the row's largest; over two layers that came to 5e-4.
SIXTEEN_BIT_TOLERANCE = 2e-3
# onnxruntime rounds them to 8 bits per block of 32, so it is onnxruntime that is off.
EIGHT_BIT_MAX, EIGHT_BIT_MEAN = 0.25, 0.03
FLOAT_TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ALL[:4])
def test_tvm_gives_the_logits_of_the_decoded_weights(workshop: Workshop, name: str) -> None:
    model, site = (TinyModel(), WINDOW_SITE) if name.startswith("int8") else (UNTIED, PLAIN_SITE)
    bundle, plain = compiled_bundle(workshop, name), workshop.checkpoint(model)
    block, tensors = site_files(plain, site)
    weights = dequantised_weights(bundle.path)
    expected = reference_logits(plain, random_ids(61), blocks=[block], site_tensors=tensors, weights=weights)
    found = bundle_logits(bundle, random_ids(61), "tvm")
    np.testing.assert_allclose(found, expected, atol=SIXTEEN_BIT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [name for name in ALL if name != "float"])
def test_tvm_and_onnxruntime_differ_by_the_rounding_of_activations(workshop: Workshop, name: str) -> None:
    bundle = compiled_bundle(workshop, name)
    tvm, ort = (bundle_logits(bundle, random_ids(61), executor) for executor in ("tvm", "onnxruntime"))
    assert np.abs(tvm - ort).max() < EIGHT_BIT_MAX
    assert np.abs(tvm - ort).mean() < EIGHT_BIT_MEAN
    assert (tvm.argmax(axis=1) == ort.argmax(axis=1)).mean() > 0.9  # logits of a random model are nearly tied


def test_a_float_bundle_gives_the_logits_of_onnxruntime(workshop: Workshop) -> None:
    bundle = compiled_bundle(workshop, "float")
    tvm, ort = (bundle_logits(bundle, random_ids(61), executor) for executor in ("tvm", "onnxruntime"))
    np.testing.assert_allclose(tvm, ort, atol=FLOAT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_one_token_at_a_time_gives_the_bits_of_all_at_once(workshop: Workshop, name: str) -> None:
    bundle, token_ids = compiled_bundle(workshop, name), random_ids(TOKENS)
    assert_same_bits(stepwise_logits(bundle, token_ids, "tvm"), bundle_logits(bundle, token_ids, "tvm"))


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_several_tokens_at_a_time_give_the_bits_of_all_at_once(workshop: Workshop, size: int) -> None:
    bundle, token_ids = compiled_bundle(workshop, "int8"), random_ids(TOKENS)
    with open_session(bundle, "tvm") as session:
        parts = [session.decode(token_ids[start : start + size]) for start in range(0, TOKENS, size)]
    assert_same_bits(np.concatenate(parts), bundle_logits(bundle, token_ids, "tvm"))


@pytest.mark.parametrize("length", [1, 2, 4, 8, TOKENS])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_prefill_gives_the_bits_of_the_last_position(workshop: Workshop, name: str, length: int) -> None:
    bundle, token_ids = compiled_bundle(workshop, name), random_ids(length)
    with open_session(bundle, "tvm") as session:
        found = session.prefill(token_ids)
    assert_same_bits(found, bundle_logits(bundle, token_ids, "tvm")[-1])


@needs_vnni
@pytest.mark.parametrize("name", ["int8", "int4", pytest.param("kept-q4_0", marks=pytest.mark.exhaustive)])
def test_both_kernel_families_give_the_same_bits(workshop: Workshop, name: str) -> None:
    portable, vnni = (
        bundle_logits(compiled_bundle(workshop, kernels), random_ids(TOKENS), "tvm")
        for kernels in (name, f"{name}-vnni")
    )
    assert_same_bits(portable, vnni)


@pytest.mark.parametrize(
    ("family", "mcpu"),
    [
        pytest.param("portable", "x86-64-v2", marks=pytest.mark.exhaustive),
        pytest.param("avx2", "haswell", marks=needs_avx2),
        pytest.param("avx512_vnni", "cascadelake", marks=needs_vnni),
    ],
)
@pytest.mark.exhaustive
def test_every_family_gives_the_same_bits_with_sixteen_tokens_at_once(
    workshop: Workshop, family: str, mcpu: str
) -> None:
    """As its own single tokens, and as the portable kernels for this machine, eight tokens at once."""
    bundle = workshop.compiled(int4_bundle(workshop), family, mcpu=mcpu, decode_tokens=(1,), prefill_tokens=(16,))
    expected = bundle_logits(compiled_bundle(workshop, "int4"), random_ids(TOKENS), "tvm")
    assert load_executor("tvm", bundle, threads=1).chunks(TOKENS) == [16, *[1] * 7]
    assert_same_bits(bundle_logits(bundle, random_ids(TOKENS), "tvm"), expected)
    assert_same_bits(stepwise_logits(bundle, random_ids(TOKENS), "tvm"), expected)
    with open_session(bundle, "tvm") as session:
        assert_same_bits(session.prefill(random_ids(16)), expected[15])


def test_one_thread_gives_the_bits_of_two(workshop: Workshop) -> None:
    """On the library whose kernels are all parallel: tiny ones would run on one thread anyway."""
    bundle = compiled_bundle(workshop, "int8")
    one, two = (bundle_logits(bundle, random_ids(TOKENS), "tvm", threads=threads) for threads in (1, 2))
    assert_same_bits(one, two)


@pytest.mark.parametrize("count", [1, 3, 12, 20])
@pytest.mark.parametrize("name", ["int8", "int4"])  # int8 has a site with a window, int4 one without
def test_what_was_trimmed_was_never_there(workshop: Workshop, name: str, count: int) -> None:
    bundle, first, other = compiled_bundle(workshop, name), random_ids(20), random_ids(9, seed=1)
    with open_session(bundle, "tvm") as session:
        session.decode(first)
        session.trim(count)
        found = session.decode(other)
    assert_same_bits(found, bundle_logits(bundle, [*first[: 20 - count], *other], "tvm")[20 - count :])


def test_tokens_can_be_trimmed_before_and_after_a_shorter_sequence(workshop: Workshop) -> None:
    bundle = compiled_bundle(workshop, "int8")
    with open_session(bundle, "tvm") as session:
        session.decode(random_ids(TOKENS))
        session.trim(TOKENS)
        session.decode(random_ids(5, seed=1))
        session.trim(2)
        found = session.decode(random_ids(4, seed=2))
    expected = bundle_logits(bundle, [*random_ids(5, seed=1)[:3], *random_ids(4, seed=2)], "tvm")[3:]
    assert_same_bits(found, expected)


def test_without_tables_the_table_changes_nothing(workshop: Workshop) -> None:
    bundle, token_ids = compiled_bundle(workshop, "int8"), random_ids(TOKENS)
    on, off = (bundle_logits(bundle, token_ids, "tvm", tables_on=tables_on) for tables_on in (True, False))
    plain = workshop.compiled(workshop.bundle(workshop.checkpoint(TinyModel()), quant="int8"))
    assert np.abs(on - off).mean() > 0.1
    assert_same_bits(off, bundle_logits(plain, token_ids, "tvm"))


@pytest.mark.parametrize("executor", ["tvm", "onnxruntime"])
def test_a_step_writes_into_the_callers_own_caches(workshop: Workshop, executor: str) -> None:
    states = states_after(workshop.ready(), executor, tokens=4)
    caches = {name: state for name, state in states.items() if not name.startswith("window")}
    filled = {name: np.flatnonzero(np.abs(cache).sum(axis=(0, 1, 3))).tolist() for name, cache in caches.items()}
    assert filled == {f"{part}.{layer}": [0, 1, 2, 3] for layer in (0, 1) for part in ("key", "value")}


@pytest.mark.parametrize("executor", ["tvm", "onnxruntime"])
def test_a_step_writes_into_the_callers_own_window(workshop: Workshop, executor: str) -> None:
    states = states_after(workshop.ready(), executor, tokens=4)
    steps = np.abs(states["window.layer_1"]).sum(axis=1)  # [9]: the last (4 - 1) * 3 steps, the newest at the end
    assert (steps > 0).tolist() == [False] * 5 + [True] * 4


def states_after(bundle: Bundle, executor: str, *, tokens: int) -> dict[str, State]:
    """Return a caller's own states after one step."""
    states = allocate_states(bundle.manifest.decoder.states)
    rows = np.ones((tokens, 4, 16), dtype=np.float32)
    every = np.arange(tokens)
    step = load_executor(executor, bundle, threads=THREADS).bind(states)
    step(StepInputs(token_ids=every, position=0, logit_rows=every, rows={"layer_1": ready_rows(rows)}))
    return states


class FailingOnce:
    """A table whose first rows can't be read."""

    def __init__(self, table: TableStore) -> None:
        self._table = table
        self._failed = False

    @property
    def counters(self) -> TableCounters:
        return self._table.counters

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        if not self._failed:
            self._failed = True
            raise TableError("table file t can't be read at 0: Input/output error")
        self._table.gather(row_ids, out)

    def request(self, row_ids: NDArray[np.int64]) -> None:
        self._table.request(row_ids)

    def close(self) -> None:
        self._table.close()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_rows_that_cannot_be_read_end_a_pass_with_their_own_error(workshop: Workshop, executor: str) -> None:
    bundle, token_ids = workshop.ready(), [5, 9, 2]
    loaded = load_executor(executor, bundle, threads=THREADS)
    with Session.open(bundle, loaded) as session:
        expected = session.decode(token_ids)
    sites = [Site(site.spec, site.keyer, FailingOnce(site.table)) for site in open_sites(bundle)]
    with Session(bundle, loaded, sites) as session:
        with pytest.raises(TableError) as caught:
            session.decode(token_ids)
        assert str(caught.value) == "table file t can't be read at 0: Input/output error"
        np.testing.assert_array_equal(session.decode(token_ids), expected, strict=True)


def test_a_text_is_run_in_the_largest_compiled_sizes_that_fit(workshop: Workshop) -> None:
    executor = load_executor("tvm", workshop.ready(), threads=1)
    assert executor.chunks(TOKENS) == [8, 8, 4, 2, 1]
    assert executor.chunks(TOKENS, spare=1) == [8, 8, 8]
    assert [list(executor.chunks(count, spare=9)) for count in (3, 5, 11)] == [[4], [8], [8, 4]]


def test_a_pass_that_is_not_full_has_the_bits_of_single_tokens_to_the_end_of_the_context(workshop: Workshop) -> None:
    bundle = workshop.positional()
    executor = load_executor("tvm", bundle, threads=1)
    with Session.open(bundle, executor) as session:
        assert session.passes(3) == [4]
        ids = random_ids(session.room)
        expected = stepwise_logits(bundle, ids, "tvm")
        logits = [session.decode(ids[at : at + 3]) for at in range(0, len(ids), 3)]
    assert_same_bits(np.concatenate(logits), expected)


def test_an_operator_without_lowering_is_named(workshop: Workshop, tmp_path: Path) -> None:
    bundle = with_operator(workshop.uncompiled(), tmp_path / "bundle", "Erf")
    with pytest.raises(CompileError) as caught:
        compile_bundle(bundle, tiny_profile())
    assert str(caught.value) == f"operator Erf has no lowering; there are {sorted(CONVERTERS)}"
    assert files_of(bundle.path).keys() == files_of(workshop.uncompiled().path).keys()


def with_operator(bundle: Bundle, folder: Path, operator: str) -> Bundle:
    """Copy a bundle and put an operator before its logits."""
    graph = copy_folder(bundle.path, folder) / bundle.manifest.decoder.file
    model = onnx.load(graph, load_external_data=False)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node(operator, ["before"], ["logits"]))
    onnx.save(model, graph)
    files = tuple(
        dataclasses.replace(entry, sha256=file_sha256(folder / entry.path)) for entry in bundle.manifest.files
    )
    return Bundle(folder, dataclasses.replace(bundle.manifest, files=files))


def test_a_graph_that_was_changed_is_not_compiled(workshop: Workshop, tmp_path: Path) -> None:
    bundle = compiled_bundle(workshop, "int8")
    changed = Bundle(with_operator(bundle, tmp_path / "bundle", "Erf").path, bundle.manifest)
    with pytest.raises(BundleError, match=r"^graph/decoder\.onnx has SHA-256 [0-9a-f]{64}, the manifest says "):
        compile_bundle(changed, tiny_profile())


def test_a_library_is_code_weights_runtime_and_their_description(workshop: Workshop) -> None:
    bundle = compiled_bundle(workshop, "int8")
    (folder,) = bundle.file("lib").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "compile.json",
        "libtvm_runtime.so",
        "model.so",
        "weights.bin",
    ]


def test_weights_are_packed_once_for_all_forward_passes(workshop: Workshop) -> None:
    """int8 weights keep their size: padding and scales add little to the bytes of the bundle's own weights."""
    bundle = compiled_bundle(workshop, "int8")
    packed = next(bundle.file("lib").glob("*/weights.bin")).stat().st_size
    assert packed < 1.3 * bundle.file(bundle.manifest.decoder.weights).stat().st_size


def library_file(bundle: Bundle, name: str) -> Path:
    return next(bundle.file("lib").glob(f"*/{name}"))


def test_a_bundle_without_library_says_how_to_make_one(workshop: Workshop) -> None:
    bundle = workshop.uncompiled()
    with pytest.raises(TargetError) as caught:
        load_executor("tvm", bundle, threads=1)
    assert str(caught.value) == (
        f"bundle {bundle.path} has no compiled library; run: engram compile {bundle.path} --target native"
    )


def test_a_library_for_another_machine_is_refused_with_the_reason(workshop: Workshop, tmp_path: Path) -> None:
    bundle = changed_library(compiled_bundle(workshop, "int8"), tmp_path / "bundle", cpu_flags=["warp_drive"])
    target = library_file(bundle, "compile.json").parent.name
    with pytest.raises(TargetError) as caught:
        load_executor("tvm", bundle, threads=1)
    assert str(caught.value) == (
        f"no library of bundle {bundle.path} runs here: {target} needs CPU features ['warp_drive'] this machine lacks; "
        f"run: engram compile {bundle.path} --target native"
    )


def test_a_library_of_another_graph_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    bundle = changed_library(compiled_bundle(workshop, "int8"), tmp_path / "bundle", graph_sha256="0+0")
    with pytest.raises(TargetError) as caught:
        load_executor("tvm", bundle, threads=1)
    assert str(caught.value) == (
        f"library {library_file(bundle, 'compile.json').parent} was compiled from another graph than this bundle "
        f"holds; run: engram compile {bundle.path} --target native"
    )


def changed_library(bundle: Bundle, folder: Path, **values: object) -> Bundle:
    """Copy a compiled bundle and change its library's description."""
    changed = Bundle.open(copy_folder(bundle.path, folder))
    path = library_file(changed, "compile.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return changed


def test_packed_weights_one_byte_short_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    bundle = changed_library(compiled_bundle(workshop, "int8"), tmp_path / "bundle")
    path = library_file(bundle, "weights.bin")
    whole = path.stat().st_size
    os.truncate(path, whole - 1)
    with pytest.raises(BundleError) as caught:
        load_executor("tvm", bundle, threads=1)
    assert str(caught.value) == f"{path} holds {whole - 1} bytes, expected {whole}; compile the bundle again"


def test_a_failed_compilation_keeps_the_library_there_was(workshop: Workshop, tmp_path: Path) -> None:
    compiled = compiled_bundle(workshop, "int8")
    bundle = with_operator(compiled, tmp_path / "bundle", "Erf")
    name = library_file(bundle, "compile.json").parent.name
    with pytest.raises(CompileError):
        compile_bundle(bundle, tiny_profile(name=name))
    assert files_of(bundle.file("lib")) == files_of(compiled.file("lib"))


def test_tvm_can_be_imported_after_a_library_was_loaded(workshop: Workshop) -> None:
    """Other packages import tvm behind our back; a second copy of its runtime would abort the process."""
    script = (
        "import pathlib, sys; from engram_runtime.bundle import Bundle; "
        "from engram_runtime.executor import load_executor; "
        "load_executor('tvm', Bundle.open(pathlib.Path(sys.argv[1])), threads=1); import tvm; print('both')"
    )
    command = [sys.executable, "-c", script, str(compiled_bundle(workshop, "int8").path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "both\n")
