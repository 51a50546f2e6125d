"""Traces: the row ids a text reads, and whatever else may stand in such a file."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.conftest import Command
from tests.tiny import TinyModel
from tests.traces import make_trace, trace_site
from tests.workshop import Workshop, random_ids

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError, TableError
from engram_runtime.lens import recording
from engram_runtime.lens import trace as trace_module
from engram_runtime.lens.addresses import part_addresses, touched_pages
from engram_runtime.lens.cache_curves import PAGE, cache_curve
from engram_runtime.lens.heat import heat_strips
from engram_runtime.lens.hot_rows import hot_rows
from engram_runtime.lens.recording import record_trace, text_token_ids
from engram_runtime.lens.trace import Trace
from engram_runtime.lens.trace_file import read_trace, write_trace
from engram_runtime.tokenizer import TextTokenizer

TEXT = "The tide comes in.\nThe tide goes out.\n" * 40


def recorded(bundle: Bundle, token_ids: list[int]) -> Trace:
    return record_trace(bundle, np.array(token_ids), text="text.txt", command="engram tables trace")


def write_raw(path: Path, facts: Any, tensors: dict[str, Any] | None = None) -> None:
    """Write a trace whose facts and tensors nobody has checked."""
    tensors = {"rows.layer_1": np.array([[0, 500]], dtype=np.int32)} if tensors is None else tensors
    text = facts if isinstance(facts, str) else json.dumps(facts)
    save_file(tensors, path, metadata={"engram_trace": text})


def sound_facts() -> dict[str, Any]:
    return {
        "format_version": 1,
        "model": "tiny",
        "text": "text.txt",
        "command": "engram tables trace",
        "tokens": 1,
        "sites": [dataclasses.asdict(trace_site())],
    }


def refusal(path: Path) -> str:
    """Return what is said of a file that is no trace, without its name."""
    with pytest.raises(TableError) as caught:
        read_trace(path)
    return str(caught.value).removeprefix(f"{path} is not a trace that can be used: ")


def test_a_trace_holds_what_the_keyer_says(workshop: Workshop) -> None:
    bundle, token_ids = workshop.uncompiled(), random_ids(50)
    (spec,) = bundle.manifest.tables
    trace = recorded(bundle, token_ids)
    expected = bundle.keyer(spec.keyer).row_ids([], np.array(token_ids))
    assert trace.row_ids[spec.site].tolist() == expected.tolist()


def test_rows_do_not_depend_on_where_a_chunk_ends(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, token_ids = workshop.uncompiled(), random_ids(50)
    (site,) = recorded(bundle, token_ids).row_ids
    whole = recorded(bundle, token_ids).row_ids[site]
    monkeypatch.setattr(recording, "CHUNK_TOKENS", 7)
    np.testing.assert_array_equal(recorded(bundle, token_ids).row_ids[site], whole, strict=True)


def test_a_text_is_the_same_tokens_in_pieces_of_lines(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TextTokenizer.load(workshop.uncompiled().path)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    whole = text_token_ids(tokenizer, path, 10_000).tolist()
    monkeypatch.setattr(recording, "PIECE_CHARS", 30)
    assert text_token_ids(tokenizer, path, 10_000).tolist() == whole == tokenizer.encode(TEXT)
    assert text_token_ids(tokenizer, path, 11).tolist() == whole[:11]


def test_a_written_trace_is_read_back(tmp_path: Path) -> None:
    trace = make_trace([[0, 999], [-1, -1], [3, 500]], sites=(trace_site(), trace_site(site="layer_2")))
    write_trace(tmp_path / "a.trace", trace)
    read = read_trace(tmp_path / "a.trace")
    assert (read.sites, read.model, read.text, read.command) == (trace.sites, "tiny", "text.txt", trace.command)
    assert {name: ids.tolist() for name, ids in read.row_ids.items()} == {
        name: ids.tolist() for name, ids in trace.row_ids.items()
    }
    assert load_file(tmp_path / "a.trace")["rows.layer_2"].tolist() == [[0, 999], [-1, -1], [3, 500]]


def test_row_ids_beyond_32_bits_are_kept(tmp_path: Path) -> None:
    site = trace_site(num_rows=2**40, first_rows=(0, 2**39))
    write_trace(tmp_path / "a.trace", make_trace([[5, 2**40 - 1]], sites=(site,)))
    read = read_trace(tmp_path / "a.trace").row_ids["layer_1"]
    assert (read.dtype.name, read.tolist()) == ("int64", [[5, 2**40 - 1]])


def test_a_bundles_rows_lie_at_the_offsets_of_its_manifest(workshop: Workshop) -> None:
    (spec,) = workshop.uncompiled().manifest.tables
    (rows,) = spec.ranges
    expected = [(rows.offset + row * 18) // 4096 for row in (0, 300)]
    assert touched_pages(part_addresses(spec), np.array([0, 300]))[0].tolist() == expected


def test_a_trace_fits_the_bundle_it_was_recorded_of_alone(workshop: Workshop) -> None:
    bundle = workshop.uncompiled()
    (spec,) = bundle.manifest.tables
    (site,) = recorded(bundle, [1, 2]).sites
    site.check_table(bundle, spec)
    with pytest.raises(TableError) as caught:
        dataclasses.replace(site, num_rows=7).check_table(bundle, spec)
    assert str(caught.value) == (
        "the trace is of another table layer_1: its number of rows is 7, the bundle's 326; "
        "record a trace of this bundle"
    )


def test_a_file_that_is_missing_or_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gone.trace"
    assert refusal(path) == f"{path} is not a trace: there is no such file; make one with engram tables trace"
    path.write_bytes(b"\xff" * 100)
    assert refusal(path).startswith("Error while deserializing header: ")


def test_a_safetensors_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"x": np.zeros(3)}, tmp_path / "x")
    assert refusal(tmp_path / "x") == "its metadata has no 'engram_trace'; make one with engram tables trace"


def test_a_truncated_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    write_trace(path, make_trace([[0, 500]] * 100))
    os.truncate(path, path.stat().st_size - 1)
    assert refusal(path).startswith("Error while deserializing header: ")


def change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts.update(changes)


def change_site(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts["sites"][0].update(changes)


def change_part(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts["sites"][0]["parts"][0].update(changes)


DAMAGE = {
    "version": (
        change(format_version=2),
        "it has format version 2, this runtime reads 1; it needs a newer engram-edge",
    ),
    "tokens": (change(tokens=2), "row ids of site layer_1 are I32 [1, 2], expected int32 [2, 2]"),
    "too many": (
        change(tokens=10**12),
        "a trace of 1000000000000 tokens of 2 rows is too large, 10000000 tokens are the most; use --tokens",
    ),
    "unknown key": (change(colour=1), "engram_trace has unknown keys ['colour']; it may need a newer engram-edge"),
    "no sites": (change(sites=[]), "it has tensors ['rows.layer_1'] for sites []"),
    "other site": (change_site(site="x"), "it has tensors ['rows.layer_1'] for sites ['x']"),
    "few rows": (change_site(num_rows=501, parts=[]), "parts of site layer_1 don't sum to 160 bytes"),
    "wide ids": (change_site(num_rows=2**40), "row ids of site layer_1 are I32 [1, 2], expected int64 [1, 2]"),
    "columns": (
        change_site(first_rows=[0, 500, 600]),
        "row ids of site layer_1 are I32 [1, 2], expected int32 [1, 3]",
    ),
    "no columns": (change_site(first_rows=[]), "site layer_1 has 0 columns for n-grams of [2]"),
    "orders": (change_site(orders=[3, 2]), "site layer_1 has 2 columns for n-grams of [3, 2]"),
    "first rows": (
        change_site(first_rows=[0, 1000]),
        "columns of site layer_1 begin at rows [0, 1000], expected ascending ones from 0",
    ),
    "large records": (
        change_site(record_bytes=2**40, parts=[{"row_bytes": 2**40, "first_rows": [0], "addresses": [0]}]),
        "site layer_1 has 1000 rows of 1099511627776 bytes, expected records of at most 262144 "
        "and 1152921504606846976 in all",
    ),
    "large table": (
        change_site(num_rows=2**53 - 1),
        "site layer_1 has 9007199254740991 rows of 160 bytes, expected records of at most 262144 "
        "and 1152921504606846976 in all",
    ),
    "parts": (
        change_site(record_bytes=17, parts=[{"row_bytes": 1, "first_rows": [0], "addresses": [0]} for _ in range(17)]),
        "site layer_1 has records of 17 parts, expected at most 16",
    ),
    "row bytes": (change_part(row_bytes=5), "parts of site layer_1 don't sum to 160 bytes"),
    "addresses": (
        change_part(addresses=[-1]),
        "rows lie at addresses up to -1, expected 0 to 2**53",
    ),
    "ranges": (
        change_part(first_rows=[0, 5]),
        "ranges of rows begin at [0, 5], expected ascending rows from 0, each with an address",
    ),
    "far ranges": (
        change_part(first_rows=[0, 1000], addresses=[0, 0]),
        "parts of site layer_1 go beyond its 1000 rows",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_facts_that_can_not_be_are_refused(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    facts = sound_facts()
    damage(facts)
    write_raw(tmp_path / "a", facts)
    assert refusal(tmp_path / "a") == message


NO_OBJECTS = {
    "{": "is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    "[1]": "holds a JSON list, expected an object",
    "NaN": "is not valid JSON: NaN is not a JSON number",
    '{"a": 1, "a": 2}': "is not valid JSON: key 'a' stands twice",
    "[" * 100_000: "is not valid JSON: maximum recursion depth exceeded",
}


@pytest.mark.parametrize("text", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_facts_that_are_no_object_are_refused(tmp_path: Path, text: str) -> None:
    write_raw(tmp_path / "a", text)
    assert refusal(tmp_path / "a").startswith(f"its metadata {NO_OBJECTS[text]}")


@pytest.mark.parametrize("row", [-2, 0, 499, 1000])
def test_row_ids_their_column_does_not_have_are_refused(tmp_path: Path, row: int) -> None:
    write_raw(tmp_path / "a", sound_facts(), {"rows.layer_1": np.array([[0, row]], dtype=np.int32)})
    assert refusal(tmp_path / "a") == f"row id {row} of column 1 of site layer_1 is outside [500, 1000)"


def test_reads_are_told_in_order_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "BLOCK_READS", 4)
    trace = make_trace([[7, 500], [-1, -1], [3, 999], [7, 999], [7, 600]])
    site = trace.sites[0]
    assert [block.tolist() for block in trace.blocks(site)] == [[7, 500], [3, 999, 7, 999], [7, 600]]
    row_ids, counts = trace.counts(site)
    assert (row_ids.tolist(), counts.tolist()) == ([3, 7, 500, 600, 999], [1, 3, 1, 1, 2])
    assert trace.num_reads(site) == 8


def test_other_dtypes_and_tensors_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "a", sound_facts(), {"rows.layer_1": np.zeros((1, 2), dtype=np.float32)})
    assert refusal(tmp_path / "a") == "row ids of site layer_1 are F32 [1, 2], expected int32 [1, 2]"
    sound = np.zeros((1, 2), dtype=np.int32)
    write_raw(tmp_path / "a", sound_facts(), {"rows.layer_1": sound, "more": sound})
    assert refusal(tmp_path / "a") == "it has tensors ['more', 'rows.layer_1'] for sites ['layer_1']"


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_trace_is_refused_or_can_be_worked_on(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.trace"
    write_trace(path, make_trace([[0, 500], [-1, -1], [3, 999]]), replace=True)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(TableError):
        trace = read_trace(path)
        for site in trace.sites:
            heat_strips(trace, site)
            hot_rows(trace, site, 1 << 20)
            cache_curve(trace, site, PAGE, None)


def test_a_name_that_is_not_utf8_does_not_spoil_the_trace(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    text = tmp_path / os.fsdecode(b"caf\xe9.txt")
    text.write_text(TEXT)
    out = tmp_path / "a.trace"
    assert command("engram", "tables", "trace", workshop.uncompiled().path, "--text", text, "-o", out).code == 0
    trace = read_trace(out)
    assert (trace.text, f"{tmp_path}/caf?.txt" in trace.command) == ("caf?.txt", True)


def test_a_trace_that_can_not_be_written_is_refused_before_the_text_is_read(
    workshop: Workshop, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "a.trace"
    out.write_text("mine")
    line = ("engram", "tables", "trace", workshop.uncompiled().path, "--text", tmp_path / "gone.txt", "-o")
    refusals = {place: command(*line, place).err for place in (out, tmp_path, tmp_path / "no" / "a.trace")}
    assert list(refusals.values()) == [
        f"engram: {out} exists; replace it with --force or choose another place\n",
        f"engram: {tmp_path} is a folder; give the name of a file\n",
        f"engram: there is no folder {tmp_path / 'no'} to write a.trace to; make it or choose another place\n",
    ]
    assert out.read_text() == "mine"


def test_the_command_tells_what_is_read(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "a.trace"
    text.write_text(TEXT)
    outcome = command(
        "engram", "tables", "trace", workshop.uncompiled().path, "--text", text, "--tokens", 9, "-o", out, "--json"
    )
    trace = read_trace(out)
    assert (outcome.code, trace.tokens, trace.text) == (0, 9, "text.txt")
    assert outcome.json == {
        "file": str(out),
        "bytes": out.stat().st_size,
        "tokens": 9,
        "sites": [
            {
                "site": "layer_1",
                "reads": 36,
                "distinct": len(np.unique(trace.row_ids["layer_1"])),
                "rows": 326,
                "without_row": 0,
            }
        ],
    }
    assert trace.command.startswith("engram tables trace ")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "text {} has no tokens; give one that has some"), (b"\xff", "text {} is not UTF-8; convert it")],
)
def test_texts_that_can_not_be_recorded_are_refused(
    workshop: Workshop, tmp_path: Path, content: bytes, message: str
) -> None:
    tokenizer = TextTokenizer.load(workshop.uncompiled().path)
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        text_token_ids(tokenizer, path, 10)
    assert str(caught.value) == message.format(path)


def test_a_bundle_without_tables_is_refused(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel())).path
    outcome = command("engram", "tables", "trace", bundle, "--text", bundle / "engram.json", "-o", tmp_path / "a")
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: bundle {bundle} has no tables, so there is nothing to record\n",
    )
