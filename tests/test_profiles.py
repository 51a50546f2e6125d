"""Target profiles and compiled libraries: which one fits a machine, and what is said when none does."""

import dataclasses
import importlib.util
import json
import math
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_runtime import cpu, library
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, TargetError
from engram_runtime.library import LibraryInfo, PackedTensor, find_library, graph_digest, library_device
from engram_runtime.manifest import FileEntry, GraphSpec, Manifest, ModelInfo, StateSpec
from engram_targets import (
    CpuProfile,
    cpu_profile_names,
    detect_native,
    load_cpu_profile,
    load_profile,
    parse_profile,
    profile_names,
)
from engram_targets.cpu import KERNEL_FAMILIES

V2_FLAGS = ("pni", "ssse3", "sse4_1", "sse4_2", "popcnt", "cx16", "lahf_lm")
V3_FLAGS = (*V2_FLAGS, "avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
AVX_VNNI_FLAGS = (*V3_FLAGS, "avx_vnni", "gfni")
AVX512_FLAGS = (*V3_FLAGS, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")
DOTPROD_FLAGS = ("asimd", "asimdhp", "asimddp", "atomics")
KNOWN = f"there are {['native', *profile_names()]}, and files by path, *.toml"
SVE_FLAGS = load_cpu_profile("aarch64-i8mm-sve").cpu_flags
MACHINE, ARM = "x86_64", "aarch64"


def raw_llvm(**changes: Any) -> dict[str, Any]:
    return {"mtriple": "x86_64-linux-gnu", "mcpu": "haswell", "mattr": ["+vaes"], "mabi": ""} | changes


def raw_profile(**changes: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "description": "boxes of the tests",
        "evidence": "compiled",
        "machine": MACHINE,
        "system": "linux",
        "cpu_flags": ["avx2"],
        "kernels": "portable",
        "decode_tokens": [1, 2],
        "prefill_tokens": [4],
        "threads": "auto",
        "cache_dtype": "float32",
        "llvm": raw_llvm(),
    } | changes


def raw_library(**changes: Any) -> dict[str, Any]:
    """Return the JSON of a sound ``compile.json``."""
    return {
        "version": 8,
        "target": "x86-64-v3",
        "device": "cpu",
        "machine": MACHINE,
        "cpu_flags": ["avx2"],
        "graph_sha256": "1+2",
        "compiler": "apache-tvm 0.27",
        "ffi": "0.1.14.post1",
        "library": "model.so",
        "runtime": "libtvm_runtime.so",
        "weights": "weights.bin",
        "commands": None,
        "weights_bytes": 200,
        "sha256": {"library": "a" * 64, "runtime": "b" * 64, "weights": "c" * 64},
        "passes": [[1, 1], [2, 2], [2, 1]],
        "batches": [2, 4],
        "tensors": [
            {"name": "head:codes", "dtype": "uint8", "shape": [4, 16], "offset": 0},
            {"name": "head:scale", "dtype": "float32", "shape": [18], "offset": 128},
        ],
        "graph_tensors": {"decoder": [0, 1], "mtp": [1]},
        "expert_bytes": [96],
        "threads": 0,
        "float16_states": ["key.0"],
    } | changes


def raw_tensor(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "head:codes", "dtype": "uint8", "shape": [4, 16], "offset": 0} | changes]


def bundle_at(folder: Path) -> Bundle:
    """Return a bundle of which only the folder, the digests of the graph and the state's name matter."""
    key = StateSpec(name="key.0", dtype="float32", shape=(1, 1, 8, 8), kind="positional")
    manifest = Manifest(
        producer="test",
        model=ModelInfo(
            name="tiny",
            family="llama",
            quantisation="int8",
            vocab_size=8,
            hidden_size=8,
            num_layers=1,
            context_length=8,
        ),
        graphs={"decoder": GraphSpec(file="graph.onnx", weights="weights", inputs=(), outputs=(), states=(key,))},
        tables=(),
        files=(
            FileEntry(path="weights", bytes=1, sha256="2"),
            FileEntry(path="graph.onnx", bytes=1, sha256="1"),
        ),
    )
    return Bundle(folder, manifest)


def add_library(folder: Path, target: str, **changes: Any) -> None:
    place = folder / "lib" / target
    place.mkdir(parents=True)
    (place / "compile.json").write_text(json.dumps(raw_library(target=target, **changes)))


def this_machine(monkeypatch: pytest.MonkeyPatch, flags: Iterable[str], architecture: str = MACHINE) -> None:
    """Pretend that this process runs on another machine."""
    monkeypatch.setattr(library, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(library, "machine", lambda: architecture)


def cpu_profile(**changes: Any) -> CpuProfile:
    profile = parse_profile("mine", raw_profile(**changes))
    assert isinstance(profile, CpuProfile)
    return profile


def profile_message(**changes: Any) -> str:
    with pytest.raises(TargetError) as caught:
        parse_profile("mine", raw_profile(**changes))
    return str(caught.value)


def library_message(raw: dict[str, Any]) -> str:
    with pytest.raises(BundleError) as caught:
        LibraryInfo.from_dict(raw)
    return str(caught.value)


def find_message(bundle: Bundle) -> str:
    with pytest.raises(TargetError) as caught:
        find_library(bundle)
    return str(caught.value)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_under_its_name(name: str) -> None:
    assert load_profile(name).name == name


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_compiles_single_tokens(name: str) -> None:
    profile = load_profile(name)
    assert (1, 1) in profile.passes


@pytest.mark.parametrize("family", KERNEL_FAMILIES)
def test_every_kernel_family_of_processors_exists(family: str) -> None:
    assert importlib.util.find_spec(f"engram_compilers.kernels.{family}") is not None


def test_a_profile_is_what_its_file_says() -> None:
    profile = parse_profile("mine", raw_profile())
    assert dataclasses.asdict(profile) == {
        "name": "mine",
        "description": "boxes of the tests",
        "evidence": "compiled",
        "machine": MACHINE,
        "system": "linux",
        "cpu_flags": ("avx2",),
        "kernels": "portable",
        "decode_tokens": (1, 2),
        "prefill_tokens": (4,),
        "threads": 0,
        "cache_dtype": "float32",
        "llvm": raw_llvm(mattr=("+vaes",)),
    }
    assert isinstance(profile, CpuProfile)
    assert profile.llvm.target == {
        "kind": "llvm",
        "mtriple": "x86_64-linux-gnu",
        "mcpu": "haswell",
        "mattr": ["+vaes"],
    }


def test_every_count_is_compiled_for_all_rows_of_logits_and_for_the_last_one() -> None:
    profile = parse_profile("mine", raw_profile())
    assert profile.passes == ((1, 1), (2, 2), (4, 4), (2, 1), (4, 1))


def test_an_unknown_target_is_named_with_those_there_are() -> None:
    with pytest.raises(TargetError) as caught:
        load_profile("riscv64")
    assert str(caught.value) == f"target 'riscv64' is unknown; {KNOWN}"


@pytest.mark.parametrize("name", ["../profiles/x86-64-v3", "", "lib/native", "X86-64-V3"])
def test_a_target_is_a_name_or_the_path_of_a_toml_file(name: str) -> None:
    with pytest.raises(TargetError) as caught:
        load_profile(name)
    assert str(caught.value) == f"target {name!r} is unknown; {KNOWN}"


@pytest.mark.parametrize("key", sorted(raw_profile().keys() - {"device"}))
def test_a_missing_key_of_a_profile_is_named(key: str) -> None:
    raw = raw_profile()
    del raw[key]
    with pytest.raises(TargetError) as caught:
        parse_profile("mine", raw)
    assert str(caught.value) == f"profile mine has no key {key!r}"


def test_a_profile_with_unknown_kernels_is_refused() -> None:
    expected = f"profile mine has kernels 'cuda', there are {list(KERNEL_FAMILIES)}"
    assert profile_message(kernels="cuda") == expected


@pytest.mark.parametrize(
    ("decode", "prefill"), [([], []), ([2], [4]), ([1, 2], [2]), ([2, 1], [4]), ([4], [1, 2]), ([1, 1], [])]
)
def test_token_counts_ascend_from_one(decode: list[int], prefill: list[int]) -> None:
    expected = f"profile mine compiles token counts {decode + prefill}, expected ascending ones from 1"
    assert profile_message(decode_tokens=decode, prefill_tokens=prefill) == expected


def test_a_profile_may_name_the_number_of_threads() -> None:
    assert cpu_profile(threads=3).threads == 3


@pytest.mark.parametrize("threads", [0, -1, 257, "all", True, 2.0, None])
def test_threads_are_auto_or_a_number_from_one(threads: object) -> None:
    expected = f"profile mine has threads {threads!r}, expected 'auto' or 1 to 256"
    assert profile_message(threads=threads) == expected


@pytest.mark.parametrize(
    ("architecture", "flags", "expected"),
    [
        (MACHINE, V2_FLAGS, "x86-64-v2"),
        (MACHINE, V3_FLAGS, "x86-64-v3"),
        (MACHINE, (*V2_FLAGS, "avx", "avx2", "fma"), "x86-64-v2"),
        (MACHINE, AVX_VNNI_FLAGS, "x86-64-avx-vnni"),
        (MACHINE, (*V3_FLAGS, "avx_vnni"), "x86-64-v3"),
        (MACHINE, AVX512_FLAGS, "x86-64-avx512-vnni"),
        (MACHINE, (*AVX_VNNI_FLAGS, *AVX512_FLAGS), "x86-64-avx512-vnni"),
        (MACHINE, AVX512_FLAGS[:-1], "x86-64-v3"),
        (ARM, DOTPROD_FLAGS, "aarch64-dotprod"),
        (ARM, (*DOTPROD_FLAGS, "i8mm", "sve"), "aarch64-i8mm"),
        (ARM, (*SVE_FLAGS, "sve2"), "aarch64-i8mm-sve"),
        ("arm64", (), "apple-arm64"),
        ("riscv64", ("i", "m", "a", "f", "d", "c", "v", "zicsr"), "riscv64-rvv"),
    ],
)
def test_native_is_the_most_demanding_profile_a_machine_can_run(
    architecture: str, flags: tuple[str, ...], expected: str
) -> None:
    assert detect_native(architecture, flags).name == expected


@settings(deadline=None)
@given(
    known=st.sampled_from((V2_FLAGS, V3_FLAGS, AVX_VNNI_FLAGS, AVX512_FLAGS, (*DOTPROD_FLAGS, "i8mm"))),
    lacking=st.sets(st.sampled_from((*AVX_VNNI_FLAGS, *AVX512_FLAGS, *DOTPROD_FLAGS, "i8mm")), max_size=2),
    architecture=st.sampled_from([MACHINE, ARM, "s390x"]),
)
def test_native_is_found_if_and_only_if_a_profile_fits(
    known: tuple[str, ...], lacking: set[str], architecture: str
) -> None:
    flags = set(known) - lacking
    profiles = [load_cpu_profile(name) for name in cpu_profile_names()]
    fitting = [profile for profile in profiles if profile.machine == architecture and flags >= set(profile.cpu_flags)]
    demands = None
    try:
        demands = len(detect_native(architecture, flags).cpu_flags)
    except TargetError:
        assert fitting == []
    assert demands == max((len(profile.cpu_flags) for profile in fitting), default=None)


@pytest.mark.parametrize(("architecture", "flags"), [("s390x", AVX512_FLAGS), (MACHINE, ("avx2", "fma"))])
def test_a_machine_no_profile_fits_is_named(architecture: str, flags: tuple[str, ...]) -> None:
    with pytest.raises(TargetError) as caught:
        detect_native(architecture, flags)
    assert str(caught.value) == f"no target profile fits a {architecture} machine; there are {cpu_profile_names()}"


def test_native_is_the_profile_of_this_machine() -> None:
    assert load_profile("native") == detect_native(platform.machine(), cpu.usable_cpu_flags())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2  fma\n\nprocessor : 1\nflags : fpu\n", {"fpu", "avx2", "fma"}),
        ("Features\t: fp asimd dotprod\n", {"fp", "asimd", "dotprod"}),
        ("hart : 0\nisa\t: rv64imafdcv_zicsr_zvfh\nmmu : sv48\n", {*"imafdcv", "zicsr", "zvfh"}),
        ("vmx flags : vnmi\nflags : sse\n", {"sse"}),
        ("model name : none\n", set()),
    ],
)
def test_cpu_flags_are_those_of_the_first_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: set[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.cpu_flags() == expected


def test_a_system_without_cpuinfo_has_no_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.cpu_flags() == frozenset()


CORES = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}  # four CPUs on two cores


def machine_with(monkeypatch: pytest.MonkeyPatch, root: Path, cpus: list[int], files: dict[str, str]) -> None:
    """Pretend that this process may use ``cpus`` of `CORES` and finds these files about its control groups."""
    for number, siblings in CORES.items():
        files[f"cpus/cpu{number}/topology/thread_siblings_list"] = f"{siblings}\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(cpu, "available_cpus", lambda: cpus)
    for name, place in (("TOPOLOGY", "cpus"), ("CGROUPS", "cgroup"), ("OWN_CGROUPS", "own")):
        monkeypatch.setattr(cpu, name, root / place)


@pytest.mark.parametrize(("cpus", "cores"), [([0, 1, 4, 5], 2), ([0, 4], 1), ([0, 1], 2), ([5], 1), ([0, 1, 7], 3)])
def test_two_cpus_of_one_core_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: list[int], cores: int
) -> None:
    machine_with(monkeypatch, tmp_path, cpus, {})
    assert cpu.available_cores() == cores


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, math.inf),
        ({"own": "0::/"}, math.inf),
        ({"own": "0::/", "cgroup/cpu.max": "max 100000\n"}, math.inf),
        ({"own": "0::/", "cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"own": "0::/a/b", "cgroup/a/cpu.max": "20000 100000\n", "cgroup/a/b/cpu.max": "max 100000\n"}, 0.2),
        ({"own": "0::/a", "cgroup/b/cpu.max": "20000 100000\n"}, math.inf),
        (
            {
                "own": "4:memory:/\n3:cpu,cpuacct:/a\n",
                "cgroup/cpu/a/cpu.cfs_quota_us": "300000\n",
                "cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "own": "1:cpu:/\n",
                "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            math.inf,
        ),
    ],
)
def test_the_least_quota_of_the_control_groups_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float
) -> None:
    machine_with(monkeypatch, tmp_path, [0, 1, 4, 5], dict(files))
    assert cpu.cpu_quota() == quota
    assert cpu.available_cores() == max(1, min(2, int(min(quota, 9))))


def test_a_library_equals_itself_after_a_round_trip() -> None:
    info = LibraryInfo.from_dict(raw_library())
    assert json.loads(json.dumps(info.to_dict())) == raw_library()
    assert info.tensors[1] == PackedTensor(name="head:scale", dtype="float32", shape=(18,), offset=128)


@pytest.mark.parametrize("key", sorted(raw_library()))
def test_a_missing_key_of_a_library_is_named(key: str) -> None:
    raw = raw_library()
    del raw[key]
    assert library_message(raw) == f"compile.json has no key {key!r}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 7}, "library has version 7, this runtime reads 8; compile again"),
        ({"version": "1"}, "compile.json.version is '1', expected an integer"),
        ({"machine": None}, "compile.json.machine is None, expected a string"),
        ({"cpu_flags": "avx2"}, "compile.json.cpu_flags is 'avx2', expected a list"),
        ({"cpu_flags": ["avx2", ["fma"]]}, "compile.json.cpu_flags is ['fma'], expected a list of strings"),
        ({"cpu_flags": [1, "a"]}, "compile.json.cpu_flags is 1, expected a list of strings"),
        ({"surprise": 1}, "compile.json has unknown keys ['surprise']; it may need a newer engram-edge"),
        ({"library": "/lib/evil.so"}, "path '/lib/evil.so' leaves the bundle; only plain relative paths are allowed"),
        ({"runtime": "../tvm.so"}, "path '../tvm.so' leaves the bundle; only plain relative paths are allowed"),
        ({"weights": ""}, "path '' leaves the bundle; only plain relative paths are allowed"),
        ({"weights": "a\0b"}, r"compile.json.weights is 'a\x00b', expected text without NUL and lone surrogates"),
        ({"weights_bytes": 0}, "compile.json.weights_bytes is 0, expected an integer from 1 to 2**53 - 1"),
        ({"passes": [1, 1]}, "compile.json.passes is 1, expected a list of lists"),
        ({"passes": [["1", "1"]]}, "compile.json.passes is '1', expected a list of 64-bit integers"),
        ({"passes": [[1, 1.5]]}, "compile.json.passes is 1.5, expected a list of 64-bit integers"),
        ({"passes": [[1, 1], [2]]}, "compile.json has forward pass [2], expected tokens and rows of logits"),
        ({"passes": [[1, 1], []]}, "compile.json has forward pass [], expected tokens and rows of logits"),
        ({"passes": [[1, 1], [0, 0]]}, "compile.json has forward pass [0, 0], expected tokens and rows of logits"),
        ({"threads": 257}, "library asks for 257 threads, the most are 256; compile again"),
        ({"threads": -1}, "compile.json.threads is -1, expected an integer from 0 to 2**53 - 1"),
        ({"graph_tensors": {"decoder": [0, 2]}}, "decoder takes packed tensor 2, the library has 2; compile again"),
        (
            {"graph_tensors": {"decoder": [], "mtp": [-1]}},
            "mtp takes packed tensor -1, the library has 2; compile again",
        ),
        ({"graph_tensors": {"mtp": [0]}}, "compile.json.graph_tensors has no key 'decoder'"),
        (
            {"graph_tensors": {"decoder": [], "site": []}},
            "compile.json.graph_tensors has unknown keys ['site']; it may need a newer engram-edge",
        ),
        ({"expert_bytes": [64, 0]}, "experts have [64, 0] bytes, which can't be; compile again"),
        ({"passes": []}, "library lacks the forward passes [(1, 1)]; compile again"),
        ({"passes": [[2, 2], [2, 1]]}, "library lacks the forward passes [(1, 1)]; compile again"),
        ({"passes": [[1, 1], [4, 2]]}, "library lacks the forward passes [(4, 1), (4, 4)]; compile again"),
        (
            {"batches": [1, 2]},
            "library runs [1, 2] sequences at once, expected ascending numbers from 2; compile again",
        ),
        (
            {"batches": [4, 2]},
            "library runs [4, 2] sequences at once, expected ascending numbers from 2; compile again",
        ),
        (
            {"device": "abacus"},
            "library is for device 'abacus', there are ['cpu', 'npu', 'opencl', 'cuda', 'metal']; compile again",
        ),
        ({"commands": "../c"}, "path '../c' leaves the bundle; only plain relative paths are allowed"),
        ({"commands": "commands.bin"}, "compile.json.sha256 has no key 'commands'"),
        (
            {"device": "npu"},
            "library is for device 'npu' and has commands None, which only another device than the CPU takes; "
            "compile again",
        ),
        ({"tensors": [7]}, "compile.json.tensors[0] is 7, expected an object"),
        (
            {"tensors": raw_tensor(more=1)},
            "compile.json.tensors[0] has unknown keys ['more']; it may need a newer engram-edge",
        ),
        (
            {"tensors": raw_tensor(shape=[1.5])},
            "compile.json.tensors[0].shape is 1.5, expected a list of 64-bit integers",
        ),
        (
            {"tensors": raw_tensor(dtype="object")},
            "packed tensor head:codes is object [4, 16] at byte 0, which can't be mapped; compile again",
        ),
        (
            {"tensors": raw_tensor(shape=[-1, 16])},
            "packed tensor head:codes is uint8 [-1, 16] at byte 0, which can't be mapped; compile again",
        ),
        (
            {"tensors": raw_tensor(offset=32)},
            "packed tensor head:codes is uint8 [4, 16] at byte 32, which can't be mapped; compile again",
        ),
        (
            {"tensors": raw_tensor(dtype="float32")},
            "packed tensor head:codes ends at byte 256 of 200; compile again",
        ),
        (
            {"tensors": raw_tensor(shape=[2**32, 2**32])},
            "packed tensor head:codes ends at byte 18446744073709551616 of 200; compile again",
        ),
    ],
)
def test_a_library_that_cannot_be_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert library_message(raw_library(**changes)) == expected


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(key=st.sampled_from(sorted(raw_library())), value=JSON_VALUES)
def test_a_library_with_any_value_is_refused_or_read_as_it_stands(key: str, value: object) -> None:
    raw = raw_library(**{key: value})
    try:
        found = json.loads(json.dumps(LibraryInfo.from_dict(raw).to_dict()))
    except BundleError:
        found = raw
    assert found == raw


def test_a_library_for_another_machine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["avx2"], "aarch64")
    info = LibraryInfo.from_dict(raw_library())
    assert info.misfit() == "x86-64-v3 is for x86_64, this machine is aarch64"


def test_a_library_that_needs_more_than_the_cpu_has_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["avx2"])
    info = LibraryInfo.from_dict(raw_library(cpu_flags=["fma", "avx2", "bmi2"]))
    assert info.misfit() == "x86-64-v3 needs CPU features ['bmi2', 'fma'] this machine lacks"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("0.1.14.post1", None),
        (None, None),  # importing it says what to install
        ("0.1.15", "x86-64-v3 was compiled for apache-tvm-ffi 0.1.14.post1, this Python has 0.1.15"),
    ],
)
def test_a_library_for_another_apache_tvm_ffi_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, found: str | None, expected: str | None
) -> None:
    this_machine(monkeypatch, ["avx2"])
    monkeypatch.setattr(library, "installed_ffi", lambda: found)
    assert LibraryInfo.from_dict(raw_library()).misfit() == expected


def test_a_packed_bundle_is_not_compiled_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["avx2"])
    whole = bundle_at(tmp_path)
    packed = Bundle(tmp_path, dataclasses.replace(whole.manifest, files=(), omitted=whole.manifest.files))
    mend = "pack the bundle it was made of for this machine: engram pack BUNDLE --target NAME"
    assert find_message(packed) == f"bundle {tmp_path} has no compiled library; {mend}"
    add_library(tmp_path, "x86-64-v3")
    assert find_library(packed) == find_library(whole)


def test_a_library_that_fits_has_no_misfit(monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["avx2", "sse"])
    assert LibraryInfo.from_dict(raw_library()).misfit() is None


def test_the_digest_of_a_graph_is_that_of_graph_and_weights(tmp_path: Path) -> None:
    assert graph_digest(bundle_at(tmp_path)) == "1+2"


@pytest.mark.parametrize("folders", [[], ["lib"], ["lib/empty"]])
def test_a_bundle_without_library_says_how_to_make_one(tmp_path: Path, folders: list[str]) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    expected = f"bundle {tmp_path} has no compiled library; run: engram compile {tmp_path} --target native"
    assert find_message(bundle_at(tmp_path)) == expected


def test_the_library_that_asks_for_most_of_what_the_machine_has_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this_machine(monkeypatch, ["a", "b", "c"])
    add_library(tmp_path, "one", cpu_flags=["a"])
    add_library(tmp_path, "two", cpu_flags=["a", "b"])
    add_library(tmp_path, "four", cpu_flags=["a", "b", "c", "d"])
    path, info = find_library(bundle_at(tmp_path))
    assert (path, info) == (
        tmp_path / "lib" / "two",
        LibraryInfo.from_dict(raw_library(target="two", cpu_flags=["a", "b"])),
    )


def test_libraries_that_do_not_fit_are_named_with_their_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this_machine(monkeypatch, ["avx2"])
    add_library(tmp_path, "arm", machine="aarch64")
    add_library(tmp_path, "wide", cpu_flags=["avx512f"])
    assert find_message(bundle_at(tmp_path)) == (
        f"no library of bundle {tmp_path} runs here: arm is for aarch64, this machine is x86_64; "
        f"wide needs CPU features ['avx512f'] this machine lacks; run: engram compile {tmp_path} --target native"
    )


def test_a_target_picks_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["a", "b"])
    add_library(tmp_path, "one", cpu_flags=["a"])
    add_library(tmp_path, "two", cpu_flags=["a", "b"])
    assert find_library(bundle_at(tmp_path), "one")[0] == tmp_path / "lib" / "one"


def test_a_target_without_library_names_those_there_are(tmp_path: Path) -> None:
    add_library(tmp_path, "one")
    with pytest.raises(TargetError) as caught:
        find_library(bundle_at(tmp_path), "../one")
    assert str(caught.value) == (
        f"bundle {tmp_path} has no library for target '../one', it has ['one']; "
        f"run: engram compile {tmp_path} --target ../one"
    )


def test_a_target_that_does_not_fit_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["avx2"])
    add_library(tmp_path, "arm", machine="aarch64")
    with pytest.raises(TargetError) as caught:
        find_library(bundle_at(tmp_path), "arm")
    assert str(caught.value) == (
        f"library {tmp_path / 'lib' / 'arm'} can't run here: arm is for aarch64, this machine is x86_64"
    )


def test_a_library_for_another_device_is_only_found_by_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this_machine(monkeypatch, ["avx2"])
    digests = {**raw_library()["sha256"], "commands": "d" * 64}
    add_library(tmp_path, "array", device="npu", commands="commands.bin", sha256=digests)
    assert find_message(bundle_at(tmp_path)) == (
        f"bundle {tmp_path} has no compiled library but for ['array'], which --target picks; "
        f"run: engram compile {tmp_path} --target native"
    )
    found = find_library(bundle_at(tmp_path), "array")[1]
    assert (found.device, library_device(bundle_at(tmp_path), "array")) == ("npu", "npu")
    assert found.files["commands"] == "commands.bin"
    add_library(tmp_path, "one")
    assert find_library(bundle_at(tmp_path))[1].target == "one"


def test_a_library_an_older_version_compiled_does_not_hide_a_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this_machine(monkeypatch, ["avx2"])
    add_library(tmp_path, "elder", version=2)
    add_library(tmp_path, "x86-64-v3")
    assert find_library(bundle_at(tmp_path))[0] == tmp_path / "lib" / "x86-64-v3"


def test_a_library_with_states_the_bundle_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["avx2"])
    add_library(tmp_path, "x86-64-v3", float16_states=["key.7"])
    assert find_message(bundle_at(tmp_path)) == (
        f"library {tmp_path / 'lib' / 'x86-64-v3'} has states ['key.7'] this bundle lacks; "
        f"run: engram compile {tmp_path} --target native"
    )


def test_a_library_made_from_another_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["avx2"])
    add_library(tmp_path, "x86-64-v3", graph_sha256="1+3")
    assert find_message(bundle_at(tmp_path)) == (
        f"library {tmp_path / 'lib' / 'x86-64-v3'} was compiled from another graph than this bundle holds; "
        f"run: engram compile {tmp_path} --target native"
    )


def test_a_library_whose_description_is_damaged_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine(monkeypatch, ["avx2"])
    add_library(tmp_path, "x86-64-v3")
    place = tmp_path / "lib" / "x86-64-v3" / "compile.json"
    place.write_text('{"version": 1, "version": 1}')
    with pytest.raises(BundleError) as caught:
        find_library(bundle_at(tmp_path))
    assert str(caught.value) == f"{place} is not valid JSON: key 'version' stands twice"
