"""Packed C programs say what the Python runtime says on the portable kernels: natively, on RISC-V and on 32-bit Arm."""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import pytest
from tests.c_programs import BUILD_S, SANITIZED, run, zig
from tests.conftest import Command
from tests.tiny import TinyModel, TinySite
from tests.tiny_families import FAMILIES
from tests.tiny_gemma import save_gemma
from tests.workshop import Workshop, copy_folder, files_of, open_session, random_ids

from engram_compilers.c.pack import copy_tables, end_ids, pack_c
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError
from engram_runtime.generation import decode_tokens
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_targets import CProfile, load_profile

PROMPTS = [random_ids(count, count) for count in (1, 5, 8, 15)]
ANSWER = 12
WARNINGS = ("-pedantic", "-Wall", "-Wextra", "-Werror")
OTHERS = {"riscv64": ("riscv64-linux-musl", "qemu-riscv64-static"), "arm": ("arm-linux-musleabihf", "qemu-arm-static")}


def c_profile() -> CProfile:
    """Return a profile whose programs have passes of 1 and of 4 tokens, which are quick to compile."""
    profile = load_profile("c-portable")
    assert isinstance(profile, CProfile)
    return dataclasses.replace(profile, prefill_tokens=(4,))


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
    return workshop.ready()


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what is packed of it, with nothing built."""
    return packed(bundle, tmp_path_factory.mktemp("packed") / "c")


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> list[list[int]]:
    """Return what Python goes on with after each prompt."""
    return [python_answer(bundle, prompt) for prompt in PROMPTS]


def c_answers(program: Sequence[str | Path], folder: Path) -> list[list[int]]:
    """Return what a program goes on with after each prompt, which is cut into passes of 4 and of 1."""
    return [c_answer(program, folder, prompt) for prompt in PROMPTS]


def test_a_packed_program_says_what_python_says_and_does_nothing_undefined(
    expected: list[list[int]], folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "c")
    program = make(tmp_path / "c", ("gcc", *SANITIZED), "-O0", *WARNINGS)
    assert c_answers([program], folder) == expected


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OTHERS)
def test_a_packed_program_says_the_same_on_other_machines(
    name: str, expected: list[list[int]], folder: Path, tmp_path: Path
) -> None:
    triple, emulator = OTHERS[name]
    if shutil.which(emulator) is None:
        pytest.skip(f"no {emulator}: apt-get install qemu-user-static")
    shutil.copytree(folder, tmp_path / "c")
    program = make(tmp_path / "c", zig(triple), "-O1", static=True)
    assert c_answers([emulator, program], folder) == expected


@pytest.mark.exhaustive
def test_the_command_packs_the_same_again(bundle: Bundle, folder: Path, command: Command, tmp_path: Path) -> None:
    out, profile = tmp_path / "program", tmp_path / "small.toml"
    shipped = (resources.files("engram_targets") / "profiles" / "c-portable.toml").read_text(encoding="utf-8")
    profile.write_text(shipped.replace("prefill_tokens = [16]", "prefill_tokens = [4]"))
    done = command("engram", "pack", bundle.path, "--target", profile, "-o", out)
    files = files_of(out)
    assert (done.code, done.err) == (0, "copying tables ...\npacking weights and generating C ...\n")
    sizes = [
        sum(len(data) for name, data in files.items() if name.endswith((".c", ".h", "Makefile"))),
        len(files["weights.bin"]),
        sum(len(data) for name, data in files.items() if name.startswith("tables/")),
        sum(map(len, files.values())),
    ]
    shown = "sources {:.1f} MB, weights {:.1f} MB, tables {:.1f} MB; {:.1f} MB in all"
    assert done.out == f"{out}: {shown.format(*(size / 1e6 for size in sizes))}\n"
    assert files == {**files_of(folder), "pack.json": b'{\n "target": "small"\n}\n'}


@pytest.mark.parametrize("option", [["--wheels"], ["--with-graph"], ["--python", "3.11"]])
def test_options_of_folders_with_python_are_refused(
    option: list[str], workshop: Workshop, command: Command, tmp_path: Path
) -> None:
    path = workshop.uncompiled().path
    done = command("engram", "pack", path, "--target", "c-portable", "-o", tmp_path / "program", *option)
    assert done.code == 2
    assert done.err == "engram: target c-portable takes no --with-graph, --wheels or --python: it is packed as C\n"
    assert not (tmp_path / "program").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["qwen4_exp", "mixtral"])
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


@pytest.mark.exhaustive
def test_tables_read_in_place_are_packed(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.checkpoint(TinyModel(), TinySite())
    assert_packs(workshop.bundle(checkpoint, quant="int8", tables="reference"), workshop, tmp_path)


def assert_packs(plain: Bundle, workshop: Workshop, tmp_path: Path) -> None:
    """Pack, build and run a bundle."""
    folder = packed(plain, tmp_path / "c")
    compiled = workshop.compiled(plain)
    program = make(folder, ("gcc",), "-O2", *WARNINGS)
    assert c_answers([program], folder) == [python_answer(compiled, prompt) for prompt in PROMPTS]


def test_tables_outside_the_bundle_come_along(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = workshop.checkpoint(TinyModel(), TinySite())
    bundle = workshop.bundle(checkpoint, quant="int8", tables="reference")
    places, files = copy_tables(bundle, tmp_path)
    outside = {Path(name): place for (name, identity), place in places.items() if identity is not None}
    assert outside
    for source, place in outside.items():
        file = files[place - 1]
        assert file.path == f"tables/{place:03d}-{source.name}"
        assert (tmp_path / file.path).read_bytes() == source.read_bytes()


def test_a_damaged_table_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    damaged = copy_folder(workshop.uncompiled().path, tmp_path / "bundle")
    (table,) = damaged.glob("tables/*.safetensors")
    content = table.read_bytes()
    table.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=rf"^tables/{table.name} has SHA-256 \w+, the manifest says \w+; exp"):
        packed(Bundle.open(damaged), tmp_path / "c")


def test_ids_beyond_32_bits_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    bundle = workshop.uncompiled()
    (table,) = bundle.manifest.tables
    assert isinstance(table.keyer, NgramKeyerSpec)
    wide = dataclasses.replace(table, keyer=dataclasses.replace(table.keyer, multipliers=(1, 1, 1), pad_id=2**31))
    manifest = dataclasses.replace(bundle.manifest, tables=(wide,))
    with pytest.raises(BundleError) as raised:
        packed(dataclasses.replace(bundle, manifest=manifest), tmp_path / "c")
    assert str(raised.value) == f"keyer of table {table.site} has id {2**31}, C programs take ids up to {2**31 - 1}"


def test_generated_constants_hold_no_path_of_this_machine(folder: Path) -> None:
    text = "".join(path.read_text() for path in [*folder.glob("*.c"), *folder.glob("*.h")])
    assert str(folder.parent) not in text
    assert re.findall(r'\.path = "([^"]*)"', text)[0] == "weights.bin"
