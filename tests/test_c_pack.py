"""Packed C programs say what the Python runtime says on the portable kernels: natively, on RISC-V and on 32-bit Arm."""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.c_programs import BUILD_S, SANITIZED, run, zig
from tests.conftest import Command
from tests.tiny import TinyModel, TinySite
from tests.tiny_families import FAMILIES
from tests.tiny_gemma import save_gemma
from tests.workshop import Workshop, copy_folder, files_of, open_session, random_ids

from engram_compilers.c.pack import PackedC, end_ids, pack_c
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError
from engram_runtime.generation import decode_tokens
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_targets import CProfile, load_profile

PROMPTS = [random_ids(count, count) for count in (1, 5, 16, 39)]
ANSWER = 24
GENERATED = (
    "-pedantic",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-psabi",
)  # vectors are passed between static functions only
NATIVE = ("gcc",)
OTHERS = {"riscv64": ("riscv64-linux-musl", "qemu-riscv64-static"), "arm": ("arm-linux-musleabihf", "qemu-arm-static")}


def c_profile() -> CProfile:
    profile = load_profile("c-portable")
    assert isinstance(profile, CProfile)
    return profile


def packed(bundle: Bundle, folder: Path) -> Path:
    """Pack a bundle into a new folder."""
    folder.mkdir()
    pack_c(bundle, c_profile(), folder)
    return folder


def make(folder: Path, compiler: Sequence[str], *flags: str, static: bool = False) -> Path:
    """Build a packed folder's program as its user does."""
    variables = [f"CC={' '.join(compiler)}", f"CFLAGS={' '.join(flags)}", f"LDFLAGS={'-static' if static else ''}"]
    subprocess.run(["make", "-s", "-C", folder, "clean", "engram", *variables], check=True, timeout=2 * BUILD_S)
    return folder / "engram"


def python_answer(bundle: Bundle, prompt: Sequence[int], count: int = ANSWER) -> list[int]:
    """Return what the compiled bundle goes on with, to its end ids."""
    with open_session(bundle, "tvm") as session:
        sample = make_sampler(SamplingOptions())
        logits = session.prefill(prompt)
        return list(decode_tokens(session, logits, sample, max_tokens=count, end_ids=end_ids(bundle)))


def c_answer(program: Sequence[str | Path], folder: Path, prompt: Sequence[int], count: int = ANSWER) -> list[int]:
    """Return what a program goes on with."""
    code, printed, said = run([*program, "-d", folder, "-n", str(count), *map(str, prompt)])
    assert (code, said) == (0, "")
    return list(map(int, printed.split()))


@pytest.fixture(scope="module")
def bundle(workshop: Workshop) -> Bundle:
    """Return an int8 bundle with a site, and a library of portable kernels."""
    return workshop.compiled(workshop.uncompiled())


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(bundle, tmp_path_factory.mktemp("packed") / "c")


def assert_same_answers(bundle: Bundle, program: Sequence[str | Path], folder: Path) -> None:
    """Compare answers to prompts of all lengths, which are cut into passes of 16 and of 1."""
    expected = [python_answer(bundle, prompt) for prompt in PROMPTS]
    assert [c_answer(program, folder, prompt) for prompt in PROMPTS] == expected


def test_a_packed_program_says_what_python_says(bundle: Bundle, folder: Path) -> None:
    assert_same_answers(bundle, [make(folder, NATIVE, "-O2", *GENERATED)], folder)


def test_a_packed_program_does_nothing_undefined(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "c")
    program = make(tmp_path / "c", ("gcc", *SANITIZED), "-O1", "-Wno-psabi")
    assert_same_answers(bundle, [program], folder)


@pytest.mark.parametrize("name", OTHERS)
def test_a_packed_program_says_the_same_on_other_machines(
    name: str, bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    triple, emulator = OTHERS[name]
    if shutil.which(emulator) is None:
        pytest.skip(f"no {emulator}: apt-get install qemu-user-static")
    shutil.copytree(folder, tmp_path / "c")
    program = make(tmp_path / "c", zig(triple), "-O2", static=True)
    assert_same_answers(bundle, [emulator, program], folder)


@pytest.mark.parametrize("name", ["qwen4_exp", pytest.param("mixtral", marks=pytest.mark.exhaustive)])
def test_families_with_experts_and_recurrent_states_are_packed(name: str, workshop: Workshop, tmp_path: Path) -> None:
    assert_packs(workshop.bundle(workshop.family(FAMILIES[name][0]), quant="int8"), workshop, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("quant", ["none", "int4"])
def test_floats_and_int4_are_packed(quant: str, workshop: Workshop, tmp_path: Path) -> None:
    assert_packs(workshop.bundle(workshop.checkpoint(TinyModel(), TinySite()), quant=quant), workshop, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_tables_of_tokens_are_packed(name: str, workshop: Workshop, tmp_path: Path) -> None:
    assert_packs(workshop.bundle(save_gemma(tmp_path / "gemma", name), quant="int8"), workshop, tmp_path)


def assert_packs(plain: Bundle, workshop: Workshop, tmp_path: Path) -> None:
    """Pack, build and run a bundle."""
    folder = packed(plain, tmp_path / "c")
    assert_same_answers(workshop.compiled(plain), [make(folder, NATIVE, "-O2", *GENERATED)], folder)


def test_tables_read_in_place_are_copied_into_the_folder(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.checkpoint(TinyModel(), TinySite())
    referring = workshop.bundle(checkpoint, quant="int8", tables="reference")
    assert any(rows.external for table in referring.manifest.tables for rows in table.ranges)
    folder = packed(referring, tmp_path / "c")
    assert_same_answers(workshop.compiled(referring), [make(folder, NATIVE, "-O1")], folder)


def sources_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a packed folder without what was built of them."""
    built = {"engram", "libengram.a"}
    return {name: data for name, data in files_of(folder).items() if name not in built and not name.endswith(".o")}


def test_the_same_bundle_gives_the_same_folder(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    assert files_of(packed(bundle, tmp_path / "c")) == sources_of(folder)


def test_what_was_packed_is_counted(bundle: Bundle, tmp_path: Path) -> None:
    steps: list[str] = []
    result = pack_c(bundle, c_profile(), tmp_path, steps.append)
    files = {name: len(data) for name, data in files_of(tmp_path).items()}
    assert result == PackedC(
        source_bytes=sum(size for name, size in files.items() if name.endswith((".c", ".h", "Makefile"))),
        weights_bytes=files["weights.bin"],
        table_bytes=sum(size for name, size in files.items() if name.startswith("tables/")),
        state_bytes=result.state_bytes,
    )
    assert steps == ["copying tables", "packing weights and generating C"]


def test_a_damaged_table_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    damaged = copy_folder(workshop.uncompiled().path, tmp_path / "bundle")
    (table,) = damaged.glob("tables/*.safetensors")
    content = table.read_bytes()
    table.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=rf"^tables/{table.name} has SHA-256 \w+, the manifest says \w+; exp"):
        packed(Bundle.open(damaged), tmp_path / "c")


def test_ids_beyond_32_bits_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    (table,) = bundle.manifest.tables
    wide = dataclasses.replace(table, keyer=dataclasses.replace(table.keyer, multipliers=(1, 1, 1), pad_id=2**31))
    manifest = dataclasses.replace(bundle.manifest, tables=(wide,))
    with pytest.raises(BundleError) as raised:
        packed(dataclasses.replace(bundle, manifest=manifest), tmp_path / "c")
    assert str(raised.value) == f"keyer of table {table.site} has id {2**31}, C programs take ids up to {2**31 - 1}"


def test_generated_constants_hold_no_path_of_this_machine(folder: Path) -> None:
    text = "".join(path.read_text() for path in [*folder.glob("*.c"), *folder.glob("*.h")])
    assert str(folder.parent) not in text
    assert re.findall(r'\.path = "([^"]*)"', text)[0] == "weights.bin"


def test_the_command_packs_for_a_c_target(bundle: Bundle, folder: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "program"
    done = command("engram", "pack", bundle.path, "--target", "c-portable", "-o", out)
    files = files_of(out)
    assert (done.code, done.err) == (0, "copying tables ...\npacking weights and generating C ...\n")
    sizes = rf"sources [\d.]+ MB, weights {len(files['weights.bin']) / 1e6:.1f} MB, tables [\d.]+ MB; [\d.]+ MB in all"
    assert re.fullmatch(rf"{out}: {sizes}\n", done.out)
    assert files == {**sources_of(folder), "pack.json": b'{\n "target": "c-portable"\n}\n'}


@pytest.mark.parametrize("option", [["--wheels"], ["--with-graph"], ["--python", "3.11"]])
def test_options_of_folders_with_python_are_refused(
    option: list[str], workshop: Workshop, command: Command, tmp_path: Path
) -> None:
    path = workshop.uncompiled().path
    done = command("engram", "pack", path, "--target", "c-portable", "-o", tmp_path / "program", *option)
    assert done.code == 3
    assert done.err == "engram: target c-portable takes no --with-graph, --wheels or --python: it is packed as C\n"
    assert not (tmp_path / "program").exists()
