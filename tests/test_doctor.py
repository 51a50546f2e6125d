"""``engram doctor``: what it finds on machines, installations and bundles that tests make up, and on this one."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.conftest import Command
from tests.disks import VDA, flash_disk, slow_disk
from tests.test_profiles import raw_library
from tests.workshop import Workshop, copy_folder

from engram_runtime import cpu, memory
from engram_runtime.bundle import Bundle, file_identity, manifest_bytes
from engram_runtime.commands.doctor import doctor, report
from engram_runtime.doctor import bundle as checks
from engram_runtime.doctor import install, machine
from engram_runtime.doctor.finding import Finding
from engram_runtime.doctor.install import Requirement
from engram_runtime.doctor.machine import HERE, Roots
from engram_runtime.errors import BundleError
from engram_runtime.library import LibraryInfo, graph_digest
from engram_runtime.memory import FreeMemory
from engram_runtime.tables import disk, place
from engram_runtime.trust.records import COMPILED, keep_record

GIB = 1 << 30
ROOT = Path(__file__).parents[1]
VERSION = importlib.metadata.version("engram-edge")

# Machines.

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max address space         {space:<20} unlimited            bytes
Max locked memory         8388608              8388608              bytes
Max open files            {files:<20} 1048576              files
Max nice priority         0                    0
"""
HEALTHY = {
    "proc/cpuinfo": "processor : 0\nflags : fpu avx2 avx512_vnni\n",
    "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
    "proc/self/limits": LIMITS.format(space="unlimited", files=1024),
    "proc/self/cgroup": "0::/\n",
    "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0-1\n",
    "sys/devices/system/cpu/cpu1/topology/thread_siblings_list": "0-1\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
}
SICK = HEALTHY | {
    "proc/cpuinfo": "processor : 0\nflags : fpu amx_tile sse4_2\n",
    "proc/self/limits": LIMITS.format(space="unlimited", files=64),
    "proc/self/cgroup": "0::/small\n",
    "sys/fs/cgroup/small/cpu.max": "50000 100000\n",
    "sys/fs/cgroup/small/memory.max": f"{GIB}\n",
    "sys/fs/cgroup/small/memory.current": f"{GIB - (64 << 20)}\n",
    "sys/fs/cgroup/small/memory.stat": "inactive_file 0\nactive_file 0\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
    "cache": "a file where the folder should be",
}


def fake_machine(monkeypatch: pytest.MonkeyPatch, root: Path, files: Mapping[str, str]) -> Roots:
    """Write what the kernel of another machine tells, which has two CPUs, and let this process see that alone."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for module, constant, name in (
        (cpu, "CPUINFO", "proc/cpuinfo"),
        (cpu, "TOPOLOGY", "sys/devices/system/cpu"),
        (cpu, "CGROUPS", "sys/fs/cgroup"),
        (cpu, "OWN_CGROUPS", "proc/self/cgroup"),
        (memory, "MEMINFO", "proc/meminfo"),
    ):
        monkeypatch.setattr(module, constant, root / name)
    monkeypatch.setattr(cpu, "system_call", lambda *call: -1)  # which would permit tiles
    monkeypatch.setattr(machine, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "available_cpus", lambda: [0, 1])
    monkeypatch.setattr(cpu, "available_cpus", lambda: [0, 1])
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sysconf", lambda name: 4096)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    return Roots(proc=root / "proc", sys=root / "sys")


def test_a_healthy_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    roots = fake_machine(monkeypatch, tmp_path, HEALTHY)
    assert list(machine.machine_findings(roots)) == [
        Finding("processor", "ok", "x86_64 with avx512_vnni, avx2"),
        Finding("threads", "ok", "2 of 2 CPUs on 1 core, 1 thread by default"),
        Finding("memory", "ok", "8.0 GiB available"),
        Finding("limits", "ok", "open files 1,024, address space unlimited, locked memory 8.0 MiB"),
        Finding("page size", "ok", "4.0 KiB"),
        Finding("huge pages", "ok", "madvise"),
        Finding("cache folder", "ok", str(tmp_path / "cache" / "engram-edge")),
    ]


def test_a_sick_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    roots = fake_machine(monkeypatch, tmp_path, SICK)
    assert list(machine.machine_findings(roots)) == [
        Finding(
            "processor",
            "warn",
            "x86_64 without amx_int8, avx512_vnni, avx_vnni, avx2: the kernels for it are several times slower",
            "in a virtual machine, let the host's processor through (QEMU: -cpu host)",
        ),
        Finding(
            "AMX tiles",
            "warn",
            "the kernel keeps them from this process (arch_prctl is denied)",
            "allow arch_prctl in the container's seccomp profile",
        ),
        Finding(
            "threads",
            "warn",
            "2 of 2 CPUs on 1 core, but the control group grants the time of 0.5: 1 thread by default",
            "raise the quota (docker: --cpus, systemd: CPUQuota)",
        ),
        Finding(
            "memory",
            "warn",
            "64.0 MiB available in its control group, small models take 512.0 MiB",
            "raise the group's limit (docker: --memory, systemd: MemoryMax)",
        ),
        Finding(
            "limits",
            "warn",
            "open files 64, address space unlimited, locked memory 8.0 MiB",
            "ulimit -n 256 or more",
        ),
        Finding("page size", "ok", "4.0 KiB"),
        Finding(
            "huge pages",
            "warn",
            "never, though tables in memory ask for them",
            f"as root: echo madvise > {tmp_path / 'sys/kernel/mm/transparent_hugepage/enabled'}",
        ),
        Finding(
            "cache folder",
            "warn",
            f"disks are measured at every start: {tmp_path / 'cache'} can't be written to",
            "set XDG_CACHE_HOME to a folder you may write to",
        ),
    ]


NO_KERNELS = "riscv64, compiled libraries are for x86_64 and aarch64"
LIMITED_SPACE = {"Max open files": math.inf, "Max address space": GIB, "Max locked memory": math.inf}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            machine.processor("riscv64", frozenset()),
            ("processor", "fail", NO_KERNELS, "run graphs themselves: --executor onnxruntime"),
        ),
        (machine.processor("aarch64", frozenset({"asimddp"})), ("processor", "ok", "aarch64 with asimddp", None)),
        (machine.tiles(permitted=True), ("AMX tiles", "ok", "this process may use them", None)),
        (machine.threads(4, 8, 2, 2.0), ("threads", "ok", "4 of 8 CPUs on 2 cores, 2 threads by default", None)),
        (
            machine.memory(FreeMemory(num_bytes=0)),
            ("memory", "warn", "0 B available, small models take 512.0 MiB", "end other programs"),
        ),
        (
            machine.limits(LIMITED_SPACE),
            (
                "limits",
                "warn",
                "open files unlimited, address space 1.0 GiB, locked memory unlimited: weights and tables are mapped",
                "ulimit -v unlimited",
            ),
        ),
        (
            machine.page_size(65536),
            (
                "page size",
                "warn",
                "64.0 KiB, which is what each row that isn't in memory reads",
                "where tables are larger than memory, boot a kernel with pages of 4.0 KiB",
            ),
        ),
        (
            machine.huge_pages(Roots(sys=Path("/nowhere"))),
            ("huge pages", "warn", "this kernel has none, which tables in memory ask for", None),
        ),
    ],
)
def test_findings_on_a_machine(found: Finding, expected: tuple[str, str, str, str | None]) -> None:
    assert dataclasses.astuple(found) == expected


# Installations.

BASE = [Requirement.parse(text) for text in ("numpy>=1.26", "apache-tvm-ffi==0.1.14.post1")]
EXTRAS = [
    Requirement.parse(f"{text}; extra == '{extra}'")
    for text, extra in (("onnx>=1.21", "export"), ("onnx>=1.21", "compile"), ("ray[data]>=2.40", "ray"))
]
NOTHING: dict[str, str] = {}
INSTALLED = {"engram-edge": "0.1.0", "numpy": "1.26", "apache-tvm-ffi": "0.1.14.post1", "onnx": "1.23.2+cpu"}


def test_every_requirement_of_this_project_can_be_read() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    assert all(text.endswith(Requirement.parse(text).version) for text in texts)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            install.packages(BASE, INSTALLED.get),
            (
                "packages",
                "ok",
                f"Python {platform.python_version()}, engram-edge 0.1.0, numpy 1.26, apache-tvm-ffi 0.1.14.post1",
                None,
            ),
        ),
        (
            install.packages(BASE, {"numpy": "1.9.3"}.get),
            (
                "packages",
                "fail",
                "numpy>=1.26 is needed, 1.9.3 is installed, "
                "apache-tvm-ffi==0.1.14.post1 is needed, it is not installed",
                "pip install 'numpy>=1.26' 'apache-tvm-ffi==0.1.14.post1'",
            ),
        ),
        (
            install.packages(BASE, (INSTALLED | {"apache-tvm-ffi": "0.1.15"}).get),
            (
                "packages",
                "fail",
                "apache-tvm-ffi==0.1.14.post1 is needed, 0.1.15 is installed",
                "pip install 'apache-tvm-ffi==0.1.14.post1'",
            ),
        ),
        (
            install.extras(EXTRAS, INSTALLED.get),
            ("extras", "ok", "compile, export; not ray (pip install 'engram-edge[ray]')", None),
        ),
        (install.extras(EXTRAS[:2], INSTALLED.get), ("extras", "ok", "compile, export", None)),
        (
            install.extras(EXTRAS, NOTHING.get),
            ("extras", "ok", "none; not compile, export, ray (pip install 'engram-edge[compile]')", None),
        ),
        (
            install.extras(EXTRAS, {"onnx": "1.3"}.get),
            ("extras", "warn", "onnx>=1.21 is needed, 1.3 is installed", "pip install 'onnx>=1.21'"),
        ),
        (install.c_compiler("/usr/bin/cc", NOTHING.get), ("C compiler", "ok", "/usr/bin/cc", None)),
        (install.c_compiler(None, {"ziglang": "0.17.1"}.get), ("C compiler", "ok", "ziglang 0.17.1", None)),
        (install.c_compiler(None, NOTHING.get), ("C compiler", "ok", "none, as this box compiles no bundles", None)),
        (
            install.c_compiler(None, {"apache-tvm": "0.27"}.get),
            (
                "C compiler",
                "warn",
                "none, so engram compile can't link",
                "install gcc or clang, or pip install ziglang",
            ),
        ),
    ],
)
def test_findings_on_an_installation(found: Finding, expected: tuple[str, str, str, str | None]) -> None:
    assert dataclasses.astuple(found) == expected


# Bundles.


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with what looks like a library for any machine, on a disk nothing is known of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checks, "place_of", lambda path: VDA)
    monkeypatch.setattr(checks, "installed_version", {"engram-edge": VERSION, "apache-tvm-ffi": "0.1.14"}.get)
    made = Bundle.open(copy_folder(workshop.uncompiled().path, tmp_path / "bundle"))
    folder = made.path / "lib" / "any"
    folder.mkdir(parents=True)
    raw = raw_library(
        target="any",
        machine=platform.machine(),
        cpu_flags=[],
        graph_sha256=graph_digest(made),
        compiler="apache-tvm 0.27, apache-tvm-ffi 0.1.14",
        float16_states=[],
    )
    (folder / "compile.json").write_text(json.dumps(raw))
    keep_record(LibraryInfo.from_dict(raw), COMPILED, folder)
    for name in ("model.so", "libtvm_runtime.so", "weights.bin"):
        (folder / name).touch()
    return made


def findings_of(bundle: Bundle, *, probe: bool = False, roots: Roots = HERE) -> dict[str, tuple[str, str, str | None]]:
    """Return state, detail and mend by name."""
    found = checks.bundle_findings(bundle.path, probe=probe, roots=roots)
    return {name: (state, detail, mend) for name, state, detail, mend in map(dataclasses.astuple, found)}


def info_of(bundle: Bundle) -> LibraryInfo:
    return LibraryInfo.from_dict(json.loads((bundle.path / "lib/any/compile.json").read_text()))


def test_a_healthy_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    roots = fake_machine(monkeypatch, tmp_path, HEALTHY)
    found = findings_of(bundle, roots=roots)
    states = {name: state for name, (state, _, _) in found.items()}
    assert set(states.values()) == {"ok"}
    assert {name: found[name][1] for name in found if name not in ("free space", "model memory")} == {
        "bundle": f"{bundle.manifest.model.name}, by engram-edge {VERSION}",
        "file system": "ext4 on vda",
        "disk": f"vda, not measured yet; engram doctor {bundle.path} --probe does",
        "library": "any, fits this machine",
        "trust": "any is compiled here",
        "compiled with": "apache-tvm 0.27, apache-tvm-ffi 0.1.14",
        "table files": "1, all there",
        "table memory": "5.7 KiB in all, 8.0 GiB available",
        "golden values": f"{len(json.loads((bundle.path / 'golden/golden.json').read_text())['token_ids'])} tokens, "
        f"for engram verify",
    }


def test_a_bundle_that_is_damaged_is_all_that_is_said(bundle: Bundle) -> None:
    (bundle.path / "tokenizer.json").unlink()
    assert findings_of(bundle) == {
        "bundle": ("fail", f"bundle {bundle.path} lacks tokenizer.json: No such file or directory", "export it again")
    }


def test_a_bundle_without_a_library_for_this_machine(bundle: Bundle) -> None:
    (bundle.path / "lib/any/compile.json").unlink()
    mend = f"run: engram compile {bundle.path} --target native"
    assert findings_of(bundle)["library"] == ("fail", f"bundle {bundle.path} has no compiled library", mend)


def test_a_library_that_lacks_a_file(bundle: Bundle) -> None:
    (bundle.path / "lib/any/model.so").unlink()
    assert findings_of(bundle)["library"] == (
        "fail",
        f"{bundle.path / 'lib/any'} lacks model.so",
        f"engram compile {bundle.path}",
    )


def test_versions_that_differ_from_the_bundles(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda name: "9.0")
    found = findings_of(bundle)
    made_by = f"{bundle.manifest.model.name}, by engram-edge {VERSION}; 9.0 is installed"
    assert found["bundle"] == ("warn", made_by, f"engram verify {bundle.path}")
    assert found["compiled with"] == (
        "warn",
        "apache-tvm 0.27, apache-tvm-ffi 0.1.14; apache-tvm-ffi 9.0 is installed",
        f"engram compile {bundle.path}",
    )


def test_a_file_system_on_which_maps_are_unsafe() -> None:
    assert checks.file_system(dataclasses.replace(VDA, kind=place.NETWORK, file_system="nfs4", device="host:/x")) == (
        Finding(
            "file system",
            "warn",
            "weights or tables lie on a network file system (nfs4, host:/x)",
            "copy them to a disk of this machine: a map of a file that goes away ends the process",
        )
    )


def test_a_disk_that_says_it_turns_is_to_be_measured(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "sys/block/vda/queue").mkdir(parents=True)
    (tmp_path / "sys/block/vda/queue/rotational").write_text("1\n")
    found = checks.disk(bundle, VDA, bundle.path, probe=False, roots=Roots(sys=tmp_path / "sys"))
    detail = "vda says that it turns, as virtual disks do too"
    assert found == Finding("disk", "warn", detail, f"measure it: engram doctor {bundle.path} --probe")


def test_a_disk_is_measured_when_asked_and_then_known(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "measure_disk", lambda path: flash_disk())
    expected = ("ok", "vda: 16 reads in 250 us, 1.0 GiB a second", None)
    assert [findings_of(bundle, probe=probe)["disk"] for probe in (True, False)] == [expected, expected]


def test_a_disk_that_cant_be_measured(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(disk, "measure_disk", refuse)
    assert findings_of(bundle, probe=True)["disk"] == ("warn", "vda can't be measured: Invalid argument", None)


def test_a_disk_is_measured_by_its_largest_file(bundle: Bundle, tmp_path: Path) -> None:
    for name, size in (("small", 1), ("large", 3), ("middle", 2)):
        (tmp_path / name).write_bytes(bytes(size))
    paths = [tmp_path / name for name in ("small", "large", "middle")]
    assert checks.largest_files(paths) == {VDA: tmp_path / "large"}


def test_a_slow_disk() -> None:
    assert checks.disk_speed(VDA, slow_disk(Path("rows"), VDA)) == Finding(
        "disk",
        "warn",
        "vda: 16 reads in 68 ms, 128.0 MiB a second: tokens whose rows aren't in memory wait",
        "put tables on a flash disk, or in memory",
    )


def test_a_full_disk(bundle: Bundle) -> None:
    size = (bundle.path / bundle.manifest.decoder.weights).stat().st_size
    needed = int(size * 1.2)
    assert checks.free_space(bundle, needed).state == "ok"
    assert checks.free_space(bundle, 0) == Finding(
        "free space",
        "warn",
        f"0 B, compiling a library takes {needed / 1024:.1f} KiB",
        "make room before the next engram compile",
    )


def test_a_table_outside_the_bundle_that_is_gone_and_files_too_many_to_open(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"rows")
    (table,) = bundle.manifest.tables
    (part,) = table.parts
    (rows,) = part.ranges
    away = dataclasses.replace(
        rows, file=str(tmp_path / "shard"), external=True, identity=file_identity(tmp_path / "shard")
    )
    table = dataclasses.replace(table, parts=(dataclasses.replace(part, ranges=(away,)),))
    referring = Bundle(bundle.path, dataclasses.replace(bundle.manifest, tables=(table,)))
    assert checks.table_files(referring, math.inf) == Finding("table files", "ok", "1, all there")
    assert checks.table_files(referring, 64) == Finding(
        "table files", "fail", "1, 64 files may be open", "ulimit -n 65"
    )
    (tmp_path / "shard").unlink()
    assert checks.table_files(referring, math.inf) == Finding(
        "table files",
        "fail",
        f"table file {tmp_path / 'shard'} can't be opened: No such file or directory",
        "export the bundle again",
    )
    assert tmp_path / "shard" not in checks.data_files(referring)


def test_weights_caches_and_tables_larger_than_memory(bundle: Bundle) -> None:
    detail = "{} of weights and, of a text as long as the context, 2.0 GiB of caches; 3.0 GiB available"
    free = FreeMemory(num_bytes=3 * GIB)
    states = {weights: checks.model_memory(weights * GIB, 2 * GIB, free) for weights in (1, 2, 4)}
    assert states == {
        1: Finding("model memory", "ok", detail.format("1.0 GiB")),
        2: Finding("model memory", "warn", detail.format("2.0 GiB"), "keep texts short, or end other programs"),
        4: Finding("model memory", "fail", detail.format("4.0 GiB"), "end other programs"),
    }
    assert checks.table_memory(bundle, FreeMemory(num_bytes=100)) == Finding(
        "table memory",
        "warn",
        "5.7 KiB in all, 100 B available: rows are read from disk",
        f"engram bench tables {bundle.path} says what that costs",
    )


def test_golden_values_that_are_missing_or_another_models(bundle: Bundle) -> None:
    without = tuple(entry for entry in bundle.manifest.files if entry.path != "golden/golden.json")
    assert checks.golden(Bundle(bundle.path, dataclasses.replace(bundle.manifest, files=without))) == Finding(
        "golden values", "warn", "none, so engram verify can't check results", "export it again"
    )
    (bundle.path / "golden/golden.json").write_text("{}")
    assert checks.golden(bundle).state == "fail"


def test_a_bundle_of_tables_alone_needs_no_library(bundle: Bundle) -> None:
    manifest = dataclasses.replace(bundle.manifest, graphs={})
    (bundle.path / "engram.json").write_bytes(manifest_bytes(manifest))
    assert findings_of(bundle).keys() >= {"bundle", "table files", "table memory"}
    assert not findings_of(bundle).keys() & {"library", "trust", "compiled with", "model memory", "free space"}


# The command.


def test_this_machine_and_a_bundle_without_a_library(workshop: Workshop, command: Command) -> None:
    bundle = workshop.uncompiled().path
    outcome = command("engram", "doctor", bundle, "--json")
    by_name = {finding["name"]: finding for finding in outcome.json["findings"]}
    assert (outcome.code, outcome.json["ok"], by_name["library"]["state"]) == (4, False, "fail")
    assert by_name.keys() >= {
        "processor",
        "threads",
        "memory",
        "packages",
        "C compiler",
        "file system",
        "golden values",
    }
    failed = ", ".join(name for name, finding in by_name.items() if finding["state"] == "fail")
    assert (
        outcome.err
        == f"engram: {failed.count(',') + 1} of {len(by_name)} checks failed: {failed}; each says what to do\n"
    )


def test_this_machine_alone(command: Command) -> None:
    outcome = command("engram", "doctor")
    assert (outcome.code, outcome.err) == (0, "")
    assert {line[:4].strip() for line in outcome.out.splitlines()} <= {"ok", "warn", ""}


def test_probe_is_for_a_bundle(command: Command) -> None:
    outcome = command("engram", "doctor", "--probe")
    assert (outcome.code, outcome.err) == (2, "engram: --probe measures the disks under a bundle; name one\n")


def test_each_finding_is_a_line_with_its_mend_below() -> None:
    findings = [Finding("page size", "ok", "4.0 KiB"), Finding("disk", "warn", "sda turns", "measure it")]
    assert report(findings) == (
        "\x1b[32mok  \x1b[0m  page size  4.0 KiB\n\x1b[33mwarn\x1b[0m  disk       sda turns\n"
        "                 measure it"
    )


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_gets_colours_unless_told_otherwise(environment: dict[str, str | None], coloured: bool) -> None:
    result = CliRunner().invoke(doctor, env={"NO_COLOR": None} | environment, color=True)
    assert ("\x1b[32mok" in result.output) == coloured


def test_the_last_clause_of_an_error_is_its_mend() -> None:
    assert Finding.of_error("x", BundleError("a is gone; b too; export it")) == Finding(
        "x", "fail", "a is gone; b too", "export it"
    )
    assert Finding.of_error("x", BundleError("a is gone")) == Finding("x", "fail", "a is gone")
