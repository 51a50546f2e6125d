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
from engram_runtime.manifest import Manifest, contained_path

DIGEST = "0" * 64
Path_ = tuple[str | int, ...]


def sound_manifest() -> dict[str, Any]:
    """Return the JSON of a manifest with one of everything."""
    files = ["graph/decoder.onnx", "graph/weights.safetensors", "tables/layer_1.bin", "tables/layer_1.map"]
    return {
        "format_version": 1,
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
                "record": {"payload": "int8", "columns": 6, "scale": "float16"},
                "extents": [{"file": files[2], "external": False, "offset": 64, "row_bytes": 8, "identity": None}],
                "keyer": {
                    "kind": "xor_prime",
                    "orders": [2, 3],
                    "num_heads": 2,
                    "multipliers": [3, 5, 7],
                    "primes": [5, 7, 11, 13],
                    "offsets": [0, 5, 12, 23],
                    "pad_id": 2,
                    "token_map": files[3],
                },
            }
        ],
        "files": [{"path": path, "bytes": 7, "sha256": DIGEST} for path in files],
        "extensions": {},
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
    return json.loads(manifest_bytes(manifest))


def parsed(raw: dict[str, Any]) -> Manifest | None:
    """Return the manifest, or None where it is refused with the error that says so; others pass through."""
    try:
        return Manifest.from_dict(raw)
    except BundleError:
        return None


TEXT, NUMBER, LIST, OBJECT = "a string", "an integer", "a list", "an object"
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
    ("graphs.decoder", "manifest.graphs", OBJECT),
    ("graphs.decoder.file", "manifest.graphs.decoder", TEXT),
    ("graphs.decoder.weights", "manifest.graphs.decoder", TEXT),
    ("graphs.decoder.inputs", "manifest.graphs.decoder", LIST),
    ("graphs.decoder.outputs", "manifest.graphs.decoder", LIST),
    ("graphs.decoder.states", "manifest.graphs.decoder", LIST),
    ("graphs.decoder.inputs.0.name", "decoder.inputs[0]", TEXT),
    ("graphs.decoder.inputs.0.dtype", "decoder.inputs[0]", TEXT),
    ("graphs.decoder.inputs.0.shape", "decoder.inputs[0]", LIST),
    ("graphs.decoder.outputs.0.name", "decoder.outputs[0]", TEXT),
    ("graphs.decoder.outputs.0.dtype", "decoder.outputs[0]", TEXT),
    ("graphs.decoder.outputs.0.shape", "decoder.outputs[0]", LIST),
    ("graphs.decoder.states.0.name", "decoder.states[0]", TEXT),
    ("graphs.decoder.states.0.dtype", "decoder.states[0]", TEXT),
    ("graphs.decoder.states.0.shape", "decoder.states[0]", LIST),
    ("graphs.decoder.states.0.kind", "decoder.states[0]", TEXT),
    ("tables.0.site", "manifest.tables[0]", TEXT),
    ("tables.0.num_rows", "manifest.tables[0]", NUMBER),
    ("tables.0.record", "manifest.tables[0]", OBJECT),
    ("tables.0.extents", "manifest.tables[0]", LIST),
    ("tables.0.keyer", "manifest.tables[0]", OBJECT),
    ("tables.0.record.payload", "manifest.tables[0].record", TEXT),
    ("tables.0.record.columns", "manifest.tables[0].record", NUMBER),
    ("tables.0.record.scale", "manifest.tables[0].record", TEXT),
    ("tables.0.extents.0.file", "table.extents[0]", TEXT),
    ("tables.0.extents.0.external", "table.extents[0]", "true or false"),
    ("tables.0.extents.0.offset", "table.extents[0]", NUMBER),
    ("tables.0.extents.0.row_bytes", "table.extents[0]", NUMBER),
    ("tables.0.extents.0.identity", "table.extents[0]", "a string or null"),
    ("tables.0.keyer.kind", "manifest.tables[0].keyer", TEXT),
    ("tables.0.keyer.orders", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.num_heads", "manifest.tables[0].keyer", NUMBER),
    ("tables.0.keyer.multipliers", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.primes", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.offsets", "manifest.tables[0].keyer", LIST),
    ("tables.0.keyer.pad_id", "manifest.tables[0].keyer", NUMBER),
    ("tables.0.keyer.token_map", "manifest.tables[0].keyer", "a string or null"),
    ("files.0.path", "manifest.files[0]", TEXT),
    ("files.0.bytes", "manifest.files[0]", NUMBER),
    ("files.0.sha256", "manifest.files[0]", TEXT),
]
VALUES = [key for key in KEYS if key[2] != OBJECT]
COUNTS = [(path, where) for path, where, kind in KEYS if kind == NUMBER]
INTEGER_LISTS = [
    ("graphs.decoder.states.0.shape", "decoder.states[0].shape"),
    ("tables.0.keyer.orders", "manifest.tables[0].keyer.orders"),
    ("tables.0.keyer.multipliers", "manifest.tables[0].keyer.multipliers"),
    ("tables.0.keyer.primes", "manifest.tables[0].keyer.primes"),
    ("tables.0.keyer.offsets", "manifest.tables[0].keyer.offsets"),
]
# What each item of a list must be made of.
OBJECTS = [
    ("model", "manifest.model"),
    ("graphs", "manifest.graphs"),
    ("graphs.decoder", "manifest.graphs.decoder"),
    ("graphs.decoder.inputs.0", "decoder.inputs[0]"),
    ("graphs.decoder.outputs.0", "decoder.outputs[0]"),
    ("graphs.decoder.states.0", "decoder.states[0]"),
    ("tables.0", "manifest.tables[0]"),
    ("tables.0.record", "manifest.tables[0].record"),
    ("tables.0.extents.0", "table.extents[0]"),
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
    assert sorted(keys_of(sound_manifest())) == sorted(path for path, _, _ in KEYS)


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


def test_raw_ids_may_be_hashed() -> None:
    table = Manifest.from_dict(changed("tables.0.keyer.token_map", None)).tables[0]
    assert table.keyer.token_map is None


@pytest.mark.parametrize(("path", "where", "expected"), VALUES)
def test_a_value_of_another_type_is_named(path: str, where: str, expected: str) -> None:
    assert message(changed(path, 1.5)) == f"{where}.{split(path)[-1]} is 1.5, expected {expected}"


@pytest.mark.parametrize(("path", "where"), OBJECTS)
def test_something_else_in_place_of_an_object_is_named(path: str, where: str) -> None:
    assert message(changed(path, [])) == f"{where} is [], expected an object"


@pytest.mark.parametrize(("path", "where", "expected"), KEYS)
def test_a_missing_key_is_named(path: str, where: str, expected: str) -> None:
    assert message(without(path)) == f"{where} has no key {split(path)[-1]!r}"


@pytest.mark.parametrize(("path", "where"), [("", "manifest"), *OBJECTS])
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
        ("tables.0.extents.0.file", "table.extents[0].file"),
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
        ("format_version", 2, "bundle has format version 2, this runtime reads 1"),
        ("format_version", 0, "bundle has format version 0, this runtime reads 1"),
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
            "state key.0 is float32 [1, 1, 1, 1, 1, 1, 1, 1, 1] positional, which can't be held",
        ),
        (
            "graphs.decoder.states.0.shape",
            [2**31 - 1, 2**31 - 1, 4],
            "state key.0 is float32 [2147483647, 2147483647, 4] positional, which can't be held",
        ),
        ("graphs.decoder.file", "graph/other", "manifest refers to 'graph/other', which is not among its files"),
        ("graphs.decoder.weights", "/etc/passwd", "manifest refers to '/etc/passwd', which is not among its files"),
        ("tables.0.keyer.token_map", "../map", "manifest refers to '../map', which is not among its files"),
        ("tables.0.extents.0.file", "../rows", "manifest refers to '../rows', which is not among its files"),
        (
            "tables.0.extents.0.file",
            "/rows",
            "extent /rows must be absolute if external and relative if not",
        ),
        (
            "tables.0.extents.0.external",
            True,
            "extent tables/layer_1.bin must be absolute if external and relative if not",
        ),
        (
            "tables.0.extents.0.row_bytes",
            7,
            "table layer_1 has 7 bytes a row in its extents, its record 8",
        ),
        (
            "tables.0.extents.0.row_bytes",
            0,
            "table.extents[0].row_bytes is 0, expected an integer from 1 to 2**53 - 1",
        ),
        (
            "tables.0.extents.0.identity",
            DIGEST,
            "extent tables/layer_1.bin must have an identity if external and none if not",
        ),
        (
            "tables.0.extents.0",
            {"file": "/rows", "external": True, "offset": 0, "row_bytes": 8, "identity": None},
            "extent /rows must have an identity if external and none if not",
        ),
        ("tables.0.extents", [], "table layer_1 has 0 bytes a row in its extents, its record 8"),
        ("tables.0.num_rows", 35, "table layer_1 has 35 rows, the primes of its hash sum to 36"),
        ("tables.0.record.columns", 5, "table layer_1 has 8 bytes a row in its extents, its record 7"),
        ("tables.0.record.columns", 0, "record has 0 columns, expected at least 1"),
        (
            "tables.0.record.scale",
            "float64",
            "record of int8 with scale float64 is unknown; payloads are ['bfloat16', 'float16', 'float32', 'int8'], "
            "scales ['float16', 'float32', 'none']",
        ),
        ("tables.0.keyer.kind", "splitmix", "keyer kind 'splitmix' is unknown; known are ['xor_prime']"),
        ("tables.0.keyer.num_heads", 3, "keyer has 4 primes and 4 offsets, expected 6 of each"),
        ("tables.0.keyer.num_heads", 0, "keyer has 4 primes and 4 offsets, expected 0 of each"),
        ("tables.0.keyer.primes", [5, 7, 11], "keyer has 3 primes and 4 offsets, expected 4 of each"),
        ("tables.0.keyer.offsets", [0], "keyer has 4 primes and 1 offsets, expected 4 of each"),
        ("tables.0.keyer.primes", [7, 5, 11, 13], "keyer offset is 5, the primes before it sum to 7"),
        ("tables.0.keyer.primes", [5, 7, 11, 17], "table layer_1 has 36 rows, the primes of its hash sum to 40"),
        ("tables.0.keyer.primes", [5, 7, 11, 1], "keyer has primes [5, 7, 11, 1], expected numbers from 2"),
        ("tables.0.keyer.offsets", [1, 5, 12, 23], "keyer offset is 1, the primes before it sum to 0"),
        ("tables.0.keyer.offsets", [0, 5, 12, 24], "keyer offset is 24, the primes before it sum to 23"),
        ("tables.0.keyer.multipliers", [3, 5], "keyer has multipliers [3, 5], expected 3 positive"),
        ("tables.0.keyer.multipliers", [3, 0, 7], "keyer has multipliers [3, 0, 7], expected 3 positive"),
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
    | st.sampled_from(["T", "R", "window", "float32", "int8", "graph/decoder.onnx", "/", "..", "\0", "\ud800"])
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
