"""A5: paths in a bundle's descriptions, and files in their places, that lead elsewhere."""

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.parsers_json import LIBRARY, use_bundle
from tests.faults.parsers_survey import scratch
from tests.faults.row import Outcome, Row
from tests.test_bundle import GRAPH, MAP, TABLE, WEIGHTS, write_bundle

from engram_export.checkpoint import open_checkpoint
from engram_runtime.bundle import Bundle, sealed
from engram_runtime.errors import EngramError
from engram_runtime.library import find_library
from engram_runtime.onnx_places import check_places

SECRET = b"a secret outside the bundle"
LONG = "x" * 4096
# Texts in place of a path; OUTSIDE stands for a folder beside the bundle that holds a file `secret`.
TEXTS = (
    *("../secret", "../../secret", "tables/../../outside/secret", "./../outside/secret", "tables/..//../secret"),
    *("OUTSIDE/secret", "/etc/passwd", "/dev/zero", "/proc/self/mem", "//etc/passwd", "/", "..", ".", "", "tables/"),
    *("secret\0", "\0", "OUTSIDE/secret\0.bin", "tables\\..\\..\\outside\\secret", "\\\\server\\share", "C:\\secret"),
    *("~/secret", "file:///etc/passwd", "%2e%2e/secret", "..\u2215secret", "\uff0e\uff0e/secret", "..;/secret"),
    *(
        LONG,
        f"{LONG}/secret",
        "/".join(["a"] * 2048),
        "../" * 900 + "etc/passwd",
        "\ud800",
        "tables/\u202e",
        "TABLES/X",
    ),
)
Place = Callable[[Path, Path], None]  # puts something where a file of the bundle was; given that place and the outside


def _link(place: Path, outside: Path) -> None:
    place.symlink_to(outside / "secret")


def _relative_link(place: Path, outside: Path) -> None:
    place.symlink_to(os.path.relpath(outside / "secret", place.parent))


def _folder_link(place: Path, outside: Path) -> None:
    for name in (place.name, "secret"):
        (outside / name).write_bytes(SECRET)
    for path in place.parent.iterdir():
        path.rename(outside / path.name)
    place.parent.rmdir()
    place.parent.symlink_to(outside)


def _circle(place: Path, outside: Path) -> None:
    place.symlink_to(place.name)


def _device(place: Path, outside: Path) -> None:
    place.symlink_to("/dev/zero")


def _pipe(place: Path, outside: Path) -> None:
    os.mkfifo(place)


def _folder(place: Path, outside: Path) -> None:
    place.mkdir()


def _nothing(place: Path, outside: Path) -> None:
    """Leave the place empty."""


PLACES: Sequence[Place] = (_link, _relative_link, _folder_link, _circle, _device, _pipe, _folder, _nothing)
FILES = ("engram.json", GRAPH, WEIGHTS, TABLE, MAP, "golden/golden.json", "lib/any/compile.json")


@contextlib.contextmanager
def opens_outside(root: Path) -> Iterator[list[str]]:
    """Note what is opened in the folder around the bundle but not in the bundle, or is a device or of the system."""
    found: list[str] = []
    around = os.path.realpath(root.parent)
    others = ("/etc/passwd", "/dev/zero", os.path.realpath("/proc/self/mem"), "/secret")
    noting = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if noting and event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            inside = path == os.path.realpath(root) or path.startswith(os.path.realpath(root) + os.sep)
            if not inside and path.startswith((around, *others)):
                found.append(path)

    sys.addaudithook(hook)  # stays for good, so it is told when to rest
    try:
        yield found
    finally:
        noting = False


def _try(root: Path, use: Callable[[], object]) -> str:
    """Return what is wrong with how a bundle is opened: any error but those of the product, anything read outside."""
    wrong = ""
    with opens_outside(root) as found:
        try:
            use()
            wrong = "it was taken"
        except EngramError as error:
            if SECRET.decode() in str(error):
                wrong = "the error tells the secret"
    return f"{found[:3]} opened" if found else wrong


def _write(folder: Path) -> tuple[Path, Path]:
    """Write a bundle with a library and a folder outside."""
    root, outside = folder / "bundle", folder / "outside"
    write_bundle(root)
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    (folder / "secret").write_bytes(SECRET)
    (root / "lib/any").mkdir(parents=True)
    (root / "lib/any/compile.json").write_text(json.dumps(LIBRARY))
    return root, outside


def _path_in_manifest(keys: Sequence[Any], text: str, folder: Path) -> str:
    root, outside = _write(folder)
    raw = json.loads((root / "engram.json").read_text())
    text = text.replace("OUTSIDE", str(outside))
    listed = {"path": text, "bytes": len(SECRET), "sha256": hashlib.sha256(SECRET).hexdigest()}
    raw["files"].append(listed)
    holder = raw
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = text
    (root / "engram.json").write_bytes(sealed(raw))
    return _try(root, lambda: use_bundle(root))


def _path_in_library(key: str, text: str, folder: Path) -> str:
    root, outside = _write(folder)
    raw = {**LIBRARY, key: text.replace("OUTSIDE", str(outside))}
    (root / "lib/any/compile.json").write_text(json.dumps(raw))
    return _try(root, lambda: find_library(Bundle.open(root), "any"))


def _file_in_place(relative: str, place: Place, folder: Path) -> str:
    root, outside = _write(folder)
    (root / relative).unlink()
    place(root / relative, outside)

    def use() -> None:
        use_bundle(root)
        find_library(Bundle.open(root), "any")

    return _try(root, use)


def _path_in_graph(text: str, folder: Path) -> str:
    import onnx

    root, outside = _write(folder)
    text = text.replace("OUTSIDE", str(outside)).encode("utf-8", "replace").decode()
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": text, "offset": "0", "length": "16"}.items():
        tensor.external_data.add(key=key, value=value)
    model = onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g", initializer=[tensor]))
    (root / GRAPH).write_bytes(model.SerializeToString())
    return _try(root, lambda: check_places(root / GRAPH, root / WEIGHTS))


def _path_in_index(text: str, folder: Path) -> str:
    root, outside = folder / "checkpoint", folder / "outside"
    for each in (root, outside):
        each.mkdir()
    (outside / "secret").write_bytes(SECRET)
    (folder / "secret").write_bytes(SECRET)
    (root / "config.json").write_text("{}")
    index = {"weight_map": {"model.norm.weight": text.replace("OUTSIDE", str(outside))}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return _try(root, lambda: open_checkpoint(root))


MANIFEST_KEYS: Sequence[Sequence[Any]] = (
    ("graphs", "decoder", "file"),
    ("graphs", "decoder", "weights"),
    ("tables", 0, "parts", 0, "ranges", 0, "file"),
    ("tables", 0, "keyer", "token_map"),
)


def _cases() -> list[tuple[str, Callable[[Path], str]]]:
    cases: list[tuple[str, Callable[[Path], str]]] = []
    for keys, text in itertools.product(MANIFEST_KEYS, TEXTS):
        cases.append((f"{keys[-1]} {text[:40]!r}", partial(_path_in_manifest, keys, text)))
    for key, text in itertools.product(("library", "weights"), TEXTS):
        cases.append((f"compile.json {key} {text[:40]!r}", partial(_path_in_library, key, text)))
    for relative, place in itertools.product(FILES, PLACES):
        cases.append((f"{place.__name__.strip('_')} for {relative}", partial(_file_in_place, relative, place)))
    cases += [(f"location {text[:40]!r}", partial(_path_in_graph, text)) for text in TEXTS]
    cases += [(f"shard {text[:40]!r}", partial(_path_in_index, text)) for text in TEXTS]
    return cases


def paths(count: int) -> Outcome:
    """Lead a bundle's or a checkpoint's paths elsewhere, in all ways there are at least."""
    failures = []
    cases = _cases()
    for name, case in cases:
        with scratch() as folder:
            if wrong := case(folder):
                failures.append(f"{name}: {wrong}")
    return Outcome(
        tried=len(cases),
        survived=len(cases) - len(failures),
        figure=f"{len(cases)} cases, 0 files opened outside" if not failures else "",
        failures=tuple(failures[:20]),
    )


ROWS = (
    Row(
        name="A5",
        fault="paths with .., absolute, with NUL, of 4 KB, in other cases; links, pipes, devices, folders for files",
        expected="an error; nothing outside the bundle's folder opened",
        quick=200,
        full=200,
        run=paths,
    ),
)
