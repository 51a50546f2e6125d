"""``docs/target-profile.md``: the keys of a profile, from the dataclasses they are read into."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator

from engram_runtime.npu.device import Geometry
from engram_runtime.npu.devices import ACCELERATORS
from engram_targets import CProfile, CpuProfile, GpuProfile, Llvm, NpuProfile, Profile
from engram_targets.common import CACHE_DTYPES, EVIDENCE, MOST_COUNTS, MOST_TOKENS
from engram_targets.cpu import SYSTEMS
from engram_targets.gpu import LANGUAGES

TYPES = {str: "text", int: "integer", tuple[str, ...]: "list of texts", tuple[int, ...]: "list of integers"}
IN_FILES = {  # where a file says something else than the field holds
    "threads": "integer or `auto`",
    "host": "text",
}
CHOICES = {"cache_dtype": CACHE_DTYPES, "evidence": EVIDENCE, "system": SYSTEMS, "language": LANGUAGES}
ENTRY = re.compile(r"^    ([\w, ]+): ", re.MULTILINE)
TITLE = f"""# Keys of a target's profile

<!-- written by `python -m tools` -->

A profile is a TOML file of at most 64 KiB. Every key that stands here must be there, and no other may be. The file's
name without `.toml` is the target's. Token counts ascend from 1; there are at most {MOST_COUNTS}, to {MOST_TOKENS}. See
[Adding a target](adding-a-target.md).

## All devices

| key | value | meaning |
|---|---|---|
| `device` | `cpu`, `c`, `gpu` or `npu` | what kind of target it is, by which the other keys go |
"""


def target_schema() -> str:
    """Return the page."""
    parts = [TITLE + "".join(rows(Profile, leave=("name", "kernels")))]
    parts += [section(CpuProfile, {"llvm": Llvm}), section(CProfile, {})]
    parts += [section(GpuProfile, {}, table="gpu"), section(NpuProfile, {}, leave=("geometry",))]
    parts += [accelerator(name, kind.geometry) for name, kind in ACCELERATORS.items()]
    return "\n".join(parts)


def section(kind: type[Profile], tables: dict[str, type], *, table: str = "", leave: tuple[str, ...] = ()) -> str:
    """Return the part on a kind of device: its own keys, or those of ``table``, then its ``tables``."""
    families = " or ".join(f"`{family}`" for family in kind.families)
    inherited = tuple(field.name for field in dataclasses.fields(Profile))
    own = "".join(rows(kind, leave=(*inherited, *leave, *tables), prefix=f"[{table}] " if table else ""))
    below = "".join(row for name, part in tables.items() for row in rows(part, prefix=f"[{name}] "))
    head = f'## `device = "{kind.device}"`\n\n{first_line(kind)}\n\n| key | value | meaning |\n|---|---|---|\n'
    return f"{head}| `kernels` | {families} | {meanings(Profile)['kernels']} |\n{own}{below}"


def accelerator(name: str, geometry: type[Geometry]) -> str:
    """Return the part on the table of an accelerator's sizes."""
    head = f'### `kernels = "{name}"`\n\n{first_line(geometry)}\n\n| key | value | meaning |\n|---|---|---|\n'
    return head + "".join(rows(geometry, prefix="[npu] "))


def rows(kind: type, *, leave: tuple[str, ...] = (), prefix: str = "") -> Iterator[str]:
    """Yield a row for each field that a file has."""
    told, types = meanings(kind), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in leave:
            value = IN_FILES.get(field.name) or TYPES[types[field.name]]
            if field.name in CHOICES:
                value = ", ".join(f"`{choice}`" for choice in CHOICES[field.name])
            yield f"| `{prefix}{field.name}` | {value} | {told[field.name]} |\n"


def meanings(kind: type) -> dict[str, str]:
    """Return what a dataclass's docstring says of each of its attributes."""
    _, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    _, *parts = ENTRY.split(attributes.replace("``", "`"))
    entries = zip(parts[::2], (" ".join(part.split()).rstrip(".") for part in parts[1::2]), strict=True)
    return {name: meaning for names, meaning in entries for name in names.split(", ")}


def first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]
