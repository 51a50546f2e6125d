"""A JSON Schema of ``engram.json``: the keys and types of the dataclasses it is parsed into, and what parsing asks.

How values are held against each other, such as a table's rows against its keyer, it does not say: see `Manifest.check`.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from engram_runtime.bundle import SEAL
from engram_runtime.keyer_spec import NgramKeyerSpec, TokenKeyerSpec
from engram_runtime.manifest import (
    AXIS_NAMES,
    DECODER,
    DRAFT_HEAD,
    FORMAT_VERSION,
    STATE_KINDS,
    FileEntry,
    GraphSpec,
    Manifest,
    ModelInfo,
    StateSpec,
    TensorSpec,
)
from engram_runtime.records import PAYLOAD_BITS, SCALE_BYTES, RecordFormat
from engram_runtime.table_spec import RowRange, TablePart, TableSpec

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
END = r"(?![\s\S])"  # of the text: in Python, $ comes before a last line break, too
SEGMENT = rf"(?!\.{{1,2}}(/|{END}))[^/\\\u0000]+"  # of a path: neither . nor .. nor empty


def whole(pattern: str) -> Schema:
    """Return the schema of a string that is all of a pattern."""
    return {"type": "string", "pattern": f"^{pattern}{END}"}


def integers(least: int, most: int) -> Schema:
    """Return the schema of an integer in a range."""
    return {"type": "integer", "minimum": least, "maximum": most}


def array(items: Schema, **limits: Any) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items, **limits}


INT64_MAX = 2**63 - 1
VALUES = {  # by the names they have in the schema
    "text": whole(r"[^\u0000]*"),
    "path": whole(rf"{SEGMENT}(/{SEGMENT})*"),
    "count": integers(0, 2**53 - 1),
    "size": integers(1, 2**53 - 1),
}
TEXT, PATH, COUNT, SIZE = ({"$ref": f"#/$defs/{name}"} for name in VALUES)
NULL = {"type": "null"}
PLAIN = {int: COUNT, str: TEXT, bool: {"type": "boolean"}, type(None): NULL}
TOKEN_IDS = array(COUNT, uniqueItems=True)
# Of each class, the keys of which parsing asks for more than their type.
KEYS: Mapping[type, Mapping[str, Schema]] = {
    Manifest: {"draft_vocabulary": {"anyOf": [PATH, NULL]}},
    ModelInfo: dict.fromkeys(("vocab_size", "hidden_size", "num_layers", "context_length"), SIZE),
    GraphSpec: {"file": PATH, "weights": PATH},
    TensorSpec: {"shape": array({"anyOf": [integers(1, 2**31 - 1), {"enum": list(AXIS_NAMES)}]})},
    StateSpec: {
        "dtype": {"const": "float32"},
        "shape": array(integers(1, INT64_MAX), minItems=2, maxItems=8),
        "kind": {"enum": list(STATE_KINDS)},
    },
    TableSpec: {"num_rows": SIZE},
    RecordFormat: {
        "payload": {"enum": sorted(PAYLOAD_BITS)},
        "columns": SIZE,
        "scale": {"enum": sorted(SCALE_BYTES)},
        "scale_columns": SIZE,
        "factor": whole(r"0x1\.[0-9a-f]{13}p[+-][0-9]+"),
    },
    TablePart: {"row_bytes": SIZE},
    RowRange: {"num_rows": SIZE, "checksums": {"anyOf": [PATH, NULL]}},
    NgramKeyerSpec: {
        "kind": {"const": NgramKeyerSpec.KIND},
        "orders": array(integers(1, 16), minItems=1, uniqueItems=True),
        "num_heads": SIZE,
        "multipliers": array(integers(1, INT64_MAX), minItems=1, maxItems=16),
        "primes": array(integers(2, INT64_MAX), minItems=1),
        "offsets": array(integers(0, INT64_MAX), minItems=1),
        "barrier_ids": TOKEN_IDS,
        "silent_ids": TOKEN_IDS,
        "token_map": {"anyOf": [PATH, NULL]},
    },
    TokenKeyerSpec: {"kind": {"const": TokenKeyerSpec.KIND}, "vocab_size": SIZE},
    FileEntry: {"path": PATH},
}
GRAPH_NAMES = whole(rf"({DECODER}|{DRAFT_HEAD}|site\.[\s\S]*)")
EXTERNAL_ROWS = {
    "if": {"properties": {"external": {"const": True}}},
    "then": {"properties": {"file": {"pattern": "^/"}, "identity": TEXT, "checksums": NULL}},
    "else": {"properties": {"file": PATH, "identity": NULL}},
}


def manifest_schema() -> Schema:
    """Return the schema of a manifest of `FORMAT_VERSION`."""
    manifest = object_schema(Manifest)
    manifest["properties"]["graphs"]["propertyNames"] = GRAPH_NAMES
    manifest["properties"] |= {
        "format_version": {"const": FORMAT_VERSION},
        "extensions": {"type": "object"},
        SEAL: whole("[0-9a-f]{64}"),
    }
    manifest["required"] = sorted(manifest["properties"].keys() - {"draft_vocabulary", "omitted"})
    parts = {kind.__name__: object_schema(kind) for kind in KEYS if kind is not Manifest}
    parts[RowRange.__name__] |= EXTERNAL_ROWS
    parts[RowRange.__name__]["required"].remove("checksums")
    return {"$schema": DIALECT, "title": "engram.json", **manifest, "$defs": {**parts, **VALUES}}


def object_schema(kind: type) -> Schema:
    """Return the schema of the object that a dataclass is parsed from: each field a key that must be there."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    summary, _, _ = (inspect.getdoc(kind) or "").partition("\n\n")
    return {
        "description": summary.replace("\n", " ").replace("``", "`"),
        "type": "object",
        "properties": {name: KEYS[kind].get(name) or value_schema(hints[name]) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def value_schema(hint: Any) -> Schema:
    """Return the schema of a value of an annotated type."""
    if hint in PLAIN:
        return PLAIN[hint]
    if hint in KEYS:
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return array(integers(-(2**63), INT64_MAX) if arguments[0] is int else value_schema(arguments[0]))
    if origin is Mapping:
        return {"type": "object", "additionalProperties": value_schema(arguments[1])}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [value_schema(argument) for argument in arguments]}
    raise TypeError(f"a manifest has a value of {hint}, of which no schema is known")
