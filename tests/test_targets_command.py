"""``engram targets``, and the page on the keys of profiles."""

import dataclasses
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command
from tests.workshop import Workshop

from engram_runtime import cpu
from engram_targets import fitting, load_cpu_profile, load_profile, profile_names
from engram_targets.fitting import cpu_misfit, misfit, needs
from tools.target_schema import target_schema

PROFILES = Path(__file__).parents[1] / "targets" / "engram_targets" / "profiles"
V3 = load_cpu_profile("x86-64-v3")


def keys_of(raw: dict[str, Any]) -> set[str]:
    """Return the keys of a profile's file as the page spells them."""
    tables = {name: value for name, value in raw.items() if isinstance(value, dict)}
    return {*raw.keys() - tables.keys(), *(f"[{name}] {key}" for name, table in tables.items() for key in table)}


def this_machine_is(monkeypatch: pytest.MonkeyPatch, machine: str, *flags: str) -> None:
    monkeypatch.setattr(fitting, "machine", lambda: machine)
    monkeypatch.setattr(fitting, "usable_cpu_flags", lambda: frozenset(flags))


def test_every_target_is_listed_with_what_has_run_it(command: Command) -> None:
    rows = command("engram", "targets").out.split("\n\n")[0].splitlines()
    cells = [re.split(r" {2,}", row) for row in rows]
    assert cells[0] == ["name", "device", "kernels", "evidence", "here", "description"]
    profiles = [load_profile(name) for name in profile_names()]
    assert [row[:4] for row in cells[1:]] == [[p.name, p.device, p.kernels, p.evidence] for p in profiles]
    assert [row[4] for row in cells[1:]] == ["yes" if misfit(profile) is None else "no" for profile in profiles]
    assert [row[5] for row in cells[1:]] == [profile.description for profile in profiles]


def test_the_list_tells_what_a_bundle_is_compiled_for(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready().path
    listed = command("engram", "targets", "--bundle", bundle, "--json").json["targets"]
    libraries = {path.parent.name for path in bundle.glob("lib/*/compile.json")}
    assert {target["name"] for target in listed if target["compiled"]} == libraries
    rows = command("engram", "targets", "--bundle", bundle).out.splitlines()
    assert {row.split()[0] for row in rows if re.search(r"  (yes|no) +yes  ", row)} == libraries


def test_a_list_for_what_is_no_bundle_is_refused(command: Command, tmp_path: Path) -> None:
    result = command("engram", "targets", "--bundle", tmp_path)
    assert (result.code, result.out) == (3, "")


@pytest.mark.parametrize("name", profile_names())
def test_a_target_is_shown_whole(command: Command, name: str) -> None:
    profile = load_profile(name)
    shown = command("engram", "targets", "show", name, "--json").json
    expected = {
        **dataclasses.asdict(profile),
        "device": profile.device,
        "misfit": misfit(profile),
        "needs": dataclasses.asdict(needs(profile)),
    }
    assert shown == json.loads(json.dumps(expected))
    text = command("engram", "targets", "show", name).out
    assert set(re.findall(r"^ *(\w+)", text, re.MULTILINE)) >= set(shown) - {"misfit"}


def test_a_file_of_ones_own_is_shown(command: Command, tmp_path: Path) -> None:
    shutil.copy(PROFILES / "wasm32.toml", tmp_path / "mine.toml")
    shown = command("engram", "targets", "show", tmp_path / "mine.toml", "--json").json
    assert shown == command("engram", "targets", "show", "wasm32", "--json").json | {"name": "mine"}


def test_a_target_that_is_not_there_is_named(command: Command) -> None:
    result = command("engram", "targets", "show", "warp")
    known = ["native", *profile_names()]
    assert result.code == 4
    assert result.err == f"engram: target 'warp' is unknown; there are {known}, and files by path, *.toml\n"


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", V3.cpu_flags, None),
        ("aarch64", V3.cpu_flags, "it is for x86_64, this machine is aarch64"),
        ("x86_64", set(V3.cpu_flags) - {"fma", "avx2"}, "this machine lacks CPU features ['avx2', 'fma']"),
    ],
)
def test_a_processor_that_does_not_do_is_told_why(machine: str, flags: Any, expected: str | None) -> None:
    assert cpu_misfit(V3, machine, flags) == expected
    assert V3.fits(machine, flags) == (expected is None)


def test_an_array_needs_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    host = load_profile("npu-systolic").host  # type: ignore[attr-defined]
    this_machine_is(monkeypatch, "s390x")
    assert misfit(load_profile("npu-systolic")) == f"it is for {host.machine}, this machine is s390x"


def test_a_graphics_processor_needs_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr("ctypes.util.find_library", found.append)
    assert misfit(load_profile("opencl")) == "there is no driver, a library OpenCL"
    assert found == ["OpenCL"]


@pytest.mark.parametrize(("name", "language"), [("cuda-sm80", "cuda"), ("cuda-sm90", "cuda"), ("metal", "metal")])
def test_a_driver_is_no_executor(monkeypatch: pytest.MonkeyPatch, name: str, language: str) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda driver: driver)
    assert misfit(load_profile(name)) == (
        f"there is no executor for {language}: its kernels are generated, and nothing here runs them"
    )
    assert misfit(load_profile("opencl")) is None


def test_the_linker_of_this_machine_does_for_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine_is(monkeypatch, "aarch64")
    assert needs(load_profile("aarch64-dotprod")).compile.endswith("and gcc, clang or ziglang to link")
    assert needs(V3).compile.endswith("and ziglang to link")


@pytest.mark.parametrize("name", profile_names())
def test_every_key_of_a_profile_is_on_the_page(name: str) -> None:
    raw = tomllib.loads((PROFILES / f"{name}.toml").read_text())
    page = target_schema()
    section = page[page.index(f'## `device = "{raw["device"]}"`') :].split("\n## ")[0]
    common = page[page.index("## All devices") :].split("\n## ")[0]
    own, *accelerators = section.split("\n### ")
    sizes = [part for part in accelerators if part.startswith(f'`kernels = "{raw["kernels"]}"`')]
    assert keys_of(raw) == set(re.findall(r"^\| `(.+?)` \|", "\n".join([own, common, *sizes]), re.MULTILINE))


def test_flags_of_risc_v_are_read_from_its_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nisa\t\t: rv64imafdcv_zicsr_zifencei\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert load_cpu_profile("riscv64-rvv").fits("riscv64", cpu.cpu_flags())
