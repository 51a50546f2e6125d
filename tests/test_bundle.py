"""Bundles on disk: whole ones open and give their rows, damaged ones are a BundleError that names the place."""

import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.rows import gathered
from tests.steps import FunctionStep

from engram_runtime.bundle import Bundle, file_identity, manifest_bytes, sealed
from engram_runtime.errors import BundleError, TableError, VerificationError
from engram_runtime.executor import State, Step, StepInputs
from engram_runtime.golden import Golden, check_logits, check_tables, record_digest
from engram_runtime.hashing import INT64_MAX
from engram_runtime.manifest import DECODER, Manifest
from engram_runtime.records import NO_FACTOR
from engram_runtime.session import Session, open_sites
from engram_runtime.site import Site
from engram_runtime.strict_json import MAX_JSON_BYTES, read_json_object
from engram_runtime.table_spec import RowRange
from engram_runtime.tables.opening import open_table
from engram_runtime.tables.options import MMAP, PREAD, RESIDENT, TableOptions

VOCAB, CONTEXT, ROWS, COLUMNS, HEADER = 50, 32, 36, 6, 64
GRAPH, WEIGHTS, TABLE, MAP = (
    "graph/decoder.onnx",
    "graph/weights.safetensors",
    "tables/layer_1.bin",
    "tables/layer_1.map",
)
GOLDEN = "golden/golden.json"
PRIMES, OFFSETS, MULTIPLIERS, PAD = [5, 7, 11, 13], [0, 5, 12, 23], [3, 5, 7], 2
TOKENS = [7, 0, 49, 7, 7]
NEWER = "it may need a newer engram-edge"


def table_values() -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    rng = np.random.default_rng(11)
    payload = rng.integers(-127, 128, (ROWS, COLUMNS)).astype(np.int8)
    return payload, rng.uniform(0.01, 0.1, ROWS).astype(np.float16)


def token_map() -> NDArray[np.int32]:
    return (np.arange(VOCAB) % 9).astype("<i4")


def true_rows(token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Return ``[T, 4, 6]`` rows of a text, hashed in plain integers."""
    payload, scales = table_values()
    values = payload.astype(np.float32) * scales.astype(np.float32)[:, None]
    return values[np.array(true_row_ids(token_ids), dtype=np.int64)]


def true_row_ids(token_ids: Sequence[int]) -> list[list[int]]:
    ids = [PAD, PAD, *(token % 9 for token in token_ids)]
    rows = []
    for now, previous, before in zip(ids[2:], ids[1:], ids, strict=False):
        pair = now * 3 ^ previous * 5
        mixed = [pair, pair, pair ^ before * 7, pair ^ before * 7]
        rows.append([h % p + o for h, p, o in zip(mixed, PRIMES, OFFSETS, strict=True)])
    return rows


def contents() -> dict[str, bytes]:
    """Return the files of a bundle without its manifest."""
    payload, scales = table_values()
    records = np.concatenate([payload.view(np.uint8), scales.view(np.uint8).reshape(ROWS, 2)], axis=1)
    return {
        GRAPH: b"a graph",
        WEIGHTS: bytes(range(256)),
        TABLE: bytes(HEADER) + records.tobytes(),
        MAP: token_map().tobytes(),
        GOLDEN: json.dumps(golden_values()).encode(),
    }


def golden_values() -> dict[str, Any]:
    return {
        "token_ids": TOKENS,
        "argmax": [1, 2, 3, 4, 5],
        "last_ids": [5, 6],
        "last_logits": [2.5, -1.0],
        "tables": [
            {
                "site": "layer_1",
                "row_ids": true_row_ids(TOKENS[:3]),
                "rows_sha256": hashlib.sha256(true_rows(TOKENS[:3]).tobytes()).hexdigest(),
            }
        ],
        "parity": {"max_abs": 0.5},
    }


def manifest_json(files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "format_version": 3,
        "producer": "engram-edge 0.1.0",
        "model": {
            "name": "tiny",
            "family": "llama",
            "quantisation": "int8",
            "vocab_size": VOCAB,
            "hidden_size": 8,
            "num_layers": 2,
            "context_length": CONTEXT,
        },
        "graphs": {
            "decoder": {
                "file": GRAPH,
                "weights": WEIGHTS,
                "inputs": [
                    {"name": "token_ids", "dtype": "int64", "shape": ["T"]},
                    {"name": "position", "dtype": "int64", "shape": [1]},
                    {"name": "logit_rows", "dtype": "int64", "shape": ["R"]},
                    {"name": "rows.layer_1", "dtype": "float32", "shape": ["T", 4, COLUMNS]},
                ],
                "outputs": [{"name": "logits", "dtype": "float32", "shape": ["R", VOCAB]}],
                "states": [{"name": "key.0", "dtype": "float32", "shape": [1, 2, CONTEXT, 4], "kind": "positional"}],
            }
        },
        "tables": [
            {
                "site": "layer_1",
                "num_rows": ROWS,
                "record": {
                    "payload": "int8",
                    "columns": COLUMNS,
                    "scale": "float16",
                    "scale_columns": COLUMNS,
                    "factor": NO_FACTOR,
                },
                "parts": [{"row_bytes": COLUMNS + 2, "ranges": [row_range()]}],
                "keyer": {
                    "kind": "xor_prime",
                    "orders": [2, 3],
                    "num_heads": 2,
                    "multipliers": MULTIPLIERS,
                    "primes": PRIMES,
                    "offsets": OFFSETS,
                    "pad_id": PAD,
                    "barrier_ids": [],
                    "silent_ids": [],
                    "token_map": MAP,
                },
            }
        ],
        "files": [
            {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in files.items()
        ],
        "extensions": {},
    }


def row_range(**changes: object) -> dict[str, Any]:
    """Return all rows of the table's file, or what the changes make of them."""
    whole = {"first_row": 0, "num_rows": ROWS, "file": TABLE, "external": False, "offset": HEADER, "identity": None}
    return whole | changes


def write_bundle(folder: Path, **replaced: bytes) -> Path:
    """Write a sound bundle; keyword ``map`` or ``golden`` replaces what that file holds."""
    names = {"map": MAP, "golden": GOLDEN, "table": TABLE}
    files = contents() | {names[name]: data for name, data in replaced.items()}
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_manifest(folder, manifest_json(files))
    return folder


def write_manifest(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "engram.json").write_bytes(sealed(raw))


def change_manifest(folder: Path, *path: str | int, value: object) -> None:
    """Replace one value of the manifest."""
    raw = json.loads((folder / "engram.json").read_text())
    parent = raw
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    write_manifest(folder, raw)


def message(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    return str(caught.value)


def site_rows(bundle: Bundle, token_ids: Sequence[int] = TOKENS) -> NDArray[np.float32]:
    """Return the rows of the bundle's only site."""
    (site,) = open_sites(bundle)
    rows = site.rows([], np.array(token_ids, dtype=np.int64))
    site.table.close()
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "tiny.engram")


def test_a_written_bundle_opens_with_the_manifest_it_was_given(folder: Path) -> None:
    assert Bundle.open(folder).manifest == Manifest.from_dict(manifest_json(contents()))


def test_the_bytes_of_a_manifest_open_as_the_same_bundle(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / "engram.json").write_bytes(manifest_bytes(bundle.manifest))
    assert Bundle.open(folder) == bundle


def test_rows_of_a_site_equal_numpy(folder: Path) -> None:
    np.testing.assert_array_equal(site_rows(Bundle.open(folder)), true_rows(TOKENS), strict=True)


def test_silent_tokens_get_zero_rows(folder: Path) -> None:
    change_manifest(folder, "tables", 0, "keyer", "silent_ids", value=[0, 49])
    expected = true_rows(TOKENS)
    expected[[1, 2]] = 0
    np.testing.assert_array_equal(site_rows(Bundle.open(folder)), expected, strict=True)


def test_a_text_of_silent_tokens_reads_nothing(folder: Path) -> None:
    change_manifest(folder, "tables", 0, "keyer", "silent_ids", value=[7])
    np.testing.assert_array_equal(
        site_rows(Bundle.open(folder), [7, 7]), np.zeros((2, 4, COLUMNS), np.float32), strict=True
    )


def test_sites_open_without_a_decoder_and_sessions_do_not(folder: Path) -> None:
    change_manifest(folder, "graphs", value={})
    bundle = Bundle.open(folder)
    np.testing.assert_array_equal(site_rows(bundle), true_rows(TOKENS), strict=True)
    with pytest.raises(BundleError) as caught:
        Session(bundle, ScriptedExecutor(scripted_logits([1])), open_sites(bundle))
    assert str(caught.value) == (
        "this bundle holds tables and sites only, no decoder; export without --tables-only to run it"
    )


def open_files() -> set[Path]:
    return set(Path("/proc/self/fd").iterdir())


READING = TableOptions(io=PREAD)


def test_tables_are_closed_where_a_later_one_cant_be_opened(folder: Path, tmp_path: Path) -> None:
    sound = manifest_json(contents())["tables"][0]
    missing = row_range(file=str(tmp_path / "gone"), external=True, identity="a")
    damaged = sound | {"site": "layer_2", "parts": [{"row_bytes": COLUMNS + 2, "ranges": [missing]}]}
    change_manifest(folder, "graphs", value={})
    change_manifest(folder, "tables", value=[sound, damaged])
    bundle, before = Bundle.open(folder), open_files()
    with pytest.raises(TableError, match="gone can't be opened"):
        open_sites(bundle, READING)
    assert open_files() == before


def test_tables_are_closed_where_a_session_cant_begin(folder: Path) -> None:
    change_manifest(folder, "graphs", value={})
    bundle, before = Bundle.open(folder), open_files()
    with pytest.raises(BundleError, match="no decoder"):
        Session.open(bundle, ScriptedExecutor(scripted_logits([1])), tables_on=False)
    assert open_files() == before


def test_a_session_closes_the_tables_it_has_opened(folder: Path) -> None:
    bundle, before = Bundle.open(folder), open_files()
    with Session.open(bundle, ScriptedExecutor(scripted_logits([1])), options=READING):
        assert open_files() > before
    assert open_files() == before


def test_every_identity_of_an_external_file_is_checked(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(contents()[TABLE])
    ranges = [
        row_range(num_rows=20, file=str(path), external=True, identity=file_identity(path)),
        row_range(first_row=20, num_rows=16, file=str(path), external=True, identity="another"),
    ]
    change_manifest(folder, "tables", 0, "parts", 0, "ranges", value=ranges)
    bundle = Bundle.open(folder)
    wanted = f"table file {path} is not the one this bundle was exported from; export it again"
    with pytest.raises(TableError, match=f"^{re.escape(wanted)}$"):
        open_sites(bundle)


def test_tokens_behind_a_barrier_are_pads_to_those_after_it(folder: Path) -> None:
    change_manifest(folder, "tables", 0, "keyer", "barrier_ids", value=[49])
    rows = site_rows(Bundle.open(folder), [7, 0, 49, 8, 5])
    np.testing.assert_array_equal(rows[:3], true_rows([7, 0, 49]), strict=True)
    np.testing.assert_array_equal(rows[3:], true_rows([8, 5]), strict=True)


def test_rows_keyed_by_the_token_are_those_at_its_id(folder: Path) -> None:
    change_manifest(folder, "tables", 0, "keyer", value={"kind": "token", "vocab_size": ROWS, "pad_id": 3})
    change_manifest(folder, "graphs", "decoder", "inputs", 3, "shape", value=["T", 1, COLUMNS])
    payload, scales = table_values()
    values = payload.astype(np.float32) * scales.astype(np.float32)[:, None]
    np.testing.assert_array_equal(
        site_rows(Bundle.open(folder), [0, 35, 36, 49]), values[[0, 35, 3, 3], None], strict=True
    )


@pytest.mark.parametrize("io", [MMAP, PREAD])
def test_a_table_in_memory_has_the_rows_of_one_that_is_read_from_its_file(folder: Path, io: str) -> None:
    bundle = Bundle.open(folder)
    (spec,) = bundle.manifest.tables
    held, read = open_table(bundle, spec, RESIDENT), open_table(bundle, spec, io)
    row_ids = np.array([35, 0, 35], dtype=np.int64)
    np.testing.assert_array_equal(gathered(held, COLUMNS, row_ids), gathered(read, COLUMNS, row_ids), strict=True)
    held.close()
    read.close()


def test_rows_outside_the_bundle_are_read_in_place(folder: Path, tmp_path: Path) -> None:
    payload, scales = table_values()
    (tmp_path / "payload").write_bytes(payload.tobytes())
    (tmp_path / "scales").write_bytes(b"12" + scales.tobytes())
    parts = [
        {
            "row_bytes": size,
            "ranges": [row_range(file=str(path), external=True, offset=offset, identity=file_identity(path))],
        }
        for path, offset, size in ((tmp_path / "payload", 0, COLUMNS), (tmp_path / "scales", 2, 2))
    ]
    change_manifest(folder, "tables", 0, "parts", value=parts)
    np.testing.assert_array_equal(site_rows(Bundle.open(folder)), true_rows(TOKENS), strict=True)


def external_rows(path: Path, identity: str) -> RowRange:
    return RowRange(first_row=0, num_rows=1, file=str(path), external=True, offset=0, identity=identity)


def test_paths_are_resolved_inside_the_bundle_unless_external(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(folder)
    (inside,) = bundle.manifest.tables[0].ranges
    path = tmp_path / "rows"
    path.write_bytes(b"12345678")
    outside = external_rows(path, file_identity(path))
    assert [bundle.table_path(inside), bundle.table_path(outside)] == [folder / TABLE, path]


def test_an_external_file_that_was_replaced_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"12345678")
    rows = external_rows(path, file_identity(path))
    path.write_bytes(b"12345679")
    wanted = f"table file {path} is not the one this bundle was exported from; export it again"
    with pytest.raises(TableError, match=f"^{re.escape(wanted)}$"):
        Bundle.open(folder).table_path(rows)


def test_an_external_file_that_is_gone_is_named(folder: Path, tmp_path: Path) -> None:
    rows = external_rows(tmp_path / "gone", "")
    wanted = f"table file {tmp_path / 'gone'} can't be opened: No such file or directory; export the bundle again"
    with pytest.raises(TableError, match=f"^{re.escape(wanted)}$"):
        Bundle.open(folder).table_path(rows)


def test_a_pipe_in_place_of_an_external_file_is_refused_without_waiting_for_a_writer(
    folder: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "rows")
    rows = external_rows(tmp_path / "rows", "")
    wanted = f"table file {tmp_path / 'rows'} is not the one this bundle was exported from; export it again"
    with pytest.raises(TableError, match=f"^{re.escape(wanted)}$"):
        Bundle.open(folder).table_path(rows)


@pytest.mark.parametrize("size", [0, 9, 64 << 10, (64 << 10) + 9])
def test_the_identity_of_a_file_is_the_digest_of_its_size_and_first_64_kib(tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "rows").write_bytes(data)
    stated = hashlib.sha256(struct.pack("<Q", size) + data[: 64 << 10]).hexdigest()
    assert file_identity(tmp_path / "rows") == stated


def test_digests_of_a_whole_bundle_pass_and_every_byte_is_counted(folder: Path) -> None:
    hashed: list[int] = []
    Bundle.open(folder).verify_digests(hashed.append)
    assert sum(hashed) == sum(len(data) for data in contents().values())


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(contents())), bit=st.integers(0, 2**20))
def test_one_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, name: str, bit: int) -> None:
    folder = write_bundle(tmp_path_factory.getbasetemp() / "flipped.engram")
    data = bytearray(contents()[name])
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    (folder / name).write_bytes(data)
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder).verify_digests()
    found, stated = hashlib.sha256(data).hexdigest(), hashlib.sha256(contents()[name]).hexdigest()
    assert str(caught.value) == f"{name} has SHA-256 {found}, the manifest says {stated}; export again"


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    expected = f"{tmp_path} is not a bundle: it has no engram.json; make one with engram-export"
    assert message(tmp_path) == expected


def test_a_folder_that_is_not_there_is_no_bundle(tmp_path: Path) -> None:
    expected = f"{tmp_path / 'gone'} is not a bundle: it has no engram.json; make one with engram-export"
    assert message(tmp_path / "gone") == expected


def test_another_format_version_is_refused(folder: Path) -> None:
    change_manifest(folder, "format_version", value=1)
    expected = "bundle has format version 1, this runtime reads 2 and 3; export it again"
    assert message(folder) == f"{folder / 'engram.json'}: {expected}"


@pytest.mark.parametrize("name", sorted(contents()))
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert message(folder) == f"bundle {folder} lacks {name}: No such file or directory; export it again"


@pytest.mark.parametrize("name", sorted(contents()))
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_one_byte_short_or_long_is_named(folder: Path, name: str, change: int) -> None:
    size = len(contents()[name])
    os.truncate(folder / name, size + change)
    assert message(folder) == f"{name} holds {size + change} bytes, the manifest says {size}; export the bundle again"


def test_a_link_in_place_of_a_file_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert message(folder) == f"{WEIGHTS} in bundle {folder} is not a plain file"


def test_a_link_in_place_of_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "graph").rename(tmp_path / "elsewhere")
    (folder / "graph").symlink_to(tmp_path / "elsewhere")
    assert message(folder) == f"graph in bundle {folder} is a link; bundles hold plain files only"


def test_a_folder_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert message(folder) == f"{WEIGHTS} in bundle {folder} is not a plain file"


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    (folder / MAP).unlink()
    (folder / TABLE).unlink()
    (folder / "tables").rmdir()
    (folder / "tables").write_bytes(b"")
    assert message(folder) == f"bundle {folder} lacks {TABLE}: Not a directory; export it again"


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "graph\\decoder.onnx", "graph/../graph/decoder.onnx"])
def test_a_listed_path_that_leaves_the_bundle_is_refused(folder: Path, path: str) -> None:
    change_manifest(folder, "files", 0, "path", value=path)
    expected = f"path {path!r} leaves the bundle; only plain relative paths are allowed"
    assert message(folder) == f"{folder / 'engram.json'}: {expected}"


def test_a_path_that_no_file_system_can_hold_is_refused(folder: Path) -> None:
    change_manifest(folder, "files", 0, "path", value="graph/\ud800")
    expected = "manifest.files[0].path is 'graph/\\ud800', expected text without NUL and lone surrogates"
    assert message(folder) == f"{folder / 'engram.json'}: {expected}"


def test_a_path_longer_than_any_file_name_is_refused(folder: Path) -> None:
    change_manifest(folder, "graphs", "decoder", "file", value="x" * 300)
    change_manifest(folder, "files", 0, "path", value="x" * 300)
    assert message(folder) == f"bundle {folder} lacks {'x' * 300}: File name too long; export it again"


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_file_the_runtime_would_read_must_be_listed(folder: Path, name: str) -> None:
    (folder / name).symlink_to("nowhere")
    assert message(folder) == f"bundle {folder} holds {name}, which its manifest doesn't list; export it again"


def test_other_files_the_manifest_does_not_list_are_no_concern(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / "notes.txt").write_text("mine")
    assert Bundle.open(folder) == bundle


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"producer": 1, "producer": 2}', "key 'producer' stands twice"),
        ('{"model": {"a": 1, "b": 2, "b": 3, "a": 4, "b": 5}}', "key 'b' stands twice"),
        ('{"format_version": NaN}', "NaN is not a JSON number"),
        ('{"format_version": [-Infinity]}', "-Infinity is not a JSON number"),
    ],
)
def test_json_that_python_would_let_pass_is_refused(folder: Path, text: str, reason: str) -> None:
    (folder / "engram.json").write_text(text)
    assert message(folder) == f"{folder / 'engram.json'} is not valid JSON: {reason}"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b'{"a": 1,}', b'{"a": "\xff"}', b"\x00", b'{"a":' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "open", "comma", "bytes", "nul", "deep", "digits"],
)
def test_text_that_is_no_json_is_refused(folder: Path, data: bytes) -> None:
    (folder / "engram.json").write_bytes(data)
    assert message(folder).startswith(f"{folder / 'engram.json'} is not valid JSON: ")


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("1", "int"), ("null", "NoneType"), ('"a"', "str")])
def test_json_that_is_no_object_is_refused(folder: Path, text: str, kind: str) -> None:
    (folder / "engram.json").write_text(text)
    assert message(folder) == f"{folder / 'engram.json'} holds a JSON {kind}, expected an object"


def test_a_manifest_beyond_the_limit_is_not_read(folder: Path) -> None:
    os.truncate(folder / "engram.json", MAX_JSON_BYTES + 1)
    expected = f"{folder / 'engram.json'} holds 4194305 bytes, at most 4194304 are allowed"
    assert message(folder) == expected


def test_a_json_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        read_json_object(tmp_path / "gone.json")
    assert str(caught.value) == f"{tmp_path / 'gone.json'} can't be read: No such file or directory"


def test_values_as_deep_as_json_may_nest_are_refused_with_our_error(folder: Path) -> None:
    depths = range(sys.getrecursionlimit() - 100, sys.getrecursionlimit())
    text = json.dumps(manifest_json(contents()))
    for depth in depths:
        deep = "[" * depth + "]" * depth
        (folder / "engram.json").write_text(text.replace('"engram-edge 0.1.0"', deep))
        message(folder)


@pytest.mark.parametrize(("offset", "needed"), [(HEADER + 1, 353), (0, None), (400, 688)])
def test_rows_that_reach_beyond_their_file_are_refused(folder: Path, offset: int, needed: int | None) -> None:
    change_manifest(folder, "tables", 0, "parts", 0, "ranges", value=[row_range(offset=offset)])
    bundle = Bundle.open(folder)
    error = None
    try:
        open_table(bundle, bundle.manifest.tables[0], PREAD).close()
    except TableError as caught:
        error = str(caught)
    expected = f"table file {folder / TABLE} holds 352 bytes, its rows need {needed}; export it again"
    assert error == (None if needed is None else expected)


@pytest.mark.parametrize("size", [4 * VOCAB - 4, 4 * VOCAB - 1, 4 * VOCAB + 1, 4 * VOCAB + 4, 0])
def test_a_token_map_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    bundle = Bundle.open(write_bundle(tmp_path, map=bytes(size)))
    with pytest.raises(BundleError) as caught:
        open_sites(bundle)
    assert str(caught.value) == f"token map {MAP} holds {size} bytes, a vocabulary of 50 needs 200; export again"


def test_a_token_map_with_a_negative_id_is_refused(tmp_path: Path) -> None:
    values = token_map()
    values[7] = -3
    bundle = Bundle.open(write_bundle(tmp_path, map=values.tobytes()))
    with pytest.raises(BundleError) as caught:
        open_sites(bundle)
    assert str(caught.value) == f"token map {MAP} maps token 7 to -3, expected ids from 0; export again"


def test_the_largest_multiplier_that_fits_64_bits_is_hashed(folder: Path) -> None:
    largest = INT64_MAX // 8  # compressed ids reach 8
    change_manifest(folder, "tables", 0, "keyer", "multipliers", value=[largest, 5, 7])
    (site,) = open_sites(Bundle.open(folder))
    expected = [(8 * largest ^ PAD * 5) % 5, (8 * largest ^ PAD * 5) % 7 + 5]
    assert site.keyer.row_ids([], np.array([8], dtype=np.int64))[0, :2].tolist() == expected


def test_a_multiplier_whose_products_overflow_is_refused(folder: Path) -> None:
    multiplier = INT64_MAX // 8 + 1
    change_manifest(folder, "tables", 0, "keyer", "multipliers", value=[multiplier, 5, 7])
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError) as caught:
        open_sites(bundle)
    assert str(caught.value) == f"keyer multiplier {multiplier} overflows 64 bits: products reach {8 * multiplier}"


def test_a_pad_whose_products_overflow_is_refused(folder: Path) -> None:
    change_manifest(folder, "tables", 0, "keyer", "pad_id", value=2**53 - 1)
    change_manifest(folder, "tables", 0, "keyer", "multipliers", value=[3, 5, 2**20])
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError) as caught:
        open_sites(bundle)
    reach = (2**53 - 1) * 2**20
    assert str(caught.value) == f"keyer multiplier 1048576 overflows 64 bits: products reach {reach}"


JSON_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 60)
    | st.sampled_from([2**31, 2**53 - 1, 2**53, 2**63, -(2**63)])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        [
            "T",
            "window",
            "float32",
            "int8",
            "none",
            "token",
            NO_FACTOR,
            GRAPH,
            TABLE,
            MAP,
            "/",
            "/dev/null",
            "..",
            "\ud800",
        ]
    )
    | st.text(st.characters(), max_size=4)
)
JSON_VALUES = st.recursive(
    JSON_SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def places_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield every place of a JSON value below the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    for name, item in items:
        yield (*path, name)
        yield from places_of(item, (*path, name))


def refused_or_sound(folder: Path) -> bool:
    """Whether a bundle is refused as damaged, or gives rows as its manifest states; other errors pass through."""
    try:
        bundle = Bundle.open(folder)
        sites = open_sites(bundle)
    except BundleError:
        return True
    token_ids = np.array([0, bundle.manifest.model.vocab_size - 1], dtype=np.int64)
    shapes = [site.rows([], token_ids).shape for site in sites]
    for site in sites:
        site.table.close()
    return shapes == [(2, spec.keyer.columns, spec.record.columns) for spec in bundle.manifest.tables]


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(list(places_of(manifest_json(contents())))), value=JSON_VALUES)
def test_whatever_one_value_of_the_manifest_is_the_bundle_is_refused_or_gives_rows(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str | int, ...], value: object
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated.engram"
    if not folder.exists():
        write_bundle(folder)
    write_manifest(folder, manifest_json(contents()))
    change_manifest(folder, *place, value=value)
    assert refused_or_sound(folder)


@settings(max_examples=300, deadline=None)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3))
def test_whatever_bytes_of_the_manifest_are_changed_the_bundle_is_refused_or_gives_rows(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[float, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "bytes.engram"
    if not folder.exists():
        write_bundle(folder)
    data = bytearray(json.dumps(manifest_json(contents()) | {"format_version": 2}).encode())  # without a seal
    for position, byte in edits:
        data[int(position * (len(data) - 1))] = byte
    (folder / "engram.json").write_bytes(data)
    assert refused_or_sound(folder)


def golden_message(folder: Path, **changes: Any) -> str:
    """Return the error of golden values with some replaced."""
    values = golden_values() | changes
    bundle = Bundle.open(write_bundle(folder, golden=json.dumps(values).encode()))
    with pytest.raises(BundleError) as caught:
        Golden.read(bundle)
    return str(caught.value)


def golden_table(**changes: Any) -> list[dict[str, Any]]:
    return [golden_values()["tables"][0] | changes]


def test_golden_values_are_those_written(folder: Path) -> None:
    golden = Golden.read(Bundle.open(folder))
    (table,) = golden.tables
    assert (golden.token_ids, golden.argmax, golden.last_ids) == (TOKENS, [1, 2, 3, 4, 5], [5, 6])
    assert (golden.last_logits, golden.parity) == ([2.5, -1.0], {"max_abs": 0.5})
    assert (table.site, table.row_ids) == ("layer_1", true_row_ids(TOKENS[:3]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"token_ids": "1"}, f"{GOLDEN}.token_ids is '1', expected a list"),
        ({"argmax": [1, 2, 3, 4, 1.5]}, f"{GOLDEN}.argmax is 1.5, expected a list of 64-bit integers"),
        ({"last_logits": [2.5, "x"]}, f"{GOLDEN}.last_logits is 'x', expected a list of finite numbers"),
        ({"last_logits": [2.5, True]}, f"{GOLDEN}.last_logits is True, expected a list of finite numbers"),
        (
            {"last_logits": [2.5, 10**400]},
            f"{GOLDEN}.last_logits is 100000000000000000...0000000000000000000, expected a list of finite numbers",
        ),
        ({"tables": [1]}, f"{GOLDEN}.tables[0] is 1, expected an object"),
        ({"tables": [{}]}, f"{GOLDEN}.tables[0] has no key 'site'"),
        ({"tables": golden_table(site=1)}, f"{GOLDEN}.tables[0].site is 1, expected a string"),
        ({"tables": golden_table(row_ids=[1])}, f"{GOLDEN}.tables[0].row_ids is 1, expected a list of lists"),
        (
            {"tables": golden_table(row_ids=[["1"]])},
            f"{GOLDEN}.tables[0].row_ids is '1', expected a list of 64-bit integers",
        ),
        ({"tables": golden_table(extra=1)}, f"{GOLDEN}.tables[0] has unknown keys ['extra']; {NEWER}"),
        ({"parity": []}, f"{GOLDEN}.parity is [], expected an object"),
        ({"more": 1}, f"{GOLDEN} has unknown keys ['more']; {NEWER}"),
        ({"tables": []}, f"{GOLDEN} has values of sites [], the bundle has sites ['layer_1']"),
        (
            {"tables": golden_table(site="layer_2")},
            f"{GOLDEN} has values of sites ['layer_2'], the bundle has sites ['layer_1']",
        ),
        (
            {"tables": golden_table(row_ids=[])},
            f"{GOLDEN} has row ids of 0 tokens for site layer_1, expected 1 to 5",
        ),
        (
            {"tables": golden_table(row_ids=[[0]] * 6)},
            f"{GOLDEN} has row ids of 6 tokens for site layer_1, expected 1 to 5",
        ),
        ({"token_ids": []}, f"{GOLDEN} has 0 token ids and 5 argmax, expected as many of both, 1 to 32"),
        ({"argmax": [1]}, f"{GOLDEN} has 5 token ids and 1 argmax, expected as many of both, 1 to 32"),
        (
            {"token_ids": [1] * 33, "argmax": [1] * 33},
            f"{GOLDEN} has 33 token ids and 33 argmax, expected as many of both, 1 to 32",
        ),
        ({"last_ids": [1]}, f"{GOLDEN} has 1 last ids and 2 last logits, expected as many of both"),
        ({"last_ids": [], "last_logits": []}, f"{GOLDEN} has 0 last ids and 0 last logits, expected as many of both"),
        ({"token_ids": [7, 0, 50, 7, 7]}, f"{GOLDEN} has token id 50, expected 0 to 49"),
        ({"argmax": [1, 2, 3, 4, -1]}, f"{GOLDEN} has token id -1, expected 0 to 49"),
        ({"last_ids": [5, 2**40]}, f"{GOLDEN} has token id 1099511627776, expected 0 to 49"),
    ],
)
def test_golden_values_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert golden_message(tmp_path, **changes) == expected


def test_an_infinite_golden_logit_is_refused(tmp_path: Path) -> None:
    text = json.dumps(golden_values()).replace("2.5", "1e999")
    bundle = Bundle.open(write_bundle(tmp_path, golden=text.encode()))
    with pytest.raises(BundleError) as caught:
        Golden.read(bundle)
    assert str(caught.value) == f"{GOLDEN}.last_logits is inf, expected a list of finite numbers"


def test_a_bundle_without_golden_values_is_named(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / GOLDEN).unlink()
    with pytest.raises(BundleError) as caught:
        Golden.read(bundle)
    assert str(caught.value) == f"{folder / GOLDEN} can't be read: No such file or directory"


def opened(folder: Path) -> tuple[Golden, list[Site]]:
    bundle = Bundle.open(folder)
    return Golden.read(bundle), open_sites(bundle)


def test_rows_of_a_whole_bundle_are_golden(folder: Path) -> None:
    golden, sites = opened(folder)
    check_tables(golden, sites)
    assert record_digest(sites[0].rows([], np.array(TOKENS[:3]))) == golden.tables[0].rows_sha256


def test_other_row_ids_than_the_golden_ones_are_named(tmp_path: Path) -> None:
    values = golden_values()
    values["tables"][0]["row_ids"][2][3] += 1
    golden, sites = opened(write_bundle(tmp_path, golden=json.dumps(values).encode()))
    with pytest.raises(VerificationError) as caught:
        check_tables(golden, sites)
    assert str(caught.value) == "row ids of site layer_1 differ from those at export; export again"


def test_other_rows_than_the_golden_ones_are_named(tmp_path: Path) -> None:
    table = bytearray(contents()[TABLE])
    table[HEADER + 8 * true_row_ids(TOKENS)[0][0]] ^= 1
    golden, sites = opened(write_bundle(tmp_path, table=bytes(table)))
    with pytest.raises(VerificationError) as caught:
        check_tables(golden, sites)
    assert str(caught.value) == "rows of site layer_1 differ from those at export; export again"


class ScriptedExecutor:
    """Gives token n of a text the n-th of its logits, whatever the inputs are."""

    name = "scripted"
    threads = 1
    expert_bytes_read = experts_read = None
    float16_states = ()

    def __init__(self, logits: NDArray[np.float32]) -> None:
        self._logits = logits  # [T, V]

    def chunks(self, count: int, spare: int = 0) -> Sequence[int]:
        return [1] * count

    def row_decoder(self, site: str) -> None:
        pass

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        def step(inputs: StepInputs) -> NDArray[np.float32]:
            return self._logits[[inputs.position]]

        return FunctionStep(step)


def scripted_logits(argmax: Sequence[int]) -> NDArray[np.float32]:
    """Return ``[T, V]``: 3 at the argmax of each token, and 2 and -1.5 at ids 5 and 6 of the last."""
    logits = np.zeros((len(argmax), VOCAB), dtype=np.float32)
    logits[-1, [5, 6]] = [2.0, -1.5]
    logits[np.arange(len(argmax)), argmax] = 3
    return logits


def checked(folder: Path, logits: NDArray[np.float32]) -> dict[str, Any]:
    """Hold scripted logits ``[T, V]`` against the golden values of a bundle."""
    bundle = Bundle.open(folder)
    with Session.open(bundle, ScriptedExecutor(logits)) as session:
        return check_logits(Golden.read(bundle), session)


def test_logits_with_the_golden_argmax_agree(folder: Path) -> None:
    report = checked(folder, scripted_logits([1, 2, 3, 4, 5]))
    assert report == {"tokens": 5, "argmax_agreement": 1.0, "mean_regret": 0.0, "last_logits_max_abs": 0.5}


def test_near_ties_may_fall_either_way(folder: Path) -> None:
    logits = scripted_logits([1, 9, 3, 4, 5])
    logits[1, 2] = np.float32(2.999)
    report = checked(folder, logits)
    # 0.001 short at one of five positions, of a spread of 3 less the mean of 50 logits.
    assert report["argmax_agreement"] == 0.8
    assert report["mean_regret"] == pytest.approx(0.001 / (3 - 5.999 / 50) / 5, rel=1e-3)


def test_logits_with_another_argmax_are_refused_with_how_far_they_are_off(folder: Path) -> None:
    with pytest.raises(VerificationError) as caught:
        checked(folder, scripted_logits([1, 9, 3, 4, 5]))
    assert str(caught.value) == (
        "logits differ from those at export: the tokens chosen then are 20.4% short of the best now, "
        "expected at most 2%, and only 80.0% are the same; compile or export again"
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, 0.0, np.inf])
def test_logits_that_say_nothing_are_refused(folder: Path, value: float) -> None:
    with pytest.raises(VerificationError, match="logits differ from those at export"):
        checked(folder, np.full((len(TOKENS), VOCAB), value, dtype=np.float32))
