"""``docs/requests.md``: the fields of requests, from the document by which the server describes itself."""

from collections.abc import Iterator
from typing import Any

from engram_runtime.server.openapi import BODIES, openapi_document

Schema = dict[str, Any]
TITLE = """# Fields of requests

<!-- written by `python -m tools` -->

What the server checks, and tells at `/openapi.json`. Types are strict: `"1"` is no number, `true` is no integer, `1.0`
neither, NaN and infinity are none. A field that is not known is refused by name. Null counts as not given. What a field
means is [OpenAI's](https://platform.openai.com/docs/api-reference) business; what differs is said
[of the server](server.md#requests).
"""
WORDS = {"boolean": "true or false", "string": "text", "null": "null", "object": "object"}


def request_fields() -> str:
    """Return the page."""
    schemas = openapi_document()["components"]["schemas"]
    bodies = {body.__name__: f"POST {path}" for path, body in BODIES.items()}
    parts = [section(f"`{title}`", schemas[name]) for name, title in bodies.items()]
    others = sorted(name for name in schemas if name not in {*bodies, "Error"})
    parts += [section(name, schemas[name]) for name in others]
    return "\n".join([TITLE, *parts])


def section(title: str, schema: Schema) -> str:
    """Return the part on an object."""
    return f"## {title}\n\n| field | value | default |\n|---|---|---|\n" + "".join(rows(schema))


def rows(schema: Schema) -> Iterator[str]:
    """Yield a row for each field that does something, those that must be there first."""
    required = schema.get("required", [])
    for name, field in sorted(schema["properties"].items(), key=lambda each: each[0] not in required):
        if field.get("description") != "changes nothing":
            default = "required" if name in required else spelled_default(field)
            yield f"| `{name}` | {spelled(field)} | {default} |\n"


def spelled_default(field: Schema) -> str:
    """Return what a field is that isn't given, empty where another place says so."""
    inner = next((part for part in field.get("anyOf", []) if part.get("default") is not None), field)
    default = inner.get("default")
    return f"`{str(default).lower()}`" if isinstance(default, bool | int | float | str) else ""


def spelled(schema: Schema) -> str:
    """Return in words what a value has to be."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        parts = [spelled(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "array":
            items = spelled(schema["items"])
            return f"list of {f'({items})' if ' or ' in items else items}{_size(schema, 'Items', '')}"
        case "integer" | "number" as kind:
            return f"{kind}{_range(schema)}"
        case "string":
            return (
                f"text that matches `{schema['pattern']}`"
                if "pattern" in schema
                else f"text{_size(schema, 'Length', ' characters')}"
            )
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"object of {spelled(schema['additionalProperties'])}{_size(schema, 'Properties', ' of them')}"
        case kind:
            return WORDS.get(str(kind), "anything")


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    return "" if low is None else f" from {low:,} to {high:,}"


def _size(schema: Schema, kind: str, unit: str) -> str:
    least, most = schema.get(f"min{kind}"), schema.get(f"max{kind}")
    if most is not None:
        return f", {least or 0} to {most:,}{unit}"
    return f", at least {least}{unit}" if least else ""
