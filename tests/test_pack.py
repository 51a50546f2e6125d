"""Packed folders: a box with the packages they name runs them to the tokens of the bundle, or says what is wrong."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tests import qemu_aarch64
from tests.boxes import Box, add_site, make_box
from tests.conftest import Command
from tests.qemu_aarch64 import Arm64Box, download_root, install, missing
from tests.tiny import TinyModel, TinySite
from tests.workshop import THREADS, Workshop, copy_folder, files_of, random_ids, tiny_profile

from engram_compilers.build import compile_bundle
from engram_compilers.pack import packages
from engram_compilers.pack.bundle_copy import copy_bundle, link_or_copy
from engram_compilers.pack.cli import packed_targets
from engram_compilers.pack.folder import PackOptions, newest_glibc, pack_cpu
from engram_compilers.pack.library import current_library, ready_library
from engram_compilers.pack.packages import MODULES, Wheel, find_wheels, requirements
from engram_runtime import LLM, Bundle
from engram_runtime.bundle import sealed
from engram_runtime.cpu import machine
from engram_runtime.errors import BundleError, CompileError, RequestError, TargetError
from engram_runtime.new_folder import new_folder
from engram_runtime.tables.checksums import write_checksums
from engram_targets import CpuProfile, load_cpu_profile

pytestmark = pytest.mark.slow

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OPTIONS = PackOptions(with_graph=False, with_wheels=False, pythons=(PYTHON,))
PROMPT = "The tide comes in"
DIGEST = "5" * 64
MEND = "copy the packed folder here again"
# Runs the command and prints the packages it has imported as the last line.
IMPORTED = """
import runpy, sys
sys.argv = ["engram", *{arguments!r}]
try:
    runpy.run_path("engram", run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
roots = {{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names - {{"__main__"}}
print(sorted(root for root in roots if not root.startswith(("_cython_", "cython_runtime"))))
"""

# Prints the digest of the logits of ids and the tokens after a prompt, as JSON.
COMPUTED = """
import hashlib, json, sys
sys.path[:0] = ["python", "site"]
from engram_runtime import LLM
with LLM("bundle", threads={threads}) as llm:
    digest = hashlib.sha256(llm.logits({ids}).tobytes()).hexdigest()
    print(json.dumps([digest, list(llm.generate({prompt!r}, max_tokens=24).token_ids)]))
"""
EMULATED = {"aarch64-dotprod": "cortex-a76", "aarch64-i8mm": "max", "aarch64-i8mm-sve": "max"}
ARM_TARGETS = [
    "aarch64-dotprod",
    pytest.param("aarch64-i8mm", marks=pytest.mark.exhaustive),
    pytest.param("aarch64-i8mm-sve", marks=pytest.mark.exhaustive),
]
DEMO = Path(__file__).parents[1] / "build" / "demo.engram"

Facts = dict[str, Any]


def quick_profile(**changes: Any) -> CpuProfile:
    """Return this machine's profile with the fewest forward passes."""
    return tiny_profile(decode_tokens=(1,), prefill_tokens=(8,), **changes)


@dataclass(frozen=True)
class Packing:
    """A bundle that was not compiled before it was packed, the folder, and the steps that were told."""

    bundle: Bundle
    folder: Path
    steps: Sequence[str]


@pytest.fixture(scope="module")
def packing(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Packing:
    """Pack a tiny bundle for this machine."""
    home = tmp_path_factory.mktemp("packing")
    bundle = Bundle.open(copy_folder(workshop.uncompiled().path, home / "bundle"))
    steps: list[str] = []
    (home / "packed").mkdir()
    pack_cpu(bundle, quick_profile(), OPTIONS, home / "packed", steps.append)
    add_site(home / "packed")
    return Packing(bundle, home / "packed", steps)


@pytest.fixture(scope="module")
def packed(packing: Packing) -> Path:
    """Return a packed folder, with the packages it names."""
    return packing.folder


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Box:
    """Make a Python without any packages."""
    return make_box(tmp_path_factory.mktemp("box"))


@pytest.fixture(scope="module")
def arm64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the files of an arm64 Linux."""
    home = tmp_path_factory.mktemp("arm64")
    if (reason := missing() or download_root(home)) is not None:
        pytest.skip(reason)
    return home / "root"


def pack_for_arm(bundle: Bundle, profile: CpuProfile, home: Path) -> Path:
    """Pack a copy of a bundle with the packages it names, for an arm64 Linux."""
    copy, folder = Bundle.open(copy_folder(bundle.path, home / "copy")), home / "packed"
    folder.mkdir()
    pack_cpu(copy, profile, PackOptions(with_graph=False, with_wheels=False, pythons=(qemu_aarch64.PYTHON,)), folder)
    install(folder)
    return folder


@dataclass(frozen=True)
class ArmPacking:
    """A folder packed for a profile, and a processor that it fits."""

    profile: CpuProfile
    folder: Path
    processor: str


@pytest.fixture(scope="module", params=ARM_TARGETS)
def packed_for_arm(
    request: pytest.FixtureRequest, arm64: Path, packing: Packing, tmp_path_factory: pytest.TempPathFactory
) -> ArmPacking:
    """Pack the tiny bundle for an Arm processor."""
    target = request.param
    profile = dataclasses.replace(load_cpu_profile(target), decode_tokens=(1,), prefill_tokens=(8,))
    return ArmPacking(profile, pack_for_arm(packing.bundle, profile, tmp_path_factory.mktemp(target)), EMULATED[target])


@pytest.fixture
def damaged(packed: Path, tmp_path: Path) -> Path:
    """Return a copy of the packed folder whose files are its own."""
    return Path(shutil.copytree(packed, tmp_path / "packed", symlinks=True))


def edit(path: Path, change: Callable[[Facts], None]) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def test_a_box_prints_the_tokens_of_the_bundle(packing: Packing, box: Box) -> None:
    done = box.run(packing.folder, "run", "bundle", PROMPT, "--max-tokens", 24, "--json")
    with LLM(packing.bundle.path, threads=THREADS) as llm:
        expected = llm.generate(PROMPT, max_tokens=24)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == list(expected.token_ids)


def test_a_box_of_somebody_else_runs_what_was_trusted_there(
    packing: Packing, box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    line = ("run", "bundle", PROMPT, "--max-tokens", "2", "--json")
    refused = box.run(packing.folder, *line)
    folder = Path("bundle", "lib", quick_profile().name)
    assert (refused.returncode, refused.stdout, refused.stderr) == (
        4,
        "",
        f"engram: library {folder} was neither compiled by this user here nor signed by a key that is trusted here; if "
        f"you trust who packed it, run: engram trust bundle --target {quick_profile().name}\n",
    )
    digest = hashlib.sha256((packing.folder / folder / "compile.json").read_bytes()).hexdigest()
    trusted = box.run(packing.folder, "trust", "bundle", "--sha256", digest)
    assert (trusted.returncode, trusted.stdout) == (0, f"{folder} is trusted: {digest}\n")
    done = box.run(packing.folder, *line)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 2


def test_running_imports_nothing_but_the_named_packages(packed: Path, box: Box) -> None:
    done = box.run(packed, "-c", IMPORTED.format(arguments=["run", "bundle", PROMPT, "--max-tokens", "4"]))
    assert done.returncode == 0, done.stderr
    found = set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))
    assert found <= {"engram_runtime", *MODULES.values()}
    assert {"engram_runtime", "numpy", "tvm_ffi", "tokenizers", "click"} <= found


def test_a_box_verifies_every_file_and_golden_values(packed: Path, box: Box) -> None:
    done = box.run(packed, "verify", "bundle", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["digests"], report["tables"], report["golden"]["argmax_agreement"]) == ("ok", "ok", 1.0)


def test_the_version_is_that_of_what_was_packed(packed: Path, box: Box) -> None:
    assert box.run(packed, "--version").stdout == f"engram, version {version('engram-edge')}\n"


def test_the_manifest_lists_what_is_there_and_what_was_left_out(packing: Packing) -> None:
    whole, bundle = packing.bundle.manifest, Bundle.open(packing.folder / "bundle")
    listed = {entry.path for entry in bundle.manifest.files}
    library = {f"lib/{quick_profile().name}/{name}" for name in files_of(bundle.path / "lib" / quick_profile().name)}
    assert files_of(bundle.path).keys() == {"engram.json", *listed, *library}
    assert {entry.path for entry in bundle.manifest.omitted} == whole.graph_files
    assert {*bundle.manifest.files, *bundle.manifest.omitted} == set(whole.files)


def test_graphs_come_along_when_asked_for(packing: Packing, tmp_path: Path) -> None:
    bundle = packing.bundle
    library, info = ready_library(bundle, quick_profile(), lambda step: None)
    assert copy_bundle(bundle, library, info, tmp_path, with_graph=True) == bundle.manifest
    assert Bundle.open(tmp_path).manifest == bundle.manifest


def test_rows_that_lie_outside_the_bundle_are_copied_into_it(
    packing: Packing, workshop: Workshop, tmp_path: Path
) -> None:
    checkpoint = copy_folder(workshop.checkpoint(TinyModel(), TinySite()), tmp_path / "checkpoint")
    bundle = workshop.bundle(checkpoint, quant="int8", tables="reference")
    assert all(rows.external for table in bundle.manifest.tables for rows in table.ranges)
    library, info = ready_library(packing.bundle, quick_profile(), lambda step: None)
    copy_bundle(bundle, library, info, tmp_path / "copy", with_graph=False)
    for path in checkpoint.iterdir():
        path.unlink()
    made = Bundle.open(tmp_path / "copy")
    made.verify_digests()
    for rows in (rows for table in made.manifest.tables for rows in table.ranges):
        assert rows.checksums is not None
        write_checksums(made.file(rows.file), tmp_path / "checksums")
        assert made.file(rows.checksums).read_bytes() == (tmp_path / "checksums").read_bytes()
    with LLM(tmp_path / "copy", threads=THREADS) as copy, LLM(packing.bundle.path, threads=THREADS) as llm:
        expected = llm.generate(PROMPT, max_tokens=24).token_ids
        assert copy.generate(PROMPT, max_tokens=24).token_ids == expected


def test_what_needs_the_graph_says_that_it_was_left_out(packed: Path, command: Command) -> None:
    bundle = packed / "bundle"
    wanted = (
        f"engram: bundle {bundle} was packed without graph/decoder.onnx, which this needs; use the bundle it was made "
        f"of, or pack that again with --with-graph\n"
    )
    run = command("engram", "run", bundle, PROMPT, "--executor", "onnxruntime")
    compiled = command("engram", "compile", bundle)
    assert (run.code, run.err) == (3, wanted)
    assert (compiled.code, compiled.err.splitlines()[-1]) == (3, wanted.strip())


def remove(path: Path) -> str:
    path.unlink()
    return f"{path} is missing; {MEND}"


def shorten(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1])
    size = path.stat().st_size
    return f"{path} holds {size} bytes, {size + 1} were packed; {MEND}"


def change(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-1] + b"\n#"[-1:])
    return f"{path} is not what was packed; {MEND}"


@pytest.mark.parametrize("spoil", [remove, shorten, change])
@pytest.mark.parametrize("name", ["python/engram_runtime/hashing.py", "bundle/engram.json", "{library}/model.so"])
def test_files_that_lack_or_changed_are_named(damaged: Path, box: Box, name: str, spoil: Callable[[Path], str]) -> None:
    sentence = spoil(damaged / name.format(library=f"bundle/lib/{quick_profile().name}"))
    done = box.run(damaged, "run", "bundle", PROMPT)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"engram: {sentence}\n")


@pytest.mark.parametrize("content", [None, b"", b'{"target": "x86', b"\xff"])
def test_a_folder_that_does_not_say_what_was_packed_is_refused(damaged: Path, box: Box, content: bytes | None) -> None:
    path = damaged / "pack.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    done = box.run(damaged, "--help")
    wanted = f"engram: {path} is missing or damaged; {MEND}\n"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", wanted)


def test_a_table_of_another_size_is_named(damaged: Path, box: Box) -> None:
    (table,) = (damaged / "bundle" / "tables").glob("*.safetensors")
    sentence = shorten(table)
    assert box.run(damaged, "run", "bundle", PROMPT).stderr == f"engram: {sentence}\n"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"machine": "s390x"},
            "this folder is for {target}, linux on s390x, this machine is linux on {machine}; pack the bundle for it: "
            "engram pack BUNDLE --target NAME",
        ),
        (
            {"pythons": ["3.98", "3.99"]},
            "this is Python {python}, the folder's packages are for 3.98 and 3.99; start it by one of those: "
            "python3.98 {folder}/engram",
        ),
        (
            {"modules": {"numpy": "numpy", "cornucopia": "cornucopia"}},
            "cornucopia can't be found; run, in {folder}: python3 -m pip install --no-deps --require-hashes --target "
            "site -r requirements.txt",
        ),
    ],
)
def test_a_box_that_does_not_fit_is_told_so(damaged: Path, box: Box, changes: Facts, sentence: str) -> None:
    edit(damaged / "pack.json", lambda facts: facts.update(changes))
    wanted = sentence.format(target=quick_profile().name, machine=machine(), python=PYTHON, folder=damaged)
    done = box.run(damaged, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (4, "", f"engram: {wanted}\n")


def test_packages_that_do_not_import_are_told(damaged: Path, box: Box) -> None:
    (damaged / "site" / "numpy").unlink()
    (damaged / "site" / "numpy").mkdir()
    (damaged / "site" / "numpy" / "__init__.py").write_text("raise ImportError('made for another Python\\nsorry')")
    done = box.run(damaged, "--help")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        f"engram: a package can't be imported: made for another Python; run, in {damaged}, by the Python that runs it: "
        f"python3 -m pip install --no-deps --require-hashes --target site -r requirements.txt\n"
    )


def test_overlays_say_what_they_need_beside(packed: Path, box: Box, tmp_path: Path) -> None:
    (tmp_path / "an.overlay").write_bytes(b"")
    done = box.run(packed, "run", "bundle", PROMPT, "--overlay", tmp_path / "an.overlay")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "engram: overlays need safetensors: pip install safetensors\n"


def test_a_packed_library_of_another_bundle_is_refused(packed: Path, command: Command, tmp_path: Path) -> None:
    bundle = copy_folder(packed / "bundle", tmp_path / "bundle")
    manifest = json.loads((bundle / "engram.json").read_text())
    manifest["omitted"][0]["sha256"] = DIGEST
    (bundle / "engram.json").write_bytes(sealed(manifest))
    done = command("engram", "run", bundle, PROMPT)
    assert (done.code, done.out) == (4, "")
    assert done.err == (
        f"engram: library {bundle}/lib/{quick_profile().name} was compiled from another graph than this bundle holds; "
        f"pack the bundle it was made of for this machine: engram pack BUNDLE --target NAME\n"
    )


def test_libraries_are_made_again_only_for_what_has_changed(packing: Packing) -> None:
    bundle, profile = packing.bundle, quick_profile()
    assert current_library(bundle, profile) is not None
    assert current_library(bundle, dataclasses.replace(profile, threads=3)) is None
    assert current_library(bundle, dataclasses.replace(profile, name="another")) is None
    (weights, *others) = (entry for entry in bundle.manifest.files if entry.path == bundle.manifest.decoder.weights)
    assert others == []
    rest = tuple(entry for entry in bundle.manifest.files if entry is not weights)
    changed = dataclasses.replace(bundle.manifest, files=(*rest, dataclasses.replace(weights, sha256=DIGEST)))
    assert current_library(Bundle(bundle.path, changed), profile) is None


def test_a_bundle_is_compiled_first_where_it_must_be(packing: Packing) -> None:
    again: list[str] = []
    ready_library(packing.bundle, quick_profile(), again.append)
    assert again == []
    assert [step for step in packing.steps if not step.startswith(("packing", "generating"))] == [
        f"compiling for {quick_profile().name}",
        f"looking up packages for Python {PYTHON}",
        "copying the bundle",
    ]


def test_a_library_that_was_damaged_is_not_packed(packing: Packing, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_folder(packing.bundle.path, tmp_path / "bundle"))
    library = bundle.path / "lib" / quick_profile().name / "model.so"
    library.write_bytes(library.read_bytes() + b"\0")
    with pytest.raises(TargetError) as caught:
        ready_library(bundle, quick_profile(), lambda step: None)
    assert str(caught.value) == f"{library} is not what was compiled; compile the bundle again"


def test_a_library_that_is_not_trusted_here_is_not_packed(
    packing: Packing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(TargetError) as caught:
        ready_library(packing.bundle, quick_profile(), lambda step: None)
    path, name = packing.bundle.path, quick_profile().name
    assert str(caught.value) == (
        f"library {path / 'lib' / name} was neither compiled by this user here nor signed by a key that is trusted "
        f"here; run: engram compile {path} --target {name} --rebuild, or, if you trust who made it: "
        f"engram trust {path} --target {name}"
    )


def test_machines_without_packages_are_refused(packing: Packing, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        pack_cpu(packing.bundle, quick_profile(name="mine", machine="riscv64"), OPTIONS, tmp_path)
    assert str(caught.value) == (
        "target mine is for linux on riscv64, which apache-tvm-ffi has no package for; pack for c-portable or for one "
        "of ['linux on x86_64', 'linux on aarch64', 'macos on arm64']"
    )


@pytest.mark.parametrize(("target", "device"), [("opencl", "gpu"), ("npu-systolic", "npu")])
def test_targets_that_nothing_is_packed_for_are_refused(
    packing: Packing, tmp_path: Path, command: Command, target: str, device: str
) -> None:
    done = command("engram", "pack", packing.bundle.path, "--target", target, "-o", tmp_path / "packed")
    assert (done.code, done.out) == (4, "")
    assert done.err == (
        f"engram: target {target} is of device {device!r}, which nothing is packed for; name one of "
        f"{packed_targets()}\n"
    )


def wheel(pin: str, digest: str) -> Wheel:
    return Wheel(pin=pin, sha256=digest)


def test_requirements_hold_every_wheel_of_a_package() -> None:
    found = {
        "3.11": [wheel("numpy==2.4.6", "a1"), wheel("click==8.5.1", "c")],
        "3.12": [wheel("numpy==2.4.6", "a2"), wheel("click==8.5.1", "c")],
    }
    assert requirements(found) == (
        "numpy==2.4.6 \\\n    --hash=sha256:a1 \\\n    --hash=sha256:a2\nclick==8.5.1 \\\n    --hash=sha256:c\n"
    )


def test_an_index_that_has_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CompileError) as caught:
        find_wheels(("linux_riscv64",), "3.11", ["numpy==2.4.6"])
    assert str(caught.value) == (
        "pip can't find wheels for linux_riscv64: No matching distribution found for numpy==2.4.6; mend that and pack "
        "again"
    )


def test_no_python_of_those_asked_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_wheels", lambda platforms, python, wanted: None)
    with pytest.raises(TargetError) as caught:
        packages.find_pythons(("linux_riscv64",), ("3.13", "3.14"), ["numpy==2.4.6", "click==8.5.1"])
    assert str(caught.value) == (
        "numpy==2.4.6, click==8.5.1 have no wheels for linux_riscv64 and Python 3.13 or 3.14; give another one by "
        "--python"
    )


def test_versions_of_python_that_lack_a_package_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"3.13": None, "3.14": [wheel("click==8.5.1", "c")]}
    monkeypatch.setattr(packages, "find_wheels", lambda platforms, python, wanted: found[python])
    complete = packages.find_pythons(("linux_riscv64",), ("3.13", "3.14"), ["click==8.5.1"])
    assert complete == {"3.14": found["3.14"]}


def test_the_oldest_fitting_c_library_is_read_from_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0GLIBC_2.9\0GLIBC_2.17\0GLIBCXX_3.4\0")
    (tmp_path / "b").write_bytes(b"\0GLIBC_2.4\0GLIBC_PRIVATE\0")
    assert newest_glibc(tmp_path / "a", tmp_path / "b") == "2.17"
    (tmp_path / "a").write_bytes(b"none")
    assert newest_glibc(tmp_path / "a") is None


def test_files_are_linked_or_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"rows")
    link_or_copy(tmp_path / "a", tmp_path / "there" / "b")
    assert (tmp_path / "there" / "b").samefile(tmp_path / "a")

    (tmp_path / "alias").symlink_to("a")
    link_or_copy(tmp_path / "alias", tmp_path / "there" / "d")
    assert not (tmp_path / "there" / "d").is_symlink()
    assert (tmp_path / "there" / "d").samefile(tmp_path / "a")

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"rows"
    assert not (tmp_path / "c").samefile(tmp_path / "a")


def test_the_command_packs_the_folder_it_names(
    packing: Packing, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_compilers.pack.cli.load_profile", lambda name: quick_profile())
    out = tmp_path / "packed"
    line = ("pack", packing.bundle.path, "-o", out, "--python", PYTHON)
    done = command("engram", *line, "--json")
    assert (done.code, done.err) == (0, f"looking up packages for Python {PYTHON} ...\ncopying the bundle ...\n")
    sizes = {name: len(content) for name, content in files_of(out).items()}
    parts = {
        part: sum(size for name, size in sizes.items() if name.startswith(f"{part}/")) for part in ("bundle", "python")
    }
    assert done.json == {
        "folder": str(out),
        "target": quick_profile().name,
        "bytes": sum(sizes.values()),
        "parts": parts,
        "library_sha256": hashlib.sha256(
            (out / "bundle" / "lib" / quick_profile().name / "compile.json").read_bytes()
        ).hexdigest(),
    }
    assert command("engram", *line).err == (
        f"engram: {out} is a packed folder already; replace it with --force or choose another place\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"packed"}


def test_a_readme_says_which_box_a_folder_is_for(packed: Path) -> None:
    text = (packed / "README.txt").read_text()
    assert text.startswith(f"checkpoint for {quick_profile().name}: {machine()} with ")
    assert f"\nNeeds Python {PYTHON} and glibc 2." in text
    assert len(text.splitlines()) == 11


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def write(text: str, *, fail: bool = False, replace: bool = True) -> None:
        with new_folder(out, "mark", "a marked folder", replace=replace) as folder:
            (folder / "mark").write_text(text)
            if fail:
                raise BundleError("no")

    with pytest.raises(BundleError):
        write("a", fail=True)
    assert list(tmp_path.iterdir()) == []
    write("b", replace=False)
    with pytest.raises(BundleError):
        write("c", fail=True)
    assert (out / "mark").read_text() == "b"
    write("d")
    assert files_of(tmp_path) == {"out/mark": b"d"}


def test_folders_that_were_not_packed_are_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught, new_folder(tmp_path, "mark", "a marked folder", replace=True):
        pass
    assert str(caught.value) == f"{tmp_path} exists and is not a marked folder; choose another place"


def test_an_emulated_arm_has_the_tokens_and_logits_of_this_machine(
    arm64: Path, packed_for_arm: ArmPacking, packing: Packing
) -> None:
    ids = random_ids(20)
    with LLM(packing.bundle.path, threads=THREADS) as llm:
        digest = hashlib.sha256(llm.logits(ids).tobytes()).hexdigest()
        tokens = list(llm.generate(PROMPT, max_tokens=24).token_ids)

    arguments = ["run", "bundle", PROMPT, "--max-tokens", "24", "--threads", "1", "--json"]
    program = IMPORTED.format(arguments=arguments) + COMPUTED.format(threads=2, ids=ids, prompt=PROMPT)
    ran = Arm64Box(arm64, packed_for_arm.processor).run(packed_for_arm.folder, "-c", program)
    assert ran.returncode == 0, ran.stderr
    made, imported, computed = ran.stdout.splitlines()
    assert json.loads(made)["token_ids"] == tokens
    # Debian's Python has a module sitecustomize.
    assert set(json.loads(imported.replace("'", '"'))) <= {"engram_runtime", "sitecustomize", *MODULES.values()}
    assert json.loads(computed) == [digest, tokens]


def test_an_older_arm_is_told_what_it_lacks(arm64: Path, packed_for_arm: ArmPacking) -> None:
    older = Arm64Box(arm64, "cortex-a72")
    lacking = sorted(set(packed_for_arm.profile.cpu_flags) - older.features)
    done = older.run(packed_for_arm.folder, "run", "bundle", PROMPT)
    assert (done.returncode, done.stdout, done.stderr) == (
        4,
        "",
        f"engram: no library of bundle bundle runs here: {packed_for_arm.profile.name} needs CPU features {lacking} "
        f"this machine lacks; pack the bundle it was made of for this machine: engram pack BUNDLE --target NAME\n",
    )


def test_another_machine_is_told_before_anything_is_imported(packed_for_arm: ArmPacking, box: Box) -> None:
    done = box.run(packed_for_arm.folder, "run", "bundle", PROMPT)
    assert (done.returncode, done.stdout, done.stderr) == (
        4,
        "",
        f"engram: this folder is for {packed_for_arm.profile.name}, linux on aarch64, this machine is linux on "
        f"{machine()}; pack the bundle for it: engram pack BUNDLE --target NAME\n",
    )


@pytest.mark.exhaustive
def test_an_emulated_arm_prints_the_text_of_the_demo(arm64: Path, tmp_path: Path) -> None:
    if not DEMO.is_dir():
        pytest.skip(f"no {DEMO}: make demo")
    folder = pack_for_arm(Bundle.open(DEMO), load_cpu_profile("aarch64-dotprod"), tmp_path)
    compile_bundle(Bundle.open(tmp_path / "copy"), load_cpu_profile("native"))
    with LLM(tmp_path / "copy") as llm:
        expected = llm.generate(PROMPT, max_tokens=32)
    ran = Arm64Box(arm64, "cortex-a76").run(folder, "run", "bundle", PROMPT, "--max-tokens", 32, "--json")
    assert ran.returncode == 0, ran.stderr
    made = json.loads(ran.stdout)
    assert (made["text"], made["token_ids"]) == (expected.text, list(expected.token_ids))
