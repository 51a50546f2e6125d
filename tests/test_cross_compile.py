"""Libraries for other machines: linked by ziglang, with TVM's runtime library out of a wheel where there is one."""

import dataclasses
import hashlib
import re
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.test_profiles import raw_library
from tests.workshop import Workshop, copy_folder

from engram_compilers import build, runtime_library
from engram_compilers.linking import GLIBC, system_of, zig_target
from engram_compilers.runtime_library import library_of, pinned_wheels
from engram_runtime.bundle import Bundle
from engram_runtime.errors import CompileError, TargetError
from engram_runtime.executors import tvm_library
from engram_runtime.library import LibraryInfo, verify_library
from engram_runtime.strict_json import read_json_object
from engram_targets import CpuProfile, cpu_profile_names, load_cpu_profile

CONTENT = b"\x7fELF, or so it says"
WHEEL = "apache_tvm-0.27.0.post1-py3-none-manylinux_2_28_aarch64.whl"
METADATA = "Metadata-Version: 2.1\nName: apache-tvm\nVersion: 0.27.0.post1\n"
PINS = """
version = "0.27.0.post1"

[[wheels]]
machine = "aarch64"
system = "linux"
platform = "manylinux_2_28_aarch64"
sha256 = "{wheel}"
library = "libtvm_runtime.so"
library_bytes = {size}
library_sha256 = "{library}"
"""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Index:
    """A folder of wheels in place of the package index, and pins that state what is in it."""

    def __init__(self, folder: Path) -> None:
        self.wheel = folder / "wheels" / WHEEL
        self.pins = folder / "pins.toml"
        self.cache = folder / "engram-edge" / "apache-tvm-0.27.0.post1-manylinux_2_28_aarch64"
        self.reports: list[str] = []
        self.wheel.parent.mkdir()
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tvm/lib/libtvm_runtime.so", CONTENT)
            archive.writestr("apache_tvm-0.27.0.post1.dist-info/METADATA", METADATA)
            archive.writestr("apache_tvm-0.27.0.post1.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        self.pin()

    def pin(self, *, library: str = digest(CONTENT)) -> None:
        wheel = digest(self.wheel.read_bytes())
        self.pins.write_text(PINS.format(wheel=wheel, library=library, size=len(CONTENT)))

    def library(self) -> Path | None:
        return library_of("aarch64", "linux", self.reports.append)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index(tmp_path)
    monkeypatch.setattr(runtime_library, "PINS", made.pins)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.wheel.parent))
    return made


def test_a_runtime_library_comes_out_of_the_wheel_once(index: Index) -> None:
    kept = index.library()
    assert kept == index.cache / "libtvm_runtime.so"
    assert kept.read_bytes() == CONTENT
    assert index.reports == [
        f"downloading apache-tvm==0.27.0.post1 for manylinux_2_28_aarch64; its runtime library is kept in {index.cache}"
    ]
    index.wheel.unlink()
    assert index.library() == kept
    assert len(index.reports) == 1
    assert [path.name for path in index.cache.iterdir()] == ["libtvm_runtime.so"]


def test_a_damaged_runtime_library_is_had_again(index: Index) -> None:
    index.cache.mkdir(parents=True)
    (index.cache / "libtvm_runtime.so").write_bytes(CONTENT[:-1])
    kept = index.library()
    assert kept is not None
    assert kept.read_bytes() == CONTENT


def test_without_the_wheel_one_sentence_says_what_to_do(index: Index) -> None:
    index.wheel.unlink()
    with pytest.raises(CompileError) as caught:
        index.library()
    assert str(caught.value) == (
        "the wheel of apache-tvm==0.27.0.post1 for manylinux_2_28_aarch64, whose runtime library the target needs, "
        "can't be downloaded: ERROR: No matching distribution found for apache-tvm==0.27.0.post1; "
        "connect this machine once, or set PIP_FIND_LINKS to a folder with that wheel"
    )


def test_another_wheel_of_that_name_is_refused(index: Index) -> None:
    with zipfile.ZipFile(index.wheel, "a") as archive:
        archive.writestr("tvm/more", b"")
    with pytest.raises(CompileError, match=r"can't be downloaded: .*; connect this machine once"):
        index.library()
    assert [*index.cache.iterdir()] == []


def test_another_library_in_the_wheel_is_refused(index: Index) -> None:
    index.pin(library="0" * 64)
    with pytest.raises(CompileError) as caught:
        index.library()
    assert str(caught.value) == (
        f"libtvm_runtime.so of {WHEEL} has SHA-256 {digest(CONTENT)}, expected {'0' * 64}; "
        "this engram-edge states another wheel than it was made with: install it anew"
    )
    assert [*index.cache.iterdir()] == []


def test_machines_without_a_wheel_have_no_runtime_library(index: Index) -> None:
    assert library_of("riscv64", "linux", index.reports.append) is None
    assert index.reports == []


def test_pinned_wheels_are_of_the_tvm_that_compiles() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    pinned = {wheel.requirement for wheel in pinned_wheels()}
    assert pinned <= set(project["project"]["optional-dependencies"]["compile"])
    assert len(pinned) == 1


def test_wheels_are_pinned_for_the_targets_that_have_some() -> None:
    targets = {(profile.machine, profile.system) for profile in map(load_cpu_profile, cpu_profile_names())}
    pinned = {(wheel.machine, wheel.system) for wheel in pinned_wheels()}
    assert targets - pinned == {("riscv64", "linux"), ("wasm32", "wasi")}
    assert pinned <= targets


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x86-64-v3", "x86_64-linux-gnu.2.28"),
        ("aarch64-dotprod", "aarch64-linux-gnu.2.28"),
        ("riscv64-rvv", "riscv64-linux-gnu.2.28"),
        ("apple-arm64", "aarch64-macos.11.0"),
        ("wasm32", "wasm32-wasi"),
    ],
)
def test_ziglang_is_asked_for_the_oldest_system_a_target_runs_on(name: str, expected: str) -> None:
    assert zig_target(load_cpu_profile(name).llvm.mtriple) == expected


def test_profiles_name_the_system_of_their_triple() -> None:
    profiles = [load_cpu_profile(name) for name in cpu_profile_names()]
    assert [system_of(profile.llvm.mtriple).name for profile in profiles] == [profile.system for profile in profiles]


def few_passes(name: str) -> CpuProfile:
    return dataclasses.replace(load_cpu_profile(name), decode_tokens=(1,), prefill_tokens=())


BEGINNINGS = {
    "riscv64-rvv": b"\x7fELF\2\1\1" + bytes(9) + b"\3\0\xf3\0",  # 64 bits, little-endian, shared, EM_RISCV
    "aarch64-i8mm-sve": b"\x7fELF\2\1\1" + bytes(9) + b"\3\0\xb7\0",  # .., EM_AARCH64
    "apple-arm64": b"\xcf\xfa\xed\xfe\x0c\0\0\1",  # MH_MAGIC_64, CPU_TYPE_ARM64
    "wasm32": b"\0asm\1\0\0\0",
}
RUNTIMES = {
    "riscv64-rvv": None,
    "aarch64-i8mm-sve": "libtvm_runtime.so",
    "apple-arm64": "libtvm_runtime.dylib",
    "wasm32": None,
}
ALONE = pytest.mark.exhaustive


@pytest.mark.slow
@ALONE
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_bundle_is_compiled_for_a_machine_that_is_not_this_one(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(build, "library_of", kept_runtimes(tmp_path))
    bundle = Bundle.open(copy_folder(workshop.uncompiled().path, tmp_path / "bundle"))
    info = compiled(bundle, name)
    library = (bundle.path / "lib" / name / info.library).read_bytes()
    assert library.startswith(BEGINNINGS[name])
    assert (b"TVMBackendParallelLaunch" if name == "wasm32" else b"__tvm_ffi_use_threads") in library
    assert info.runtime == RUNTIMES[name]
    verify_library(bundle.path / "lib" / name, info)
    needed = {tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
    assert max(needed, default=(2, 0)) <= tuple(map(int, GLIBC.split(".")))


def kept_runtimes(folder: Path) -> Callable[..., Path | None]:
    """Return what stands in for `library_of`, which would download whole wheels."""

    def library_of(machine: str, system: str, report: Callable[[str], None]) -> Path | None:
        found = next((each for each in pinned_wheels() if (each.machine, each.system) == (machine, system)), None)
        if found is None:
            return None
        (folder / found.library).write_bytes(CONTENT)
        return folder / found.library

    return library_of


def compiled(bundle: Bundle, name: str) -> LibraryInfo:
    result = build.compile_bundle(bundle, few_passes(name))
    return LibraryInfo.from_dict(read_json_object(result.folder / "compile.json"))


def test_without_a_runtime_library_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_library(runtime=None, sha256={"library": "0", "weights": "0"}, machine="riscv64")
    info = LibraryInfo.from_dict(raw)
    assert tvm_library.runtime_library(Path("lib/any"), info) == runtime_library.installed_library()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetError) as caught:
        tvm_library.runtime_library(Path("lib/any"), info)
    assert str(caught.value) == (
        "library lib/any has no TVM runtime library beside it, as apache-tvm has no wheel for riscv64: "
        f"build {info.compiler} from source here and install it"
    )
