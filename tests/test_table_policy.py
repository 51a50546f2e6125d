"""How tables are read: every branch of the decision with its sentence, over made-up machines and disks."""

import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.disks import VDA, flash_disk, slow_disk
from tests.workshop import Workshop

from engram_runtime import LLM
from engram_runtime.errors import RequestError
from engram_runtime.memory import FreeMemory
from engram_runtime.sizes import UNITS, format_size, parse_size
from engram_runtime.tables import opening, policy
from engram_runtime.tables.disk import DiskFacts
from engram_runtime.tables.opening import choose_stores
from engram_runtime.tables.options import TableOptions
from engram_runtime.tables.place import FUSE, MEMORY, NETWORK, REMOVABLE, Place
from engram_runtime.tables.policy import Room, TableChoice, TableFacts, choose, table_room

MIB, GIB = 1 << 20, 1 << 30
ROOM = Room(num_bytes=10 * GIB, words="half of the 20.0 GiB available", available=20 * GIB)
FLASH = flash_disk()
AUTO, RESIDENT = TableOptions(), TableOptions(io="resident")


def table(
    num_bytes: int, *, reads: int = 16, external: bool = False, leased: bool = True, place: Place = VDA
) -> TableFacts:
    return TableFacts(
        site="layer_1",
        num_bytes=num_bytes,
        reads=reads,
        external=external,
        leased=leased,
        path=Path("rows"),
        place=place,
    )


def on(kind: str, file_system: str) -> Place:
    return dataclasses.replace(VDA, kind=kind, file_system=file_system)


def flash(path: Path, place: Place) -> DiskFacts:
    return FLASH


def unmeasured(path: Path, place: Place) -> DiskFacts:
    raise AssertionError("the disk doesn't matter here")


def refused(path: Path, place: Place) -> DiskFacts:
    raise OSError(22, "rows can't be read directly: Invalid argument")


SLOW_LOAD = "loading takes 6.0 s, reading the rows of 2000 tokens 500 ms (vda: 16 reads in 250 us)"
SMALL_LOAD = "loading takes 391 ms, reading the rows of 2000 tokens 500 ms (vda: 16 reads in 250 us)"
OUTSIDE = "not mapped, as its files lie outside the bundle"

SENTENCES: list[tuple[TableFacts, Callable[[Path, Place], DiskFacts], str]] = [
    (table(64 * MIB), unmeasured, "resident, 64.0 MiB: tables up to 64.0 MiB are, where there is room"),
    (
        table(64 * MIB, external=True, place=on(NETWORK, "nfs4")),
        unmeasured,
        "resident, 64.0 MiB: tables up to 64.0 MiB are, where there is room",
    ),
    (table(400 * MIB), flash, f"resident, 400.0 MiB: {SMALL_LOAD}"),
    (table(6 * GIB), flash, f"mmap, 6.0 GiB: {SLOW_LOAD}"),
    (
        table(6 * GIB),
        slow_disk,
        "resident, 6.0 GiB: loading takes 48.0 s, reading the rows of 2000 tokens 136.0 s (vda: 16 reads in 68 ms)",
    ),
    (table(10 * GIB + 1), unmeasured, "mmap, 10.0 GiB: more than half of the 20.0 GiB available"),
    (
        table(6 * GIB),
        refused,
        "mmap, 6.0 GiB: its disk can't be measured (rows can't be read directly: Invalid argument)",
    ),
    (table(6 * GIB, place=on(MEMORY, "tmpfs")), unmeasured, "mmap, 6.0 GiB: its files are in memory already (tmpfs)"),
    (table(400 * MIB, external=True), flash, f"resident, 400.0 MiB: {SMALL_LOAD}"),
    (table(6 * GIB, external=True), flash, f"pread, 6.0 GiB: {SLOW_LOAD}; {OUTSIDE}"),
    (
        table(6 * GIB, leased=False),
        flash,
        f"pread, 6.0 GiB: {SLOW_LOAD}; not mapped, as no lease keeps others from its files",
    ),
    (
        table(21 * GIB),
        unmeasured,
        "pread, 21.0 GiB: more than half of the 20.0 GiB available; not mapped, as only 20.0 GiB are available",
    ),
    (
        table(11 * GIB, external=True),
        unmeasured,
        f"pread, 11.0 GiB: more than half of the 20.0 GiB available; {OUTSIDE}",
    ),
    (
        table(6 * GIB, place=on(NETWORK, "nfs4")),
        flash,
        f"pread, 6.0 GiB: {SLOW_LOAD}; not mapped, as its files lie on a network file system (nfs4)",
    ),
    (
        table(6 * GIB, place=on(FUSE, "fuse.sshfs")),
        refused,
        "pread, 6.0 GiB: its disk can't be measured (rows can't be read directly: Invalid argument); "
        "not mapped, as its files lie on a FUSE file system (fuse.sshfs)",
    ),
    (
        table(11 * GIB, place=on(REMOVABLE, "exfat")),
        unmeasured,
        "pread, 11.0 GiB: more than half of the 20.0 GiB available; "
        "not mapped, as its files lie on a removable disk (exfat)",
    ),
]


@pytest.mark.parametrize(("facts", "measure", "sentence"), SENTENCES, ids=[text for _, _, text in SENTENCES])
def test_auto_decides_by_size_room_place_and_disk(
    facts: TableFacts, measure: Callable[[Path, Place], DiskFacts], sentence: str
) -> None:
    assert str(choose(facts, AUTO, ROOM, measure)) == f"table layer_1: {sentence}"


@pytest.mark.parametrize("io", ["mmap", "pread", "resident"])
@pytest.mark.parametrize("facts", [table(MIB), table(6 * GIB), table(6 * GIB, external=True, place=on(FUSE, "fuse"))])
def test_what_is_asked_for_is_never_overridden(io: str, facts: TableFacts) -> None:
    choice = choose(facts, TableOptions(io=io), ROOM, unmeasured)
    assert (choice.io, choice.reason) == (io, "as asked for")


def test_a_resident_table_without_room_is_refused() -> None:
    room = table_room(RESIDENT, FreeMemory(num_bytes=8 * GIB), model_bytes=3 * GIB)
    wanted = (
        "table layer_1 can't be resident: its 6.0 GiB are more than the 5.0 GiB available; "
        "give --table-io mmap, or more memory"
    )
    with pytest.raises(RequestError, match=f"^{re.escape(wanted)}$"):
        choose(table(6 * GIB), RESIDENT, room, unmeasured)


@pytest.mark.parametrize(
    ("options", "free", "model_bytes", "num_bytes", "words"),
    [
        (AUTO, FreeMemory(num_bytes=22 * GIB), 2 * GIB, 10 * GIB, "half of the 20.0 GiB available"),
        (
            AUTO,
            FreeMemory(num_bytes=4 * GIB, of_group=True),
            0,
            2 * GIB,
            "half of the 4.0 GiB available in its control group",
        ),
        (AUTO, FreeMemory(num_bytes=GIB), 2 * GIB, 0, "half of the 0 B available"),
        (RESIDENT, FreeMemory(num_bytes=4 * GIB), GIB, 3 * GIB, "the 3.0 GiB available"),
        (TableOptions(ram_bytes=0), FreeMemory(num_bytes=4 * GIB), GIB, 0, "the 0 B allowed"),
        (TableOptions(ram_bytes=3 * GIB), FreeMemory(num_bytes=4 * GIB), GIB, 3 * GIB, "the 3.0 GiB allowed"),
        (TableOptions(ram_bytes=3 * GIB), FreeMemory(num_bytes=3 * GIB), GIB, 2 * GIB, "the 2.0 GiB available"),
        (TableOptions(io="resident", ram_bytes=MIB), FreeMemory(num_bytes=GIB), 0, MIB, "the 1.0 MiB allowed"),
    ],
)
def test_room_is_half_of_what_is_free_beside_the_model_or_what_is_allowed(
    options: TableOptions, free: FreeMemory, model_bytes: int, num_bytes: int, words: str
) -> None:
    available = max(free.num_bytes - model_bytes, 0)
    room = Room(num_bytes=num_bytes, words=words, available=available)
    assert table_room(options, free, model_bytes) == room


def test_tables_share_the_room() -> None:
    room = dataclasses.replace(ROOM, taken=9 * GIB)
    assert choose(table(2 * GIB), AUTO, room, unmeasured).reason == (
        "more than the 1.0 GiB that other tables leave of half of the 20.0 GiB available"
    )
    assert choose(table(MIB), AUTO, room, unmeasured).io == "resident"


@pytest.mark.parametrize(("reads", "microseconds"), [(1, 100), (2, 110), (16, 250), (46, 550)])
def test_reads_together_take_what_was_measured_of_one_and_sixteen(reads: int, microseconds: float) -> None:
    assert FLASH.reads_s(reads) == pytest.approx(microseconds * 1e-6)


def test_more_reads_never_take_less() -> None:
    odd = dataclasses.replace(FLASH, batch_p50_s=FLASH.one_p50_s / 2)
    assert odd.reads_s(48) == odd.one_p50_s


def test_figures_are_those_the_decision_went_by() -> None:
    figures = choose(table(6 * GIB), AUTO, ROOM, flash).figures()
    assert figures == {
        "site": "layer_1",
        "io": "mmap",
        "table_bytes": 6 * GIB,
        "reason": SLOW_LOAD,
        "room_bytes": 10 * GIB,
        "load_s": 6.0,
        "session_s": pytest.approx(0.5),
        "device": "vda",
        "disk": dataclasses.asdict(FLASH),
    }


# On a bundle.


def tiny_choices(workshop: Workshop, options: TableOptions = AUTO) -> list[TableChoice]:
    return list(choose_stores(workshop.uncompiled(), options))


@pytest.mark.parametrize(("measure", "io"), [(flash, "mmap"), (slow_disk, "resident")])
def test_the_disk_decides_of_a_large_table(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, measure: Callable[[Path, Place], DiskFacts], io: str
) -> None:
    monkeypatch.setattr(policy, "SMALL_BYTES", 0)
    monkeypatch.setattr(policy, "SESSION_TOKENS", 0.01)  # the table is as small
    monkeypatch.setattr(opening, "disk_facts", measure)
    monkeypatch.setattr(opening, "place_of", lambda path: VDA)
    assert [choice.io for choice in tiny_choices(workshop)] == [io]


def test_facts_are_those_of_the_manifest(workshop: Workshop) -> None:
    bundle = workshop.uncompiled()
    (spec,) = bundle.manifest.tables
    facts = opening.table_facts(bundle, spec)
    assert (facts.num_bytes, facts.reads, facts.external) == (326 * 18, 4, False)
    assert facts.path.is_file()
    assert facts.path.is_relative_to(bundle.path)


@pytest.mark.parametrize("io", ["auto", "resident", "mmap", "pread"])
def test_the_api_tells_how_tables_are_read(workshop: Workshop, io: str) -> None:
    bundle = workshop.ready().path
    with LLM(bundle, tables=TableOptions(io=io)) as llm, LLM(bundle, tables_on=False) as off:
        assert [(choice.site, choice.io) for choice in llm.tables] == [("layer_1", "resident" if io == "auto" else io)]
        assert off.tables == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"io": "mapped"}, "table io is 'mapped', expected one of auto, resident, mmap, pread"),
        ({"ram_bytes": -1}, "table ram is -1 bytes, expected 0 or more"),
        (
            {"io": "pread", "ram_bytes": 0},
            "table ram is for resident tables, with table io pread there are none; leave it out",
        ),
    ],
)
def test_options_that_cant_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        TableOptions(**options)  # type: ignore[arg-type]


# Sizes.


@given(st.integers(0, 10**9), st.sampled_from(list(UNITS)), st.sampled_from(["", " "]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str, gap: str) -> None:
    assert parse_size(f"{number}{gap}{unit}") == number * UNITS[unit]


@given(st.decimals(0, 10**6, places=3), st.sampled_from(list(UNITS)))
def test_fractions_of_a_byte_are_dropped(number: Fraction, unit: str) -> None:
    assert parse_size(f"{number:f}{unit}") == int(Fraction(number) * UNITS[unit])


@given(st.integers(0, 1 << 50))
def test_a_size_in_words_is_within_a_twentieth_of_its_unit(size: int) -> None:
    words = format_size(size)
    unit = UNITS[words.rpartition(" ")[2]]
    assert abs(parse_size(words) - size) <= Fraction(unit, 20) + 1
    assert size < 1024 * unit or unit == UNITS["TiB"]


@pytest.mark.parametrize(
    "text", ["", "4GB", "4 gib", "-1", "1e9", "٣MiB", "1.MiB", ".5GiB", "1,5GiB", "512MiB ", "9" * 19]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"is not a size, expected one such as 512MiB, 1\.5GiB or 0$"):
        parse_size(text)
