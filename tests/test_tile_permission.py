"""AMX tiles need the kernel's leave: where it is denied, libraries and profiles for AMX do not fit."""

import json
from pathlib import Path

import pytest
from tests.test_profiles import MACHINE, bundle_at, raw_library, this_machine

from engram_runtime import cpu
from engram_runtime.library import LibraryInfo, find_library
from engram_targets import detect_native, load_cpu_profile

TILES, VNNI = load_cpu_profile("x86-64-amx"), load_cpu_profile("x86-64-avx512-vnni")


class FakeKernel:
    """Answers system calls with one result and keeps what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, result: int) -> None:
        self.asked: list[tuple[int, ...]] = []
        self._result = result
        monkeypatch.setattr(cpu, "system_call", self._answer)

    def _answer(self, *call: int) -> int:
        self.asked.append(call)
        return self._result


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Pretend that this machine's processor has some features."""
    (tmp_path / "cpuinfo").write_text(f"flags : {' '.join(flags)}\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    this_machine(monkeypatch, flags)


def test_the_permission_is_asked_for_as_linux_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(monkeypatch, result=0)
    assert cpu.request_tiles()
    assert kernel.asked == [(158, 0x1023, 18)]  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)


def test_a_system_call_gives_minus_one_where_it_fails() -> None:
    assert cpu.system_call(1 << 30) == -1


def test_a_processor_without_tiles_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = FakeKernel(monkeypatch, result=0)
    pretend(monkeypatch, tmp_path, VNNI.cpu_flags)
    assert cpu.usable_cpu_flags() == set(VNNI.cpu_flags)
    assert kernel.asked == []


@pytest.mark.parametrize(("result", "expected"), [(0, TILES), (-1, VNNI)])
def test_native_has_tiles_only_where_the_kernel_permits_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: int, expected: object
) -> None:
    FakeKernel(monkeypatch, result)
    pretend(monkeypatch, tmp_path, TILES.cpu_flags)
    assert detect_native(MACHINE, cpu.usable_cpu_flags()) == expected


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (0, None),
        (-1, "x86-64-amx needs AMX tiles, which the kernel keeps from this process (arch_prctl is denied)"),
    ],
)
def test_a_library_on_tiles_fits_only_where_the_kernel_permits_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: int, expected: str | None
) -> None:
    FakeKernel(monkeypatch, result)
    pretend(monkeypatch, tmp_path, TILES.cpu_flags)
    info = LibraryInfo.from_dict(raw_library(target=TILES.name, cpu_flags=list(TILES.cpu_flags)))
    assert info.misfit() == expected


def test_other_libraries_do_not_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = FakeKernel(monkeypatch, result=-1)
    pretend(monkeypatch, tmp_path, TILES.cpu_flags)
    assert LibraryInfo.from_dict(raw_library(cpu_flags=list(VNNI.cpu_flags))).misfit() is None
    assert kernel.asked == []


@pytest.mark.parametrize(("result", "expected"), [(0, TILES), (-1, VNNI)])
def test_a_bundle_compiled_for_both_runs_without_tiles_where_they_are_denied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, result: int, expected: object
) -> None:
    FakeKernel(monkeypatch, result)
    pretend(monkeypatch, tmp_path, TILES.cpu_flags)
    for profile in (TILES, VNNI):
        folder = tmp_path / "lib" / profile.name
        folder.mkdir(parents=True)
        raw = raw_library(target=profile.name, cpu_flags=list(profile.cpu_flags))
        (folder / "compile.json").write_text(json.dumps(raw))
    _, info = find_library(bundle_at(tmp_path))
    assert load_cpu_profile(info.target) == expected
