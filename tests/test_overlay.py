"""A table with an overlay is the table the overlay was made of; what is no overlay for it is refused."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tests.conftest import Command
from tests.rows import gathered
from tests.test_bundle import COLUMNS, HEADER, ROWS, TABLE, change_manifest, contents, write_bundle, write_manifest
from tests.tiny import TinyModel, TinySite
from tests.workshop import THREADS, Workshop, copy_folder

from engram_export.repack import encode_rows, repacked_format
from engram_runtime import LLM
from engram_runtime.bundle import Bundle, file_sha256
from engram_runtime.errors import RequestError, TableError
from engram_runtime.memory import FreeMemory
from engram_runtime.records import RecordFormat
from engram_runtime.session import open_sites
from engram_runtime.tables import overlay_file
from engram_runtime.tables.checksums import write_checksums
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.files import FileTable
from engram_runtime.tables.options import TableOptions
from engram_runtime.tables.overlay import OverlayTable, with_overlays
from engram_runtime.tables.overlay_file import FACTS, Overlay, OverlaySpec, read_overlay, write_overlay

NUM_ROWS, WIDTH = 30, 16
FORMATS = {name: repacked_format(WIDTH, name) for name in ("int8", "int4", "fp8")} | {
    "float32": RecordFormat(payload="float32", columns=WIDTH, scale="none", scale_columns=WIDTH)
}
PROMPT = "The tide comes in"


def records(seed: int, record: RecordFormat, count: int = NUM_ROWS) -> NDArray[np.uint8]:
    """Return ``[count, record_bytes]`` of random rows."""
    values = np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)
    return values.view(np.uint8) if record.payload == "float32" else encode_rows(values, record)


def spec(record: RecordFormat = FORMATS["int8"], others: str = "table") -> OverlaySpec:
    return OverlaySpec(site="layer_1", num_rows=NUM_ROWS, record=record, keyer_sha256="ab" * 32, others=others)


def overlay(
    row_ids: Sequence[int], seed: int = 1, record: RecordFormat = FORMATS["int8"], others: str = "table"
) -> Overlay:
    """Return an overlay of random rows; row r is row r of `records`."""
    ids = np.array(row_ids, dtype=np.int64)
    return Overlay(spec=spec(record, others), row_ids=ids, records=records(seed, record)[ids])


class RecordsBelow:
    """A table of random rows that keeps which ones it is asked for."""

    def __init__(self, name: str = "int8") -> None:
        self._rows = FORMATS[name].decode(records(0, FORMATS[name]))
        self.counters = TableCounters()
        self.gathered: set[int] = set()
        self.requested: list[int] = []

    def gather(self, row_ids: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        self.gathered |= set(row_ids.tolist())
        self.counters.count(row_ids, FORMATS["int8"].record_bytes, cold=0, wait_s=0.0)
        out[...] = self._rows[row_ids]

    def request(self, row_ids: NDArray[np.int64]) -> None:
        self.requested += row_ids.tolist()

    def close(self) -> None:
        pass


ROW_SETS = st.sets(st.integers(0, NUM_ROWS - 1)).map(sorted)
ASKED = st.lists(st.integers(0, NUM_ROWS - 1), max_size=40)


@given(rows=ROW_SETS, asked=ASKED, formats=st.tuples(*[st.sampled_from(sorted(FORMATS))] * 2))
def test_rows_are_the_overlays_where_it_has_them(rows: list[int], asked: list[int], formats: tuple[str, str]) -> None:
    below, above = (FORMATS[name] for name in formats)
    expected = below.decode(records(0, below))
    expected[rows] = above.decode(records(1, above)[rows])
    found = gathered(OverlayTable(RecordsBelow(formats[0]), overlay(rows, record=above)), WIDTH, np.array(asked, int))
    np.testing.assert_array_equal(found, expected[asked], strict=True)


@given(stack=st.lists(ROW_SETS, max_size=4), asked=ASKED)
def test_of_several_overlays_the_last_one_is_on_top(stack: list[list[int]], asked: list[int]) -> None:
    expected = FORMATS["int8"].decode(records(0, FORMATS["int8"]))
    for seed, rows in enumerate(stack, start=1):
        expected[rows] = FORMATS["int8"].decode(records(seed, FORMATS["int8"]))[rows]
    table = with_overlays(RecordsBelow(), [overlay(rows, seed) for seed, rows in enumerate(stack, start=1)])
    np.testing.assert_array_equal(gathered(table, WIDTH, np.array(asked, int)), expected[asked], strict=True)


@given(stack=st.lists(st.tuples(ROW_SETS, st.sampled_from(["table", "zero"])), max_size=4), asked=ASKED)
def test_rows_a_cartridge_lacks_are_zeros_whatever_is_below(
    stack: list[tuple[list[int], str]], asked: list[int]
) -> None:
    expected = FORMATS["int8"].decode(records(0, FORMATS["int8"]))
    for seed, (rows, others) in enumerate(stack, start=1):
        expected *= others == "table"
        expected[rows] = FORMATS["int8"].decode(records(seed, FORMATS["int8"]))[rows]
    below = RecordsBelow()
    laid = [overlay(rows, seed, others=others) for seed, (rows, others) in enumerate(stack, start=1)]
    table = with_overlays(below, laid)
    np.testing.assert_array_equal(gathered(table, WIDTH, np.array(asked, int)), expected[asked], strict=True)
    table.request(np.array(asked, int))
    if any(others == "zero" for _, others in stack):
        assert not below.gathered | set(below.requested)


def test_rows_of_a_cartridge_and_zeros_cost_nothing() -> None:
    (table,) = [with_overlays(RecordsBelow(), [overlay([2, 5], others="zero")])]
    gathered(table, WIDTH, np.array([5, 2, 5, 7, 8, 7]))
    assert table.counters == TableCounters(rows=6, unique=4, bytes=2 * FORMATS["int8"].record_bytes)


@given(rows=ROW_SETS, asked=ASKED)
def test_the_table_below_is_never_asked_for_a_replaced_row(rows: list[int], asked: list[int]) -> None:
    below = RecordsBelow()
    table = OverlayTable(below, overlay(rows))
    gathered(table, WIDTH, np.array(asked, int))
    table.request(np.array(asked, int))
    others = [row for row in asked if row not in rows]
    assert below.gathered == set(others)
    assert below.requested == others


def test_rows_of_an_overlay_count_as_rows_in_memory() -> None:
    below = RecordsBelow()
    table = OverlayTable(below, overlay([2, 5]))
    gathered(table, WIDTH, np.array([5, 2, 5, 7, 8, 7]))
    below.counters.cold, below.counters.wait_s = 2, 0.5
    gathered(table, WIDTH, np.array([2]))
    size = FORMATS["int8"].record_bytes
    assert table.counters == TableCounters(rows=7, unique=5, bytes=5 * size, cold=2, wait_s=0.5)


@pytest.mark.parametrize("outside", [-1, NUM_ROWS])
def test_a_row_id_outside_the_table_is_named(outside: int) -> None:
    table = OverlayTable(RecordsBelow(), overlay([2]))
    for ask in (lambda ids: gathered(table, WIDTH, ids), table.request):
        with pytest.raises(IndexError) as caught:
            ask(np.array([2, outside]))
        assert str(caught.value) == f"row id {outside} is outside [0, {NUM_ROWS})"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("row_ids", [[], [0, 3, NUM_ROWS - 1]])
def test_an_overlay_is_read_as_it_was_written(tmp_path: Path, name: str, row_ids: list[int]) -> None:
    made = overlay(row_ids, record=FORMATS[name])
    write_overlay(tmp_path / "o", made.spec, made.row_ids, made.records)
    found = read_overlay(tmp_path / "o")
    assert found.spec == made.spec
    np.testing.assert_array_equal(found.row_ids, made.row_ids, strict=True)
    np.testing.assert_array_equal(found.records, made.records, strict=True)
    assert [file.name for file in tmp_path.iterdir()] == ["o"]


def test_an_overlay_is_a_safetensors_file_with_aligned_row_ids(tmp_path: Path) -> None:
    made = overlay([1, 4])
    write_overlay(tmp_path / "o", made.spec, made.row_ids, made.records)
    tensors = load_file(tmp_path / "o")
    np.testing.assert_array_equal(tensors["row_ids"], [1, 4])
    np.testing.assert_array_equal(tensors["records"], made.records, strict=True)
    assert int.from_bytes((tmp_path / "o").read_bytes()[:8], "little") % 8 == 0


def test_a_file_that_exists_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "o").write_text("mine")
    made = overlay([1])
    with pytest.raises(RequestError) as caught:
        write_overlay(tmp_path / "o", made.spec, made.row_ids, made.records)
    assert str(caught.value) == f"{tmp_path / 'o'} exists; replace it with --force or choose another place"
    assert (tmp_path / "o").read_text() == "mine"
    write_overlay(tmp_path / "o", made.spec, made.row_ids, made.records, replace=True)
    assert read_overlay(tmp_path / "o").row_ids.tolist() == [1]


INFINITE = np.full((1, WIDTH), np.inf, dtype=np.float32).view(np.uint8)
ROW = records(1, FORMATS["float32"])[:1]
BAD_ROWS: dict[str, tuple[list[int], NDArray[np.uint8], str]] = {
    "twice": ([3, 3], ROW.repeat(2, axis=0), "row id 3 comes after 3, expected ascending ids from 0"),
    "backwards": ([4, 3], ROW.repeat(2, axis=0), "row id 3 comes after 4, expected ascending ids from 0"),
    "negative": ([-2], ROW, "row id -2 comes after -1, expected ascending ids from 0"),
    "outside": ([NUM_ROWS], ROW, f"row id {NUM_ROWS} is outside [0, {NUM_ROWS})"),
    "infinite": ([7], INFINITE, "row 7 has a value that is not finite; it would spoil all later tokens"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_no_table_can_have_are_neither_written_nor_read(tmp_path: Path, name: str) -> None:
    row_ids, rows, sentence = BAD_ROWS[name]
    ids, path = np.array(row_ids, dtype=np.int64), tmp_path / "o"
    with pytest.raises(TableError) as caught:
        write_overlay(path, spec(FORMATS["float32"]), ids, rows)
    assert (str(caught.value), list(tmp_path.iterdir())) == (sentence, [])
    save_file({"row_ids": ids, "records": rows}, path, metadata={FACTS: spec(FORMATS["float32"]).to_json()})
    with pytest.raises(TableError) as caught:
        read_overlay(path)
    assert str(caught.value) == f"overlay {path} can't be used: {sentence}"


def test_records_of_another_shape_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(TableError) as caught:
        write_overlay(tmp_path / "o", spec(), np.array([1, 2]), np.zeros((2, 5), dtype=np.uint8))
    assert str(caught.value) == "records are uint8 [2, 5], expected uint8 [2, 18]"


def facts(**changes: object) -> dict[str, str]:
    return {FACTS: json.dumps(json.loads(spec().to_json()) | changes)}


SOUND = {"row_ids": np.array([1, 4]), "records": records(1, FORMATS["int8"])[:2]}
BAD_FILES: dict[str, tuple[dict[str, NDArray[Any]], dict[str, str], str]] = {
    "no-facts": (SOUND, {}, "its metadata has no 'engram_overlay'; make one with engram tables diff"),
    "version": (
        SOUND,
        facts(format_version=3),
        "it has format version 3, this runtime reads 2; it needs a newer engram-edge",
    ),
    "others": (SOUND, facts(others="none"), "its other rows are 'none', expected 'table' or 'zero'; make it again"),
    "unknown-key": (
        SOUND,
        facts(colour=1),
        "engram_overlay has unknown keys ['colour']; it may need a newer engram-edge",
    ),
    "not-json": (SOUND, {FACTS: "{"}, "its metadata is not valid JSON: Expecting property name enclosed in double"),
    "tensors": (
        SOUND | {"more": np.zeros(1)},
        facts(),
        "it has tensors ['more', 'records', 'row_ids'], expected ['records', 'row_ids']",
    ),
    "ids-dtype": (SOUND | {"row_ids": np.zeros(2, np.int32)}, facts(), "its row_ids are I32 [2], expected I64 [2]"),
    "ids-shape": (SOUND | {"row_ids": np.array([[1, 4]])}, facts(), "its row_ids are I64 [1, 2], expected I64 [1]"),
    "fewer-records": (
        SOUND | {"records": np.zeros((1, 18), np.uint8)},
        facts(),
        "its records are U8 [1, 18], expected U8 [2, 18]",
    ),
    "record-bytes": (
        SOUND | {"records": np.zeros((2, 19), np.uint8)},
        facts(),
        "its records are U8 [2, 19], expected U8 [2, 18]",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_overlay_is_refused(tmp_path: Path, name: str) -> None:
    tensors, metadata, sentence = BAD_FILES[name]
    save_file(tensors, tmp_path / "o", metadata=metadata)
    with pytest.raises(TableError) as caught:
        read_overlay(tmp_path / "o")
    assert str(caught.value).startswith(f"overlay {tmp_path / 'o'} can't be used: {sentence}")


def test_an_overlay_of_version_1_leaves_others_to_the_table(tmp_path: Path) -> None:
    first = json.loads(spec().to_json()) | {"format_version": 1}
    del first["others"]
    save_file(SOUND, tmp_path / "o", metadata={FACTS: json.dumps(first)})
    assert read_overlay(tmp_path / "o").spec == spec(others="table")


def linked(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


BAD_PATHS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "can't be read: No such file or directory"),
    "link": (linked, "can't be read: No such file or directory"),
    "folder": (Path.mkdir, "can't be used: it is not a plain file"),
    "pipe": (os.mkfifo, "can't be used: it is not a plain file"),
    "empty": (Path.touch, "can't be used: Error while deserializing header: header too small"),
}


@pytest.mark.parametrize("name", BAD_PATHS)
def test_a_path_that_holds_no_overlay_is_refused(tmp_path: Path, name: str) -> None:
    make, sentence = BAD_PATHS[name]
    make(tmp_path / "o")
    with pytest.raises(TableError) as caught:
        read_overlay(tmp_path / "o")
    assert str(caught.value) == f"overlay {tmp_path / 'o'} {sentence}"


def test_an_overlay_may_be_linked_to(tmp_path: Path) -> None:
    made = overlay([1, 4])
    write_overlay(tmp_path / "elsewhere", made.spec, made.row_ids, made.records)
    linked(tmp_path / "o")
    assert read_overlay(tmp_path / "o").row_ids.tolist() == [1, 4]


@given(cut=st.integers(0, 10_000))
def test_a_truncated_overlay_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    made, path = overlay([1, 4]), tmp_path_factory.getbasetemp() / "truncated"
    write_overlay(path, made.spec, made.row_ids, made.records, replace=True)
    data = path.read_bytes()
    path.write_bytes(data[: cut % len(data)])
    with pytest.raises(TableError):
        read_overlay(path)


def test_an_overlay_larger_than_half_of_the_free_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, path = overlay([1, 4]), tmp_path / "o"
    write_overlay(path, made.spec, made.row_ids, made.records)
    monkeypatch.setattr(overlay_file, "free_memory", lambda: FreeMemory(num_bytes=600))
    with pytest.raises(TableError) as caught:
        read_overlay(path)
    assert str(caught.value) == (
        f"overlay {path} can't be used: it holds {path.stat().st_size} B, at most half of the 600 B available is "
        f"allowed; export a bundle with these rows"
    )


def changed_table(row_ids: Sequence[int]) -> bytes:
    """Return the table of `write_bundle` with other values in some rows."""
    data = bytearray(contents()[TABLE])
    for row in row_ids:
        data[HEADER + row * (COLUMNS + 2)] ^= 1
    return bytes(data)


def every_row(bundle: Path, *overlays: Path) -> NDArray[np.float32]:
    (site,) = open_sites(Bundle.open(bundle), TableOptions(overlays=overlays))
    rows = gathered(site.table, COLUMNS, np.arange(ROWS))
    site.table.close()
    return rows


def test_a_table_with_its_difference_is_the_other_table(tmp_path: Path, command: Command) -> None:
    first, second = write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b", table=changed_table([0, 5, ROWS - 1]))
    outcome = command("engram", "tables", "diff", first, second, "-o", tmp_path / "o", "--json")
    size = (tmp_path / "o").stat().st_size
    assert (outcome.code, outcome.json) == (0, {"site": "layer_1", "rows": ROWS, "different": 3, "bytes": size})
    assert read_overlay(tmp_path / "o").row_ids.tolist() == [0, 5, ROWS - 1]
    np.testing.assert_array_equal(every_row(first, tmp_path / "o"), every_row(second), strict=True)


TABLES: dict[str, list[int]] = {"a": [], "b": [1, 2], "c": [2, 3]}


def test_differences_stack_in_order(tmp_path: Path, command: Command) -> None:
    tables = [write_bundle(tmp_path / name, table=changed_table(rows)) for name, rows in TABLES.items()]
    for index, (first, second) in enumerate(itertools.pairwise(tables)):
        command("engram", "tables", "diff", first, second, "-o", tmp_path / f"o{index}")
    overlays = [tmp_path / "o0", tmp_path / "o1"]
    np.testing.assert_array_equal(every_row(tables[0], *overlays), every_row(tables[2]), strict=True)
    assert not np.array_equal(every_row(tables[0], *overlays[::-1]), every_row(tables[2]))


def test_the_summary_is_one_sentence(tmp_path: Path, command: Command) -> None:
    first, second = write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b", table=changed_table([4]))
    outcome = command("engram", "tables", "diff", first, second, "-o", tmp_path / "o")
    size = (tmp_path / "o").stat().st_size
    assert outcome.out == f"1 of {ROWS} rows of layer_1 differ; {tmp_path / 'o'} holds them in {size:,} bytes\n"
    again = command("engram", "tables", "diff", first, second, "-o", tmp_path / "o")
    assert (again.code, again.err.splitlines()[-1]) == (
        2,
        f"engram: {tmp_path / 'o'} exists; replace it with --force or choose another place",
    )
    assert command("engram", "tables", "diff", first, second, "-o", tmp_path / "o", "--force").code == 0


def test_tables_of_other_keyers_cant_be_compared(tmp_path: Path, command: Command) -> None:
    first, second = write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b")
    change_manifest(second, "tables", 0, "keyer", "silent_ids", value=[3])
    outcome = command("engram", "tables", "diff", first, second, "-o", tmp_path / "o")
    digests = [OverlaySpec.of(bundle, bundle.manifest.tables[0]).keyer_sha256 for bundle in opened(first, second)]
    assert (outcome.code, outcome.err) == (
        3,
        f"engram: tables layer_1 can't be compared: the keyer digest of the first is {digests[0]}, "
        f"of the second {digests[1]}\n",
    )


def opened(*folders: Path) -> list[Bundle]:
    return [Bundle.open(folder) for folder in folders]


def test_a_site_the_bundle_lacks_cant_be_compared(tmp_path: Path, command: Command) -> None:
    first = write_bundle(tmp_path / "a")
    outcome = command("engram", "tables", "diff", first, first, "-o", tmp_path / "o", "--site", "layer_9")
    assert (outcome.code, outcome.err) == (2, f"engram: bundle {first} has no site 'layer_9', it has ['layer_1']\n")


def test_tables_of_sites_with_other_names_cant_be_compared(tmp_path: Path, command: Command) -> None:
    first, second = write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b")
    change_manifest(second, "tables", 0, "site", value="layer_2")
    change_manifest(second, "graphs", value={})
    outcome = command("engram", "tables", "diff", first, second, "-o", tmp_path / "o")
    assert (outcome.code, outcome.err) == (
        3,
        "engram: tables layer_1 can't be compared: the site of the first is layer_1, of the second layer_2\n",
    )


def test_one_of_several_tables_must_be_chosen(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    sites = [TinySite(layer_id=layer, convolution=False) for layer in (0, 1)]
    bundle = workshop.bundle(workshop.checkpoint(TinyModel(), *sites)).path
    outcome = command("engram", "tables", "diff", bundle, bundle, "-o", tmp_path / "o")
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: bundle {bundle} has sites ['layer_0', 'layer_1']; choose one with --site\n",
    )


def written(path: Path, bundle: Path, **changes: Any) -> Path:
    """Write an overlay of one row for a bundle's table, its spec changed."""
    opened = Bundle.open(bundle)
    sound = OverlaySpec.of(opened, opened.manifest.tables[0])
    rows = np.zeros((1, sound.record.record_bytes), dtype=np.uint8)
    write_overlay(path, dataclasses.replace(sound, **changes), np.array([1]), rows)
    return path


OTHER_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"num_rows": ROWS + 1}, f"its number of rows is {ROWS + 1}, expected {ROWS}"),
    "keyer": ({"keyer_sha256": "00"}, "its keyer digest is 00, expected {digest}"),
}


@pytest.mark.parametrize("name", OTHER_TABLES)
def test_an_overlay_for_another_table_is_refused(tmp_path: Path, name: str) -> None:
    changes, sentence = OTHER_TABLES[name]
    bundle = write_bundle(tmp_path / "a")
    path = written(tmp_path / "o", bundle, **changes)
    (table,) = Bundle.open(bundle).manifest.tables
    digest = OverlaySpec.of(Bundle.open(bundle), table).keyer_sha256
    with pytest.raises(TableError) as caught:
        every_row(bundle, path)
    expected = sentence.format(digest=digest)
    assert str(caught.value) == f"overlay {path} is for another table layer_1: {expected}"


def test_an_overlay_for_a_site_the_bundle_lacks_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "a")
    path = written(tmp_path / "o", bundle, site="layer_9")
    with pytest.raises(TableError) as caught:
        every_row(bundle, path)
    assert str(caught.value) == f"overlay {path} is for site 'layer_9', the bundle has sites ['layer_1']"


def test_a_table_below_a_cartridge_is_not_opened(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "a"))
    path = written(tmp_path / "o", bundle.path, others="zero")
    (table,) = bundle.manifest.tables
    (bundle.path / table.ranges[0].file).unlink()
    (site,) = open_sites(bundle, TableOptions(io="resident", ram_bytes=0, overlays=(path,)))
    assert not gathered(site.table, COLUMNS, np.arange(ROWS)).any()
    size = table.num_rows * table.record.record_bytes
    assert str(site.choice) == f"table layer_1: unread, {size} B: an overlay stands for all of it"
    site.table.close()


def test_a_model_with_a_cartridge_says_what_a_model_with_that_table_says(
    workshop: Workshop, command: Command, tmp_path: Path
) -> None:
    first, second = workshop.ready(), Bundle.open(other_rows(workshop.ready(), tmp_path / "b"))
    (table,) = second.manifest.tables
    with FileTable(table, second.table_path) as rows:
        held = rows.read_rows(0, table.num_rows)
    spec = OverlaySpec.of(first, table, others="zero")
    write_overlay(tmp_path / "o", spec, np.arange(table.num_rows), held)
    line = ("engram", "run", "--json", "--max-tokens", 24)
    found = command(*line, first.path, PROMPT, "--overlay", tmp_path / "o").json
    with LLM(second.path, threads=THREADS) as llm:
        assert found["token_ids"] == list(llm.generate(PROMPT, max_tokens=24).token_ids)
    (told,) = found["tables"]
    assert (told["io"], told["cold"]) == ("unread", 0)
    write_overlay(tmp_path / "empty", spec, np.empty(0, dtype=np.int64), held[:0])
    silent = command(*line, first.path, PROMPT, "--overlay", tmp_path / "empty").json
    assert silent["token_ids"] == command(*line, first.path, PROMPT, "--tables", "off").json["token_ids"]


def other_rows(bundle: Bundle, folder: Path) -> Path:
    """Copy a bundle and change every row of its table, and what says how they are."""
    copy_folder(bundle.path, folder)
    (rows,) = bundle.manifest.tables[0].ranges
    data = bytearray((folder / rows.file).read_bytes())
    for row in range(rows.num_rows):
        data[rows.offset + row * bundle.manifest.tables[0].record.record_bytes] ^= 0x55
    (folder / rows.file).write_bytes(data)
    assert rows.checksums is not None
    write_checksums(folder / rows.file, folder / rows.checksums)
    raw = json.loads((folder / "engram.json").read_text())
    for entry in raw["files"]:
        entry["sha256"] = file_sha256(folder / entry["path"])
    write_manifest(folder, raw)
    return folder


def test_a_model_with_an_overlay_says_what_the_other_model_says(
    workshop: Workshop, command: Command, tmp_path: Path
) -> None:
    first, second = workshop.ready().path, other_rows(workshop.ready(), tmp_path / "b")
    command("engram", "tables", "diff", first, second, "-o", tmp_path / "o")
    line = ("engram", "run", "--json", "--max-tokens", 24)
    found = command(*line, first, PROMPT, "--overlay", tmp_path / "o").json
    with LLM(second, threads=THREADS) as llm:
        expected = llm.generate(PROMPT, max_tokens=24).token_ids
    assert found["token_ids"] == list(expected)
    assert found["overlays"] == [str(tmp_path / "o")]
    assert found["token_ids"] != command(*line, first, PROMPT).json["token_ids"]
    (table,) = found["tables"]
    assert (table["site"], table["cold"]) == ("layer_1", 0)
    assert table["rows"] > table["unique"] > 0


TOLD = {"perplexity": ("eval", "ppl", "--text", "text"), "sites": ("tables", "why", PROMPT, "--table-io", "pread")}


@pytest.mark.parametrize("what", TOLD)
def test_perplexity_and_ngrams_are_those_of_the_table_with_its_overlay(
    workshop: Workshop, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    first, second = workshop.ready().path, other_rows(workshop.ready(), tmp_path / "b")
    command("engram", "tables", "diff", first, second, "-o", tmp_path / "o")
    (tmp_path / "text").write_text(PROMPT)
    monkeypatch.chdir(tmp_path)
    group, name, *others = TOLD[what]
    expected, found, before = (
        command("engram", group, name, *bundle, *others, "--json")
        for bundle in ((second,), (first, "--overlay", "o"), (first,))
    )
    assert found.json[what] == expected.json[what] != before.json[what]
    assert (found.json["overlays"], before.json["overlays"]) == (["o"], [])
    assert found.err.startswith("table layer_1: ")


def test_an_overlay_may_have_another_format_than_the_table(
    workshop: Workshop, command: Command, tmp_path: Path
) -> None:
    first = workshop.uncompiled()
    site, record = first.manifest.tables[0], repacked_format(first.manifest.tables[0].record.columns, "fp8")
    second = workshop.bundle(
        workshop.checkpoint(TinyModel(), TinySite()), quant="int8", tables="repack", table_dtype="fp8"
    )
    assert second.manifest.tables[0].record == record != site.record
    command("engram", "tables", "diff", first.path, second.path, "-o", tmp_path / "o")
    (with_overlay,) = open_sites(first, TableOptions(overlays=(tmp_path / "o",)))
    (of_second,) = open_sites(second)
    row_ids = np.arange(site.num_rows)
    np.testing.assert_array_equal(
        gathered(with_overlay.table, record.columns, row_ids), gathered(of_second.table, record.columns, row_ids)
    )
