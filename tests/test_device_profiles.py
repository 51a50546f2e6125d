"""Profiles of devices other than processors, and users' own files."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_profiles import raw_llvm, raw_profile
from tests.workshop import Workshop

from engram_compilers.build import compile_bundle
from engram_runtime.errors import CompileError, TargetError
from engram_runtime.planning.targets import read_target
from engram_targets import (
    CProfile,
    GpuProfile,
    NpuProfile,
    cpu_profile_names,
    load_cpu_profile,
    load_profile,
    parse_profile,
    profile_names,
)

COMMON = ("description", "evidence", "decode_tokens", "prefill_tokens", "cache_dtype")
OTHERS = sorted(set(profile_names()) - set(cpu_profile_names()))


def raw_common(device: str, kernels: str) -> dict[str, Any]:
    return {"device": device, "kernels": kernels} | {key: raw_profile()[key] for key in COMMON}


def raw_gpu(**changes: Any) -> dict[str, Any]:
    table = {"language": "cuda", "arch": "sm_80", "max_threads": 1024, "shared_memory_bytes": 49152, "warp": 32}
    return raw_common("gpu", "gpu") | {"gpu": table | changes}


def raw_npu(**changes: Any) -> dict[str, Any]:
    table = {
        "rows": 32,
        "columns": 8,
        "weight_bytes": 512,
        "input_bytes": 64,
        "accumulator_bytes": 64,
        "dma_bytes_per_cycle": 4,
        "dma_latency_cycles": 0,
        "clock_hz": 10**9,
    }
    return raw_common("npu", "systolic") | {"host": "x86-64-v3", "npu": table | changes}


def message(raw: dict[str, Any]) -> str:
    with pytest.raises(TargetError) as caught:
        parse_profile("mine", raw)
    return str(caught.value)


def file_message(path: Path) -> str:
    with pytest.raises(TargetError) as caught:
        load_profile(str(path))
    return str(caught.value)


def test_a_c_profile_has_what_all_have() -> None:
    profile = parse_profile("mine", raw_common("c", "portable"))
    assert isinstance(profile, CProfile)
    assert profile.passes == ((1, 1), (2, 2), (4, 4), (2, 1), (4, 1))
    assert profile.kernels == "portable"


def test_a_gpu_profile_is_what_its_file_says() -> None:
    profile = parse_profile("mine", raw_gpu())
    assert isinstance(profile, GpuProfile)
    named = dataclasses.asdict(profile)
    assert {key: named[key] for key in raw_gpu()["gpu"]} == raw_gpu()["gpu"]


def test_an_npu_profile_is_an_array_beside_another_profile() -> None:
    profile = parse_profile("mine", raw_npu())
    assert isinstance(profile, NpuProfile)
    assert profile.host == load_cpu_profile("x86-64-v3")
    assert dataclasses.asdict(profile.geometry) == raw_npu()["npu"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (raw_profile(device="tpu"), "profile mine has device 'tpu', there are ['cpu', 'c', 'gpu', 'npu']"),
        (raw_profile(device=[]), "profile mine has device [], there are ['cpu', 'c', 'gpu', 'npu']"),
        (raw_profile(speed=1), "profile mine has unknown keys ['speed']; it may need a newer engram-edge"),
        (raw_profile(machine=1), "profile mine.machine is 1, expected a string"),
        (raw_profile(llvm=1), "profile mine.llvm is 1, expected an object"),
        (
            raw_profile(llvm=raw_llvm(mcpu="")),
            "profile mine has mcpu '', expected 1 to 64 letters, digits and any of . _ + -",
        ),
        (
            raw_profile(llvm=raw_llvm(mattr=["+v", "-o /etc"])),
            "profile mine has mattr '-o /etc', expected 1 to 64 letters, digits and any of . _ + -",
        ),
        (
            raw_profile(llvm=raw_llvm(mtriple="$(ls)")),
            "profile mine has mtriple '$(ls)', expected 1 to 64 letters, digits and any of . _ + -",
        ),
        (
            raw_profile(machine="aarch64"),
            "profile mine has mtriple 'x86_64-linux-gnu', expected one for linux on aarch64, which begins with "
            "'aarch64-linux-gnu'",
        ),
        (
            raw_profile(system="macos"),
            "profile mine has mtriple 'x86_64-linux-gnu', expected one for macos on x86_64, which begins with "
            "'x86_64-apple-macos'",
        ),
        (
            raw_profile(llvm=raw_llvm(mtriple="x86_64-unknown-linux-gnu")),
            "profile mine has mtriple 'x86_64-unknown-linux-gnu', expected one for linux on x86_64, which begins with "
            "'x86_64-linux-gnu'",
        ),
        (raw_profile(system="dos"), "profile mine has system 'dos', there are ['linux', 'macos', 'wasi']"),
        (
            raw_profile(evidence="hearsay"),
            "profile mine has evidence 'hearsay', there are ['hardware', 'emulated', 'simulated', 'compiled']",
        ),
        (raw_profile(description=""), "profile mine has description '', expected a line of 1 to 200 characters"),
        (
            raw_profile(description="a\x1b[2J"),
            "profile mine has description 'a\\x1b[2J', expected a line of 1 to 200 characters",
        ),
        (
            raw_profile(prefill_tokens=[10**9]),
            "profile mine compiles 3 token counts to 1000000000, expected at most 16 to 4096",
        ),
        (
            raw_profile(decode_tokens=[1, True]),
            "profile mine.decode_tokens is True, expected a list of 64-bit integers",
        ),
        (raw_common("c", "avx2"), "profile mine has kernels 'avx2', there are ['portable']"),
        (raw_gpu(language="sycl"), "profile mine has language 'sycl', there are ['cuda', 'opencl', 'metal']"),
        (raw_gpu(arch=""), "profile mine has arch '' for cuda, expected one for cuda only"),
        (raw_gpu(language="metal"), "profile mine has arch 'sm_80' for metal, expected one for cuda only"),
        (raw_gpu(max_threads=2048), "profile mine has max_threads 2048, expected 32 to 1024"),
        (raw_npu() | {"host": "warp"}, f"cpu target 'warp' is unknown; there are {['native', *cpu_profile_names()]}"),
        (
            raw_npu() | {"host": "npu-systolic"},
            f"cpu target 'npu-systolic' is unknown; there are {['native', *cpu_profile_names()]}",
        ),
        (raw_npu(rows=0), "profile mine has rows 0, expected 1 to 1024"),
        (raw_npu(columns=6), "profile mine has an array of 32 x 6 cells, expected multiples of 32 and 4"),
        (raw_npu(rows=48), "profile mine has an array of 48 x 8 cells, expected multiples of 32 and 4"),
        (raw_npu(weight_bytes=508), "profile mine has weight_bytes 508, two tiles of 32 x 8 weights need 512"),
        (raw_npu(weight_bytes=514), "profile mine has weight_bytes 514, expected a multiple of dma_bytes_per_cycle 4"),
        (raw_npu(input_bytes=63), "profile mine has input_bytes 63, two rows of 32 inputs need 64"),
        (raw_npu(accumulator_bytes=60), "profile mine has accumulator_bytes 60, two rows of 8 sums need 64"),
        (raw_npu(clock_hz=0), "profile mine has clock_hz 0, expected 1 to 100000000000"),
    ],
)
def test_a_profile_that_cannot_be_is_refused(raw: dict[str, Any], expected: str) -> None:
    assert message(raw) == expected


SOUND = {"cpu": raw_profile(), "c": raw_common("c", "portable"), "gpu": raw_gpu(), "npu": raw_npu()}
ANYTHING = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(device=st.sampled_from(sorted(SOUND)), value=ANYTHING, data=st.data())
def test_any_value_is_refused_in_a_sentence_or_read(device: str, value: object, data: st.DataObject) -> None:
    raw = SOUND[device]
    key = data.draw(st.sampled_from(sorted(raw)))
    try:
        parsed = parse_profile("mine", raw | {key: value}).name
    except TargetError:
        parsed = "mine"
    assert parsed == "mine"


def test_a_file_of_ones_own_is_a_target_by_its_path(tmp_path: Path) -> None:
    text = Path("targets/engram_targets/profiles/x86-64-v3.toml").read_text()
    (tmp_path / "mine.toml").write_text(text)
    expected = dataclasses.replace(load_cpu_profile("x86-64-v3"), name="mine")
    assert load_profile(str(tmp_path / "mine.toml")) == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("mine.toml", b"a = 1\nb =", "profile file {path} is not valid TOML: Invalid value (at end of document)"),
        (
            "mine.toml",
            b"device = 'c'\nspeed fast",
            "profile file {path} is not valid TOML: Expected '=' after a key in a key/value pair (at line 2, column 7)",
        ),
        (
            "mine.toml",
            b"\xff",
            "profile file {path} is not valid TOML: "
            "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        ("mine.toml", b"#" * 65537, "profile file {path} has more than the 65536 bytes a profile may have"),
        ("mine.toml", b"", "profile mine has device None, there are ['cpu', 'c', 'gpu', 'npu']"),
        ("x86-64-v3.toml", b"", "profile file {path} has the name of a target that comes with engram-edge; rename it"),
        ("native.toml", b"", "profile file {path} has the name of a target that comes with engram-edge; rename it"),
        (
            "my box.toml",
            b"",
            "profile file {path} has a name that names no target: letters, digits and any of . _ + - do",
        ),
    ],
)
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert file_message(tmp_path / name) == expected.format(path=tmp_path / name)


def test_a_deeply_nested_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("a = " + "[" * 20000)
    assert file_message(tmp_path / "mine.toml").startswith(f"profile file {tmp_path / 'mine.toml'} is not valid TOML: ")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    assert file_message(path) == f"profile file {path} can't be read: No such file or directory"
    path.mkdir()
    assert file_message(path) == f"profile file {path} can't be read: Is a directory"


def test_c_sources_are_packed_not_compiled(workshop: Workshop) -> None:
    bundle = workshop.uncompiled()
    with pytest.raises(CompileError) as caught:
        compile_bundle(bundle, load_profile("c-portable"))
    assert str(caught.value) == (
        f"target c-portable is C sources, no library; run: engram pack {bundle.path} --target c-portable -o DIR"
    )


@pytest.mark.parametrize("name", OTHERS)
def test_plans_are_made_for_processors(name: str) -> None:
    with pytest.raises(TargetError) as caught:
        read_target(name)
    assert str(caught.value) == (
        f"target {name} is of device {load_profile(name).device!r}, plans are made for processors only"
    )
