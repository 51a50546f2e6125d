"""Block sizes that are measured: they change no bit, are kept by machine, and used where they were faster twice."""

import json
import types
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.conftest import Command
from tests.test_kernels import call, compile_kernels
from tests.workshop import Workshop, copy_folder, tiny_profile

from engram_compilers.kernels import amx, avx2, avx512_vnni, portable
from engram_compilers.kernels.packing import GROUP
from engram_compilers.kernels.quantise import quantise_rows_numpy
from engram_compilers.tuning import search, store
from engram_compilers.tuning.blocks import blocked, own_sums, tunable, with_sums
from engram_compilers.tuning.search import Candidate, judged, sums_to_try
from engram_compilers.tuning.sizes import OWN_BLOCKS, Blocks, BlockSize, Measured
from engram_runtime.errors import CompileError
from engram_targets import cpu_profile_names, load_cpu_profile

OUTPUTS, INPUTS = 41, 96  # two whole tiles and one of 9 outputs
FAMILIES = [avx512_vnni, avx2]
NATIVE = load_cpu_profile("native")
OWN, FASTER = (BlockSize(kind="int8", rows=2, sums=sums) for sums in (16, 24))
TINY = tiny_profile(decode_tokens=(1,), prefill_tokens=())
needs_blocks = pytest.mark.skipif(NATIVE.kernels in ("amx", "portable"), reason="this machine's kernels have no blocks")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a test a folder of its own for a user's caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def timed(size: BlockSize, seconds: Sequence[float]) -> Candidate:
    return Candidate(size, lambda: None, seconds=list(seconds))


def packed(family: types.ModuleType, kind: str) -> list[NDArray[Any]]:
    rng = np.random.default_rng(4)
    if kind == "int8":
        return list(family.pack_int8(rng.integers(0, 256, (OUTPUTS, INPUTS), np.uint8)).values())
    codes = rng.integers(0, 16, (OUTPUTS, INPUTS), np.uint8)
    groups = rng.integers(1, 8, (OUTPUTS, INPUTS // GROUP), np.uint8)
    return list(family.pack_int4(codes, groups, groups).values())


@needs_blocks
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 7])
def test_no_bit_depends_on_block_sizes(kind: str, rows: int) -> None:
    family = search._family(NATIVE)
    builder = tunable(family)[kind]
    made = {sums: with_sums(builder, sums)(rows, OUTPUTS, INPUTS, 2) for sums in sums_to_try(own_sums(builder))}
    kernels = compile_kernels(made, NATIVE.llvm.mcpu)
    x = np.random.default_rng(5).normal(size=(rows, INPUTS)).astype(np.float32)
    scale = np.random.default_rng(6).normal(size=OUTPUTS).astype(np.float32)
    arguments: list[NDArray[Any]] = [
        *quantise_rows_numpy(x, 2),
        *packed(family, kind),
        scale,
        np.zeros((rows, OUTPUTS), np.float32),
    ]
    results = {call(kernel, *arguments)[-1].tobytes() for kernel in kernels.values()}
    assert len(kernels) > 1
    assert len(results) == 1
    assert np.frombuffer(results.pop(), np.float32).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_block_sizes_it_is_given_where_it_is_given_some(family: types.ModuleType) -> None:
    sizes = (BlockSize(kind="int8", rows=2, sums=2),)
    made = blocked(family, Blocks(source="a test", sizes=sizes))
    own, given = tunable(family)["int8"], with_sums(tunable(family)["int8"], 2)
    for rows, expected in ((1, own), (2, given)):
        assert str(made.linear_int8(rows, 64, 64, 2)) == str(expected(rows, 64, 64, 2))
    assert str(made.linear_int4(2, 64, 64, 2)) == str(family.linear_int4(2, 64, 64, 2))
    assert str(given(2, 64, 64, 2)) != str(own(2, 64, 64, 2))
    assert made.pack_int8 is family.pack_int8


def test_a_family_without_measured_blocks_is_itself() -> None:
    assert blocked(avx2, OWN_BLOCKS) is avx2


@pytest.mark.parametrize("family", [portable, amx])
def test_families_without_sums_have_nothing_to_choose(family: types.ModuleType) -> None:
    assert tunable(family) == {}


def test_a_familys_own_sums_are_tried_first() -> None:
    assert sums_to_try(16) == [16, 4, 8, 12, 20, 24]
    assert sums_to_try(6) == [6, 2, 4, 8]


@pytest.mark.parametrize(
    ("own", "other", "pays"),
    [
        ([10, 10, 10, 10], [9, 9, 9, 9], True),
        ([10, 10, 10, 10], [9, 10, 9, 10], False),
        ([10, 10, 50, 50], [9, 9, 90, 90], True),
        ([10, 10, 10, 10], [9.8, 9.8, 9.8, 9.8], False),
        ([10, 10, 10, 10], [11, 11, 11, 11], False),
    ],
)
def test_what_is_faster_twice_pays(own: list[float], other: list[float], pays: bool) -> None:
    found = judged([timed(OWN, own), timed(FASTER, other)])
    assert found.pays == pays
    assert found.best == min(((min(own), OWN), (min(other), FASTER)), key=lambda pair: pair[0])[1]


def test_candidates_are_timed_in_turn() -> None:
    order: list[str] = []
    candidates = [Candidate(size, partial(order.append, name)) for size, name in ((OWN, "a"), (FASTER, "b"))]
    search.measure(candidates, ends=0)
    assert [len(candidate.seconds) for candidate in candidates] == [search.LEAST_ROUNDS] * 2
    turns = [name for name, _ in groupby(order)]
    assert turns == ["a", "b"] * (1 + search.LEAST_ROUNDS)  # to warm up, and in each round


def test_sizes_are_found_again() -> None:
    assert store.kept_blocks(NATIVE) == OWN_BLOCKS
    path = store.keep(NATIVE, (FASTER,))
    assert path == store.place_of(NATIVE)
    assert store.kept_blocks(NATIVE) == Blocks(source=f"engram tune {store.digest_of(NATIVE)}", sizes=(FASTER,))
    store.keep(NATIVE, ())
    assert store.kept_blocks(NATIVE) == OWN_BLOCKS


def test_sizes_of_another_processor_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    store.keep(NATIVE, (FASTER,))
    monkeypatch.setattr(store, "cpu_name", lambda: "another one")
    assert store.kept_blocks(NATIVE) == OWN_BLOCKS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"version": 2, "sizes": []}', "block sizes have version 2, this version reads 1"),
        (
            '{"version": 1, "sizes": [{"kind": "int8", "rows": 1, "sums": 9999}]}',
            "block size BlockSize(kind='int8', rows=1, sums=9999) can't be",
        ),
        ("[]", "{path} holds a JSON list, expected an object"),
    ],
)
def test_damaged_sizes_are_refused(content: str, expected: str) -> None:
    path = store.keep(NATIVE, ())
    path.write_text(content)
    with pytest.raises(CompileError) as caught:
        store.kept_blocks(NATIVE)
    advice = f"delete it or run: engram tune --target {NATIVE.name}"
    assert str(caught.value) == f"{expected.format(path=path)}; {advice}"


def test_a_user_without_a_folder_for_caches_has_kept_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder() -> Path:
        raise OSError

    monkeypatch.setattr(store, "cache_folder", no_folder)
    assert store.kept_blocks(NATIVE) == OWN_BLOCKS


@needs_blocks
def test_a_bundle_is_compiled_with_what_was_measured(
    workshop: Workshop, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_compilers.cli.load_profile", {"native": TINY}.__getitem__)
    bundle = copy_folder(workshop.uncompiled().path, tmp_path / "bundle")
    store.keep(TINY, (BlockSize(kind="int8", rows=1, sums=4),))
    result = command("engram", "compile", bundle)
    assert result.code == 0
    assert result.err.splitlines()[0] == "using 1 block sizes that engram tune measured on this machine"
    described = json.loads((bundle / "lib" / TINY.name / "compile.json").read_text())
    assert described["compiler"].endswith(f", block sizes of engram tune {store.digest_of(TINY)}")


@needs_blocks
def test_a_kernel_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "COLD_BYTES", 1)
    (found,) = search.search(TINY, [("int4", 1)], 0.01)
    assert (found.own.kind, found.own.rows) == ("int4", 1)
    assert found.own.sums == own_sums(tunable(search._family(TINY))["int4"])
    assert found.own_us > 0


def told(monkeypatch: pytest.MonkeyPatch, *measured: Measured) -> None:
    kernels = [(each.own.kind, each.own.rows) for each in measured]
    monkeypatch.setattr(search, "tuned_kernels", lambda profile: kernels)
    monkeypatch.setattr(search, "search", lambda profile, kernels, seconds: iter(measured))


def measured(own_us: float, best_us: float, *, pays: bool) -> Measured:
    return Measured(own=OWN, best=FASTER, own_us=own_us, best_us=best_us, pays=pays)


def test_what_pays_is_kept_and_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, measured(10, 9, pays=True), measured(10, 9.75, pays=False))
    lines = command("engram", "tune").out.splitlines()
    assert lines == [
        "      kernel  own sums       us  best sums       us   gain",
        "    int8 M=2        16     10.0         24      9.0  10.0% kept",
        "    int8 M=2        16     10.0         24      9.8   2.5%",
        "1 of 2 kernels are up to 10.0% faster, the others within 2.5% of the best; "
        f"engram compile --target {NATIVE.name} uses that on this machine",
    ]
    assert store.kept_blocks(NATIVE).sizes == (FASTER,)


def test_where_nothing_pays_it_says_so(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, measured(10, 9.8, pays=False))
    assert command("engram", "tune").out.splitlines()[-1] == (
        "the kernels' own block sizes are within 2.0% of the best that were tried, and stay"
    )
    found = command("engram", "tune", "--json").json
    assert found["kept"] == str(store.place_of(NATIVE))
    assert [(kernel["gain"], kernel["pays"]) for kernel in found["kernels"]] == [(0.02, False)]
    assert store.kept_blocks(NATIVE) == OWN_BLOCKS


def test_time_that_runs_out_is_told(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, measured(10, 10, pays=False))
    monkeypatch.setattr(search, "tuned_kernels", lambda profile: [("int8", 2), ("int8", 4)])
    assert command("engram", "tune").out.endswith("and stay; time ran out before 1 of 2\n")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("opencl", "target opencl is of device 'gpu', kernels of processors alone are tuned"),
        ("riscv64-rvv", "target riscv64-rvv can't be tuned here: it is for riscv64, this machine is x86_64"),
        ("x86-64-v2", "target x86-64-v2 has kernels portable, of which no block size can be chosen"),
    ],
)
@pytest.mark.skipif(
    "x86-64-v2" not in cpu_profile_names() or NATIVE.machine != "x86_64", reason="this is no x86 machine"
)
def test_a_target_that_cannot_be_tuned_is_refused(command: Command, target: str, expected: str) -> None:
    result = command("engram", "tune", "--target", target)
    assert (result.code, result.err) == (4, f"engram: {expected}\n")
