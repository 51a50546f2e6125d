"""The manifest: it survives a round trip, and every way to spoil it is a BundleError that names the place."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_runtime.bundle import manifest_bytes
from engram_runtime.errors import BundleError
from engram_runtime.keyer_spec import TokenKeyerSpec
from engram_runtime.manifest import Manifest, contained_path
from engram_runtime.records import NO_FACTOR

DIGEST = "0" * 64
Path_ = tuple[str | int, ...]


def sound_manifest() -> dict[str, Any]:
    """Return the JSON of a manifest with one of everything."""
    files = ["graph/decoder.onnx", "graph/weights.safetensors", "tables/layer_1.bin", "tables/layer_1.map"]
    return {
        "format_version": 3,
        "producer": "engram-edge 0.1.0",
        "model": {
            "name": "tiny",
            "family": "llama",
            "quantisation": "int8",
            "vocab_size": 50,
            "hidden_size": 8,
            "num_layers": 2,
            "context_length": 32,
        },
        "graphs": {
            "decoder": {
                "file": files[0],
                "weights": files[1],
                "inputs": [
                    {"name": "token_ids", "dtype": "int64", "shape": ["T"]},
                    {"name": "position", "dtype": "int64", "shape": [1]},
                    {"name": "logit_rows", "dtype": "int64", "shape": ["R"]},
                    {"name": "rows.layer_1", "dtype": "float32", "shape": ["T", 4, 6]},
                ],
                "outputs": [{"name": "logits", "dtype": "float32", "shape": ["R", 50]}],
                "states": [
                    {"name": "key.0", "dtype": "float32", "shape": [1, 2, 32, 4], "kind": "positional"},
                    {"name": "window.layer_1", "dtype": "float32", "shape": [9, 8], "kind": "window"},
                ],
            }
        },
        "tables": [
            {
                "site": "layer_1",
                "num_rows": 36,
                "record": {
                    "payload": "int8",
                    "columns": 6,
                    "scale": "float16",
                    "scale_columns": 6,
                    "factor": NO_FACTOR,
                },
                "parts": [{"row_bytes": 8, "ranges": [row_range(0, 20, 64), row_range(20, 16, 512)]}],
                "keyer": {
                    "kind": "xor_prime",
                    "orders": [2, 3],
                    "num_heads": 2,
                    "multipliers": [3, 5, 7],
                    "primes": [5, 7, 11, 13],
                    "offsets": [0, 5, 12, 23],
                    "pad_id": 2,
                    "barrier_ids": [0, 7],
                    "silent_ids": [7],
                    "token_map": files[3],
                },
            }
        ],
        "files": [{"path": path, "bytes": 7, "sha256": DIGEST} for path in files],
        "extensions": {},
    }


def row_range(first_row: int, num_rows: int, offset: int) -> dict[str, Any]:
    return {
        "first_row": first_row,
        "num_rows": num_rows,
        "file": "tables/layer_1.bin",
        "external": False,
        "offset": offset,
        "identity": None,
    }


def split(path: str) -> Path_:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def parent_of(raw: Any, path: Path_) -> Any:
    for part in path[:-1]:
        raw = raw[part]
    return raw


def changed(path: str, value: object) -> dict[str, Any]:
    """Return the sound manifest with one value replaced or added."""
    raw = sound_manifest()
    parent_of(raw, split(path))[split(path)[-1]] = value
    return raw


def without(path: str) -> dict[str, Any]:
    raw = sound_manifest()
    del parent_of(raw, split(path))[split(path)[-1]]
    return raw


def message(raw: dict[str, Any]) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.from_dict(raw)
    return str(caught.value)


def as_json(manifest: Manifest) -> Any:
    """Return what the manifest's file holds beside the seal."""
    raw = json.loads(manifest_bytes(manifest))
    del raw["sha256"]
    return raw


def parsed(raw: dict[str, Any]) -> Manifest | None:
    """Return the manifest, or None where it is refused with the error that says so; others pass through."""
    try:
        return Manifest.from_dict(raw)
    except BundleError:
        return None


TEXT, NUMBER, LIST, OBJECT = "a string", "an integer", "a list", "an object"
RANGE = "manifest.tables[0].parts[0].ranges[0]"
# Every key: where it stands in the JSON, how errors call that place, and what it must be.
KEYS = [
    ("format_version", "manifest", NUMBER),
    ("producer", "manifest", TEXT),
    ("model", "manifest", OBJECT),
    ("graphs", "manifest", OBJECT),
    ("tables", "manifest", LIST),
    ("files", "manifest", LIST),
    ("extensions", "manifest", OBJECT),
    ("model.name", "manifest.model", TEXT),
    ("model.family", "manifest.model", TEXT),
    ("model.quantisation", "manifest.model", TEXT),
    ("model.vocab_size", "manifest.model", NUMBER),
    ("model.hidden_size", "manifest.model", NUMBER),
    ("model.num_layers", "manifest.model", NUMBER),
    ("model.context_length", "manifest.model", NUMBER),
    ("graphs.decoder.file", "manifest.graphs.decoder", TEXT),
    ("graphs.decoder.weights", "manifest.graphs.decoder", TEXT),
    ("graphs.decoder.inputs", "manifest.graphs.decoder", LIST),
    ("graphs.decoder.outputs", "manifest.graphs.decoder", LIST),
    ("graphs.decoder.states", "manifest.graphs.decoder", LIST),
    ("graphs.decoder.inputs.0.name", "manifest.graphs.decoder.inputs[0]", TEXT),
    ("graphs.decoder.inputs.0.dtype", "manifest.graphs.decoder.inputs[0]", TEXT),
    ("graphs.decoder.inputs.0.shape", "manifest.graphs.decoder.inputs[0]", LIST),
    ("graphs.decoder.outputs.0.name", "manifest.graphs.decoder.outputs[0]", TEXT),
    ("graphs.decoder.outputs.0.dtype", "manifest.graphs.decoder.outputs[0]", TEXT),
    ("graphs.decoder.outputs.0.shape", "manifest.graphs.decoder.outputs[0]", LIST),
    ("graphs.decoder.states.0.name", "manifest.graphs.decoder.states[0]", TEXT),
    ("graphs.decoder.states.0.dtype", "manifest.graphs.decoder.states[0]", TEXT),
    ("graphs.decoder.states.0.shape", "manifest.graphs.decoder.states[0]", LIST),
    ("graphs.decoder.states.0.kind", "manifest.graphs.decoder.states[0]", TEXT),
    ("tables.0.site", "manifest.tables[0]", TEXT),
    ("tables.0.num_rows", "manifest.tables[0]", NUMBER),
    ("tables.0.record", "manifest.tables[0]", OBJECT),
    ("tables.0.parts", "manifest.tables[0]", LIST),
    ("tables.0.keyer", "manifest.tables[0]", OBJECT),
    ("tables.0.record.payload", "manifest.tables[0].record", TEXT),
    ("tables.0.record.columns", "manifest.tables[0].record", NUMBER),
    ("tables.0.record.scale", "manifest.tables[0].record", TEXT),
    ("tables.0.record.scale_columns", "manifest.tables[0].record", NUMBER),
    ("tables.0.record.factor", "manifest.tables[0].record", TEXT),
    ("tables.0.parts.0.row_bytes", "manifest.tables[0].parts[0]", NUMBER),
    ("tables.0.parts.0.ranges", "manifest.tables[0].parts[0]", LIST),
    ("tables.0.parts.0.ranges.0.first_row", RANGE, NUMBER),
    ("tables.0.parts.0.ranges.0.num_rows", RANGE, NUMBER),
    ("tables.0.parts.0.ranges.0.file", RANGE, TEXT),
    ("tables.0.parts.0.ranges.0.external", RANGE, "true or false"),
    ("tables.0.parts.0.ranges.0.offset", RANGE, NUMBER),
    ("tables.0.parts.0.ranges.0.identity", RANGE, "a string or null"),
    ("tables.0.keyer.kind", "manifest.tables[0].keyer", TEXT),
    ("tables.0.keyer.orders", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.num_heads", "manifest.tables[0].keyer", NUMBER),
    ("tables.0.keyer.multipliers", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.primes", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.offsets", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.pad_id", "manifest.tables[0].keyer", NUMBER),
    ("tables.0.keyer.barrier_ids", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.silent_ids", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.token_map", "manifest.tables[0].keyer", "a string or null"),
    ("files.0.path", "manifest.files[0]", TEXT),
    ("files.0.bytes", "manifest.files[0]", NUMBER),
    ("files.0.sha256", "manifest.files[0]", TEXT),
]
VALUES = [key for key in KEYS if key[2] != OBJECT]
COUNTS = [(path, where) for path, where, kind in KEYS if kind == NUMBER]
INTEGER_LISTS = [
    ("graphs.decoder.states.0.shape", "manifest.graphs.decoder.states[0].shape"),
    ("tables.0.keyer.orders", "manifest.tables[0].keyer.orders"),
    ("tables.0.keyer.multipliers", "manifest.tables[0].keyer.multipliers"),
    ("tables.0.keyer.primes", "manifest.tables[0].keyer.primes"),
    ("tables.0.keyer.offsets", "manifest.tables[0].keyer.offsets"),
    ("tables.0.keyer.barrier_ids", "manifest.tables[0].keyer.barrier_ids"),
    ("tables.0.keyer.silent_ids", "manifest.tables[0].keyer.silent_ids"),
]
# What each item of a list must be made of.
OBJECTS = [
    ("model", "manifest.model"),
    ("graphs", "manifest.graphs"),
    ("graphs.decoder", "manifest.graphs.decoder"),
    ("graphs.decoder.inputs.0", "manifest.graphs.decoder.inputs[0]"),
    ("graphs.decoder.outputs.0", "manifest.graphs.decoder.outputs[0]"),
    ("graphs.decoder.states.0", "manifest.graphs.decoder.states[0]"),
    ("tables.0", "manifest.tables[0]"),
    ("tables.0.record", "manifest.tables[0].record"),
    ("tables.0.parts.0", "manifest.tables[0].parts[0]"),
    ("tables.0.parts.0.ranges.0", RANGE),
    ("tables.0.keyer", "manifest.tables[0].keyer"),
    ("files.0", "manifest.files[0]"),
]


def keys_of(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the place of every key, of lists only those of the first item."""
    items = value.items() if isinstance(value, dict) else [("0", value[0])] if isinstance(value, list) else []
    for name, item in items:
        if isinstance(value, dict):
            yield prefix + name
        yield from keys_of(item, f"{prefix}{name}.")


def test_the_tables_above_know_every_key() -> None:
    optional = ["graphs.decoder"]
    assert sorted(keys_of(sound_manifest())) == sorted([*(path for path, _, _ in KEYS), *optional])


def test_a_manifest_equals_itself_after_a_round_trip() -> None:
    manifest = Manifest.from_dict(sound_manifest())
    assert Manifest.from_dict(as_json(manifest)) == manifest


def test_the_json_of_a_manifest_is_what_it_was_read_from() -> None:
    assert as_json(Manifest.from_dict(sound_manifest())) == sound_manifest()


def test_extensions_may_hold_anything() -> None:
    raw = changed("extensions", {"vendor": {"float": 1.5, "list": [None]}})
    assert Manifest.from_dict(raw) == Manifest.from_dict(sound_manifest())


def test_a_manifest_without_tables_is_sound() -> None:
    raw = changed("tables", [])
    del raw["graphs"]["decoder"]["inputs"][3]
    assert Manifest.from_dict(raw).tables == ()


def test_a_table_may_have_more_rows_than_its_keyer_needs() -> None:
    raw = changed("tables.0.num_rows", 128)
    raw["tables"][0]["parts"][0]["ranges"][1]["num_rows"] = 108
    table = Manifest.from_dict(raw).tables[0]
    assert (table.num_rows, table.keyer.min_rows) == (128, 36)


def token_table(**keyer: int) -> dict[str, Any]:
    """Return the sound manifest with its table keyed by the token."""
    raw = changed("tables.0.keyer", {"kind": "token", "vocab_size": 36, "pad_id": 0} | keyer)
    raw["graphs"]["decoder"]["inputs"][3]["shape"] = ["T", 1, 6]
    return raw


def test_a_table_keyed_by_the_token_equals_itself_after_a_round_trip() -> None:
    manifest = Manifest.from_dict(token_table())
    assert as_json(manifest) == token_table()
    assert manifest.tables[0].keyer == TokenKeyerSpec(vocab_size=36, pad_id=0)


@pytest.mark.parametrize(
    ("keyer", "expected"),
    [
        ({"vocab_size": 37}, "table layer_1 has 36 rows, its keyer needs 37"),
        ({"pad_id": 36}, "keyer has pad_id 36, expected an id below 36"),
        ({"vocab_size": 0}, "manifest.tables[0].keyer.vocab_size is 0, expected an integer from 1 to 2**53 - 1"),
        (
            {"primes": 1},
            "manifest.tables[0].keyer has unknown keys ['primes']; it may need a newer engram-edge",
        ),
    ],
)
def test_a_token_keyer_that_contradicts_its_table_is_refused(keyer: dict[str, int], expected: str) -> None:
    assert message(token_table(**keyer)) == expected


def site_only(**graph: Any) -> dict[str, Any]:
    """Return the sound manifest with its decoder made the graph of the site."""
    raw = sound_manifest()
    graphs = raw["graphs"]
    graphs["site.layer_1"] = graphs.pop("decoder") | {"inputs": [rows_input(), hidden_input()]} | graph
    return raw


def rows_input(name: str = "rows.layer_1", columns: int = 6) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": ["T", 4, columns]}


def hidden_input() -> dict[str, Any]:
    return {"name": "hidden", "dtype": "float32", "shape": ["T", 8]}


def test_a_bundle_may_hold_sites_and_no_decoder() -> None:
    manifest = Manifest.from_dict(site_only())
    assert as_json(manifest) == site_only()
    assert list(manifest.graphs) == ["site.layer_1"]


def test_a_bundle_may_hold_tables_and_no_graph() -> None:
    assert Manifest.from_dict(changed("graphs", {})).graphs == {}


def test_a_decoder_that_is_not_there_is_named_when_it_is_asked_for() -> None:
    manifest = Manifest.from_dict(site_only())
    with pytest.raises(BundleError) as caught:
        _ = manifest.decoder
    assert str(caught.value) == (
        "this bundle holds tables and sites only, no decoder; export without --tables-only to run it"
    )


EXPECTED_ROWS = "('rows.layer_1', 'float32', ('T', 4, 6))"


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ([hidden_input()], ""),
        ([rows_input(columns=5)], "('rows.layer_1', 'float32', ('T', 4, 5))"),
        ([rows_input(), rows_input("rows.layer_2")], f"{EXPECTED_ROWS}, ('rows.layer_2', 'float32', ('T', 4, 6))"),
    ],
)
def test_a_site_graph_takes_the_rows_of_its_table_alone(inputs: list[Any], found: str) -> None:
    expected = f"graph site.layer_1 takes rows [{found}], its table gives [{EXPECTED_ROWS}]"
    assert message(site_only(inputs=inputs)) == expected


@pytest.mark.parametrize("name", ["encoder", "site.layer_2", "site."])
def test_a_graph_of_an_unknown_name_is_refused(name: str) -> None:
    raw = sound_manifest()
    raw["graphs"][name] = raw["graphs"].pop("decoder")
    assert message(raw) == f"graph {name!r} is unknown; expected 'decoder', 'mtp' or one of ['site.layer_1']"


def test_raw_ids_may_be_hashed() -> None:
    table = Manifest.from_dict(changed("tables.0.keyer.token_map", None)).tables[0]
    assert table.keyer.files == ()


@pytest.mark.parametrize(("path", "where", "expected"), VALUES)
def test_a_value_of_another_type_is_named(path: str, where: str, expected: str) -> None:
    assert message(changed(path, 1.5)) == f"{where}.{split(path)[-1]} is 1.5, expected {expected}"


@pytest.mark.parametrize(("path", "where"), OBJECTS)
def test_something_else_in_place_of_an_object_is_named(path: str, where: str) -> None:
    assert message(changed(path, [])) == f"{where} is [], expected an object"


@pytest.mark.parametrize(("path", "where", "expected"), KEYS)
def test_a_missing_key_is_named(path: str, where: str, expected: str) -> None:
    assert message(without(path)) == f"{where} has no key {split(path)[-1]!r}"


@pytest.mark.parametrize(("path", "where"), [("", "manifest"), *(place for place in OBJECTS if place[0] != "graphs")])
def test_unknown_keys_are_named(path: str, where: str) -> None:
    raw = changed(f"{path}.surprise".lstrip("."), 1)
    assert message(raw) == f"{where} has unknown keys ['surprise']; it may need a newer engram-edge"


@pytest.mark.parametrize("value", [-1, 2**53, 2**64])
@pytest.mark.parametrize(("path", "where"), COUNTS)
def test_a_count_out_of_range_is_named(path: str, where: str, value: int) -> None:
    assert message(changed(path, value)).startswith(f"{where}.{split(path)[-1]} is {value}, expected an integer from ")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_layers", "context_length"])
def test_a_model_without_size_is_refused(key: str) -> None:
    expected = f"manifest.model.{key} is 0, expected an integer from 1 to 2**53 - 1"
    assert message(changed(f"model.{key}", 0)) == expected


@pytest.mark.parametrize("value", [True, "1", 2**63, -(2**63) - 1, None])
@pytest.mark.parametrize(("path", "where"), INTEGER_LISTS)
def test_an_item_that_is_no_64_bit_integer_is_named(path: str, where: str, value: object) -> None:
    assert message(changed(f"{path}.0", value)) == f"{where} is {value!r}, expected a list of 64-bit integers"


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_counts_are_integers_and_nothing_like_them(value: object) -> None:
    expected = f"manifest.model.vocab_size is {value!r}, expected an integer"
    assert message(changed("model.vocab_size", value)) == expected


@pytest.mark.parametrize(("value", "shown"), [("a\0b", r"'a\x00b'"), ("a\ud800", r"'a\ud800'")])
@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("producer", "manifest.producer"),
        ("tables.0.parts.0.ranges.0.file", f"{RANGE}.file"),
        ("tables.0.keyer.token_map", "manifest.tables[0].keyer.token_map"),
        ("files.0.path", "manifest.files[0].path"),
    ],
)
def test_text_that_can_name_no_file_is_refused(path: str, where: str, value: str, shown: str) -> None:
    assert message(changed(path, value)) == f"{where} is {shown}, expected text without NUL and lone surrogates"


def test_a_value_nested_deeper_than_python_can_print_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert message(changed("producer", deep)) == "manifest.producer is [[[[[[[...]]]]]]], expected a string"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("format_version", 1, "bundle has format version 1, this runtime reads 2 and 3; export it again"),
        ("format_version", 4, "bundle has format version 4, this runtime reads 2 and 3; it needs a newer engram-edge"),
        (
            "graphs.decoder.states.0.kind",
            "ring",
            "state key.0 is float32 [1, 2, 32, 4] ring, which can't be held",
        ),
        (
            "graphs.decoder.states.0.dtype",
            "float16",
            "state key.0 is float16 [1, 2, 32, 4] positional, which can't be held",
        ),
        ("graphs.decoder.states.1.shape", [9, 0], "state window.layer_1 is float32 [9, 0] window, which can't be held"),
        (
            "graphs.decoder.states.1.shape",
            [-9, 8],
            "state window.layer_1 is float32 [-9, 8] window, which can't be held",
        ),
        (
            "graphs.decoder.states.1",
            {"name": "state.1", "dtype": "float32", "shape": [1, 0, 4, 6], "kind": "recurrent"},
            "state state.1 is float32 [1, 0, 4, 6] recurrent, which can't be held",
        ),
        ("graphs.decoder.states.0.shape", [], "state key.0 is float32 [] positional, which can't be held"),
        ("graphs.decoder.states.0.shape", [32], "state key.0 is float32 [32] positional, which can't be held"),
        (
            "graphs.decoder.states.0.shape",
            [1, 1, 1, 1, 1, 1, 1, 1, 1],
            "state key.0 is float32 [1, 1, 1, 1, 1, 1, ...] positional, which can't be held",
        ),
        (
            "graphs.decoder.states.0.shape",
            [2**31 - 1, 2**31 - 1, 4],
            "state key.0 is float32 [2147483647, 2147483647, 4] positional, which can't be held",
        ),
        ("graphs.decoder.file", "graph/other", "manifest refers to 'graph/other', which is not among its files"),
        ("graphs.decoder.weights", "/etc/passwd", "manifest refers to '/etc/passwd', which is not among its files"),
        ("tables.0.keyer.token_map", "../map", "manifest refers to '../map', which is not among its files"),
        ("tables.0.parts.0.ranges.0.file", "../rows", "manifest refers to '../rows', which is not among its files"),
        (
            "tables.0.parts.0.ranges.0.file",
            "/rows",
            "table file /rows must be absolute if external and relative if not",
        ),
        (
            "tables.0.parts.0.ranges.0.external",
            True,
            "table file tables/layer_1.bin must be absolute if external and relative if not",
        ),
        (
            "tables.0.parts.0.ranges.0.identity",
            DIGEST,
            "table file tables/layer_1.bin must have an identity if external and none if not",
        ),
        (
            "tables.0.parts.0.ranges.0",
            row_range(0, 36, 0) | {"file": "/rows", "external": True},
            "table file /rows must have an identity if external and none if not",
        ),
        (
            "tables.0.parts.0.row_bytes",
            0,
            "manifest.tables[0].parts[0].row_bytes is 0, expected an integer from 1 to 2**53 - 1",
        ),
        (
            "tables.0.parts.0.ranges.0.num_rows",
            0,
            f"{RANGE}.num_rows is 0, expected an integer from 1 to 2**53 - 1",
        ),
        ("tables.0.parts.0.row_bytes", 7, "table layer_1 has 7 bytes a row in its parts, its record 8"),
        ("tables.0.parts", [], "table layer_1 has 0 bytes a row in its parts, its record 8"),
        ("tables.0.parts.0.ranges", [], "part 0 of table layer_1 has 0 rows, expected 36"),
        (
            "tables.0.parts.0.ranges.0.first_row",
            1,
            "part 0 of table layer_1 goes on with row 1, expected row 0",
        ),
        (
            "tables.0.parts.0.ranges.1.first_row",
            19,
            "part 0 of table layer_1 goes on with row 19, expected row 20",
        ),
        (
            "tables.0.parts.0.ranges.0.num_rows",
            19,
            "part 0 of table layer_1 goes on with row 20, expected row 19",
        ),
        ("tables.0.parts.0.ranges.1.num_rows", 15, "part 0 of table layer_1 has 35 rows, expected 36"),
        ("tables.0.parts.0.ranges.1.num_rows", 17, "part 0 of table layer_1 has 37 rows, expected 36"),
        ("tables.0.num_rows", 35, "table layer_1 has 35 rows, its keyer needs 36"),
        ("tables.0.num_rows", 128, "part 0 of table layer_1 has 36 rows, expected 128"),
        (
            "tables.0.record",
            {"payload": "int8", "columns": 5, "scale": "float16", "scale_columns": 5, "factor": NO_FACTOR},
            "table layer_1 has 8 bytes a row in its parts, its record 7",
        ),
        ("tables.0.record.columns", 5, "record has scale_columns 6, expected a divisor of 5"),
        ("tables.0.record.scale_columns", 4, "record has scale_columns 4, expected a divisor of 6"),
        ("tables.0.record.scale_columns", 0, "record has scale_columns 0, expected a divisor of 6"),
        ("tables.0.record.scale_columns", 3, "table layer_1 has 8 bytes a row in its parts, its record 10"),
        (
            "tables.0.record.factor",
            "1.0",
            f"record factor is '1.0', expected a positive float32 spelt like {NO_FACTOR}",
        ),
        ("tables.0.record.columns", 0, "record has 0 columns, expected at least 1"),
        (
            "tables.0.record.scale",
            "float64",
            "record of int8 with scale float64 is unknown; payloads are ['bfloat16', 'float16', 'float32', "
            "'float8_e4m3', 'int4', 'int8'], scales ['e8m0', 'float16', 'float32', 'none']",
        ),
        ("tables.0.keyer.kind", "splitmix", "keyer kind 'splitmix' is unknown; known are ['token', 'xor_prime']"),
        ("tables.0.keyer.num_heads", 3, "keyer has 4 primes and 4 offsets, expected 6 of each"),
        ("tables.0.keyer.num_heads", 0, "keyer has 4 primes and 4 offsets, expected 0 of each"),
        ("tables.0.keyer.primes", [5, 7, 11], "keyer has 3 primes and 4 offsets, expected 4 of each"),
        ("tables.0.keyer.offsets", [0], "keyer has 4 primes and 1 offsets, expected 4 of each"),
        ("tables.0.keyer.primes", [7, 5, 11, 13], "keyer offset is 5, the primes before it sum to 7"),
        ("tables.0.keyer.primes", [5, 7, 11, 17], "table layer_1 has 36 rows, its keyer needs 40"),
        ("tables.0.keyer.primes", [5, 7, 11, 1], "keyer has primes [5, 7, 11, 1], expected numbers from 2"),
        ("tables.0.keyer.offsets", [1, 5, 12, 23], "keyer offset is 1, the primes before it sum to 0"),
        ("tables.0.keyer.offsets", [0, 5, 12, 24], "keyer offset is 24, the primes before it sum to 23"),
        ("tables.0.keyer.multipliers", [3, 5], "keyer has multipliers [3, 5], expected 3 positive"),
        ("tables.0.keyer.multipliers", [3, 0, 7], "keyer has multipliers [3, 0, 7], expected 3 positive"),
        ("tables.0.keyer.barrier_ids", [7, 0], "keyer has barrier_ids [7, 0], expected ascending ids from 0"),
        ("tables.0.keyer.barrier_ids", [-1, 0], "keyer has barrier_ids [-1, 0], expected ascending ids from 0"),
        (
            "tables.0.keyer.barrier_ids",
            list(range(1000, 0, -1)),
            "keyer has barrier_ids [1000, 999, 998, 997, 996, 995, ...], expected ascending ids from 0",
        ),
        ("tables.0.keyer.silent_ids", [7, 7], "keyer has silent_ids [7, 7], expected ascending ids from 0"),
        ("tables.0.keyer.silent_ids", [50], "keyer names token id 50, the vocabulary has 50 tokens"),
        ("tables.0.keyer.barrier_ids", [60], "keyer names token id 60, the vocabulary has 50 tokens"),
    ],
)
def test_a_value_that_contradicts_the_others_is_refused(path: str, value: object, expected: str) -> None:
    assert message(changed(path, value)) == expected


INPUTS = "('token_ids', 'int64', ('T',)), ('position', 'int64', (1,)), ('logit_rows', 'int64', ('R',))"


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        ("3.name", "rows.layer_2", "('rows.layer_2', 'float32', ('T', 4, 6))"),
        ("3.dtype", "int64", "('rows.layer_1', 'int64', ('T', 4, 6))"),
        ("3.shape", ["T", 6, 4], "('rows.layer_1', 'float32', ('T', 6, 4))"),
    ],
)
def test_inputs_of_the_graph_that_are_not_those_of_the_tables_are_refused(path: str, value: object, found: str) -> None:
    expected = "('rows.layer_1', 'float32', ('T', 4, 6))"
    assert message(changed(f"graphs.decoder.inputs.{path}", value)) == (
        f"the graph's inputs are [{INPUTS}, {found}], its tables call for [{INPUTS}, {expected}]"
    )


def test_rows_that_no_table_gives_are_refused() -> None:
    assert message(changed("tables", [])) == (
        f"the graph's inputs are [{INPUTS}, ('rows.layer_1', 'float32', ('T', 4, 6))], its tables call for [{INPUTS}]"
    )


def test_logits_of_another_vocabulary_are_refused() -> None:
    assert message(changed("model.vocab_size", 51)) == (
        "the graph's outputs are [('logits', 'float32', ('R', 50))], "
        "its vocabulary calls for [('logits', 'float32', ('R', 51))]"
    )


ACTIVITY = {"name": "activity.layer_1", "dtype": "float32", "shape": ["T", 2, 3]}


def with_activity(*outputs: dict[str, Any]) -> dict[str, Any]:
    """Return the sound manifest with more outputs of its decoder."""
    raw = sound_manifest()
    raw["graphs"]["decoder"]["outputs"] += outputs
    return raw


def test_a_graph_may_say_what_its_sites_do() -> None:
    assert Manifest.from_dict(sound_manifest()).decoder.activity_outputs == ()
    assert Manifest.from_dict(with_activity(ACTIVITY)).decoder.activity_outputs == ("activity.layer_1",)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"name": "activity.layer_2"}, "('activity.layer_2', 'float32', ('T', 2, 3))"),
        ({"dtype": "float16"}, "('activity.layer_1', 'float16', ('T', 2, 3))"),
        ({"shape": ["T", "R", 3]}, "('activity.layer_1', 'float32', ('T', 'R', 3))"),
        ({"shape": ["T", 2, 4]}, "('activity.layer_1', 'float32', ('T', 2, 4))"),
        ({"shape": ["R", 2, 3]}, "('activity.layer_1', 'float32', ('R', 2, 3))"),
        ({"shape": ["T", 3]}, "('activity.layer_1', 'float32', ('T', 3))"),
    ],
)
def test_outputs_that_are_no_sites_are_refused(change: dict[str, Any], found: str) -> None:
    assert message(with_activity({**ACTIVITY, **change})) == (
        f"the graph has output {found}, expected one of ['activity.layer_1'], float32 ('T', streams, 3)"
    )


def test_a_site_says_what_it_does_once() -> None:
    assert message(with_activity(ACTIVITY, ACTIVITY)) == "manifest names output 'activity.layer_1' twice"


def test_only_states_with_an_entry_per_position_are_as_long_as_the_context() -> None:
    """A key/value cache rolls back, window and recurrent state do not; their sizes are their own."""
    raw = sound_manifest()
    states = raw["graphs"]["decoder"]["states"]
    states.append({"name": "state.1", "dtype": "float32", "shape": [1, 2, 4, 6], "kind": "recurrent"})
    read = Manifest.from_dict(raw).decoder.states
    assert [(state.kind, state.rolls_back) for state in read] == [
        ("positional", True),
        ("window", False),
        ("recurrent", False),
    ]
    states[2]["kind"] = "positional"
    assert message(raw) == "state state.1 has shape [1, 2, 4, 6], expected 32 positions on its second-last axis"


def test_a_cache_of_another_length_than_the_context_is_refused() -> None:
    expected = "state key.0 has shape [1, 2, 32, 4], expected 31 positions on its second-last axis"
    assert message(changed("model.context_length", 31)) == expected


@pytest.mark.parametrize("orders", [[], [3, 2], [2, 2], [0, 3], [-1, 3], [2, 17]])
def test_ngram_orders_ascend_from_1_to_16(orders: list[int]) -> None:
    expected = f"n-gram orders are {orders}, expected ascending lengths from 1 to 16"
    assert message(changed("tables.0.keyer.orders", orders)) == expected


@pytest.mark.parametrize("axis", [1.5, None, True, "X", "t", 0, -1, 2**31, [], {}])
@pytest.mark.parametrize(("path", "name"), [("inputs", "token_ids"), ("outputs", "logits")])
def test_the_axes_of_a_tensor_are_sizes_or_names(path: str, name: str, axis: object) -> None:
    expected = f"tensor {name} has axis {axis!r}, expected a size or one of ['T', 'R']"
    assert message(changed(f"graphs.decoder.{path}.0.shape", ["T", axis])) == expected


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("files", "file 'graph/decoder.onnx'"),
        ("tables", "table site 'layer_1'"),
        ("graphs.decoder.states", "state 'key.0'"),
    ],
)
def test_a_name_that_stands_twice_is_refused(path: str, what: str) -> None:
    items = parent_of(sound_manifest(), split(path))[split(path)[-1]]
    assert message(changed(path, [*items, items[0]])) == f"manifest names {what} twice"


@pytest.mark.parametrize(
    "path", ["", ".", "..", "../up", "a/../b", "/etc/passwd", "//a", "a//b", "a/", "a/./b", "a\\b", "..\\up", "a\0"]
)
def test_paths_that_leave_the_bundle_are_refused(path: str) -> None:
    with pytest.raises(BundleError) as caught:
        contained_path(path)
    assert str(caught.value) == f"path {path!r} leaves the bundle; only plain relative paths are allowed"


def test_a_listed_file_outside_the_bundle_is_refused() -> None:
    expected = "path '../up' leaves the bundle; only plain relative paths are allowed"
    assert message(changed("files.0.path", "../up")) == expected


@pytest.mark.parametrize("path", ["a", "a/b.c", "..a/b..", "a b/c", ".hidden", "über/日本"])
def test_plain_relative_paths_stay_as_they_are(path: str) -> None:
    assert contained_path(path) == path


def places_of(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Yield every place of a JSON value below the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    for name, item in items:
        yield (*path, name)
        yield from places_of(item, (*path, name))


PLACES = list(places_of(sound_manifest()))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 60)
    | st.sampled_from([2**31, 2**53, 2**63, -(2**63)])
    | st.integers()
    | st.floats()
    | st.sampled_from(
        ["T", "R", "window", "float32", "int8", "token", NO_FACTOR, "graph/decoder.onnx", "/", "..", "\0", "\ud800"]
    )
    | st.text(st.characters(), max_size=5)
)
VALUES_OF_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated_manifests(draw: st.DrawFn) -> dict[str, Any]:
    """Replace, delete or add up to three values anywhere in a sound manifest."""
    raw = sound_manifest()
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(PLACES))
        mutation = draw(st.sampled_from(["replace", "swap", "delete", "add"]))
        try:
            parent = parent_of(raw, path)
            if mutation == "replace":
                parent[path[-1]] = draw(VALUES_OF_JSON)
            elif mutation == "swap":
                other = draw(st.sampled_from(PLACES))
                parent[path[-1]] = copy.deepcopy(parent_of(raw, other)[other[-1]])
            elif mutation == "delete":
                del parent[path[-1]]
            elif isinstance(parent, list):
                parent.append(draw(VALUES_OF_JSON))
            else:
                parent[draw(st.text(max_size=3))] = draw(VALUES_OF_JSON)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier mutation removed the place
    return raw


@settings(max_examples=500, deadline=None)
@given(raw=mutated_manifests())
def test_a_mutated_manifest_is_refused_or_read_as_it_stands(raw: dict[str, Any]) -> None:
    manifest = parsed(copy.deepcopy(raw))
    assert manifest is None or as_json(manifest) == {**raw, "extensions": {}}


@settings(max_examples=200, deadline=None)
@given(raw=st.dictionaries(st.text(max_size=3) | st.sampled_from(sorted(sound_manifest())), VALUES_OF_JSON, max_size=9))
def test_arbitrary_json_is_no_manifest(raw: dict[str, Any]) -> None:
    assert parsed(raw) is None


def omitting(*paths: str) -> dict[str, Any]:
    """Return a sound manifest without some of its files, which it says it omits."""
    raw = sound_manifest()
    omitted = [entry for entry in raw["files"] if entry["path"] in paths]
    return raw | {"files": [entry for entry in raw["files"] if entry not in omitted], "omitted": omitted}


def test_graphs_may_be_omitted() -> None:
    raw = omitting("graph/decoder.onnx", "graph/weights.safetensors")
    manifest = Manifest.from_dict(raw)
    assert as_json(manifest) == raw
    assert manifest.entry("graph/decoder.onnx") == Manifest.from_dict(sound_manifest()).entry("graph/decoder.onnx")


@pytest.mark.parametrize("omitted", [None, []])
def test_a_manifest_that_omits_nothing_need_not_say_so(omitted: object) -> None:
    manifest = Manifest.from_dict(sound_manifest() | {"omitted": omitted})
    assert as_json(manifest) == sound_manifest()


def test_only_graphs_are_omitted_and_files_once() -> None:
    raw = omitting("tables/layer_1.bin")
    with pytest.raises(BundleError, match=r"^manifest omits 'tables/layer_1.bin', which is no graph's file$"):
        Manifest.from_dict(raw)
    raw = omitting("graph/decoder.onnx")
    raw["files"] += raw["omitted"]
    with pytest.raises(BundleError, match=r"^manifest names file 'graph/decoder.onnx' twice$"):
        Manifest.from_dict(raw)
