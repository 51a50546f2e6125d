"""A3: damaged files of the project's own formats: command streams, profiles, batches, journals and token maps."""

import json
import random
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tests.faults.parsers_mutators import NUMBERS, blind, damage_document, damage_json
from tests.faults.parsers_overlays import TRACE, small_bundle
from tests.faults.parsers_survey import Parser, evenly, survey
from tests.faults.row import Outcome, Row
from tests.test_bundle import MAP, token_map

from engram_export.journal import Journal
from engram_runtime.batch.lines import index_lines, read_lines
from engram_runtime.batch.request import MAX_LINE_BYTES, parse_request, request_key
from engram_runtime.batch.result import result_key
from engram_runtime.errors import BundleError, EngramError, RequestError, TargetError
from engram_runtime.npu import isa
from engram_runtime.npu.commands_file import CommandsFile, read_commands
from engram_runtime.npu.device import Geometry, Product
from engram_runtime.npu.devices import open_device
from engram_runtime.npu.dot_engine import DotEngine
from engram_runtime.npu.geometry import SystolicArray
from engram_targets.profile import load_profile, profile_names

CORPUS = Path(__file__).parent / "corpus"
# The devices and the product that the streams of the corpus are for.
SMALL = SystolicArray(
    **{"rows": 32, "columns": 8, "weight_bytes": 512, "input_bytes": 128, "accumulator_bytes": 256},
    **{"dma_bytes_per_cycle": 4, "dma_latency_cycles": 10, "clock_hz": 10**6},
)
DOTS = DotEngine(lanes=3, width=5, registers=2, input_bytes=100, dma_bytes_per_cycle=4, clock_hz=10**6)
PRODUCT = Product(rows=2, inputs=40, outputs=12, weights="int8")
DEVICES: dict[str, Geometry] = {"systolic": SMALL, "dot-engine": DOTS}
NUM_ROWS, FINGERPRINT, JOURNALED = 36, "f" * 64, b"a table"
REQUEST = {
    "custom_id": "request-1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
}
RESULT = {"id": "batch_req_1", "custom_id": None, "response": {"status_code": 200, "body": {}}, "error": None}


def _damaged_stream(rng: random.Random, sound: bytes) -> bytes:
    if rng.random() < 0.5:
        return blind(rng, sound)
    data = bytearray(sound)
    for _ in range(rng.choice((1, 1, 2))):
        size = rng.choice((1, 2, 4))
        at = rng.randrange(0, len(data) - size + 1, size)
        data[at : at + size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
    if rng.random() < 0.3:  # commands left out, doubled or moved
        commands = [data[at : at + 16] for at in range(isa.HEADER.itemsize, len(data), 16)]
        rng.shuffle(commands)
        data[isa.HEADER.itemsize :] = b"".join(commands[: rng.randint(0, len(commands))])
    return bytes(data)


def _use_stream(path: Path, geometry: Geometry) -> None:
    device = open_device(geometry)
    device.load(path.read_bytes())


def _stream_parser(name: str, geometry: Geometry) -> Parser:
    sound = (CORPUS / f"{name}.stream").read_bytes()
    return Parser(
        name=f"{name} stream",
        damaged=lambda rng: _damaged_stream(rng, sound),
        use=lambda path: _use_stream(path, geometry),
        refusals=(TargetError,),
        sound=sound,
    )


def _sound_commands() -> bytes:
    stream = (CORPUS / "systolic.stream").read_bytes()
    return CommandsFile(SMALL, [stream, stream], ["layers.0", "layers.1"]).to_bytes()


def _damaged_commands(rng: random.Random) -> bytes:
    sound = _sound_commands()
    end = 16 + int.from_bytes(sound[8:16], "little")
    if rng.random() < 0.3:
        return blind(rng, sound)
    header = damage_json(rng, sound[16:end])
    length = rng.choice(NUMBERS) % 2**64 if rng.random() < 0.1 else len(header)
    return sound[:8] + length.to_bytes(8, "little") + header + sound[end:]


def _use_commands(path: Path) -> None:
    file = read_commands(path)
    device = open_device(file.geometry)
    for stream in file.streams:
        device.load(stream)


@cache
def _profiles() -> dict[str, bytes]:
    from importlib import resources

    folder = resources.files("engram_targets") / "profiles"
    return {name: (folder / f"{name}.toml").read_bytes() for name in profile_names()}


def _damaged_profile(rng: random.Random) -> bytes:
    text = rng.choice(list(_profiles().values()))
    if rng.random() < 0.5:
        return blind(rng, text)
    return _toml(damage_document(rng, tomllib.loads(text.decode()))).encode("utf-8", "replace")


def _toml(document: dict[str, Any]) -> str:
    """Return a document as TOML: tables inline, for what has no spelling there a text."""
    return "".join(f"{json.dumps(str(key))} = {_toml_value(value)}\n" for key, value in document.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return '"null"' if value is None else json.dumps(value)


def _use_batch(path: Path) -> None:
    with path.open("rb") as file:
        for line in read_lines(file, MAX_LINE_BYTES):
            str(parse_request(line))
        file.seek(0)
        len(index_lines(path, read_lines(file, MAX_LINE_BYTES), request_key))


def _use_results(path: Path) -> None:
    with path.open("rb") as file:
        len(index_lines(path, read_lines(file, MAX_LINE_BYTES), result_key))


def _use_journal(path: Path) -> None:
    folder = path.parent / "export"
    folder.mkdir(exist_ok=True)
    (folder / "table").write_bytes(JOURNALED)
    with path.open("r+b") as stream:
        journal = Journal(stream, folder, FINGERPRINT)
        journal.once(folder / "table", lambda: {"rows": (folder / "table").write_bytes(JOURNALED)}, lambda count: None)


def _sound_journal() -> bytes:
    lines = [
        {"fingerprint": FINGERPRINT, "version": 2},
        {"path": "table", "bytes": len(JOURNALED), "inode": 1, "sha256": "0" * 64, "facts": {"rows": 1.5}},
        {"path": "b", "bytes": 1, "inode": 2, "sha256": "0" * 64, "facts": None},
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _damaged_lines(rng: random.Random, sound: bytes) -> bytes:
    lines = sound.splitlines(keepends=True)
    if rng.random() < 0.3:
        return blind(rng, sound)
    at = rng.randrange(len(lines))
    lines[at] = damage_json(rng, lines[at]) + rng.choice((b"\n", b"\n", b"", b"\r\n\n"))
    return b"".join(lines)


def _use_token_map(path: Path) -> None:
    """Hash tokens by a map that is not held against a digest, which would find all damage."""
    sound_bundle = small_bundle(path)
    others = tuple(entry for entry in sound_bundle.manifest.files if entry.path != MAP)
    bundle = replace(sound_bundle, manifest=replace(sound_bundle.manifest, files=others))
    sound = token_map().tobytes()
    bundle.file(MAP).write_bytes(path.read_bytes())
    try:
        bundle.keyer(bundle.manifest.tables[0].keyer).row_ids([], np.arange(50, dtype=np.int64))
    finally:
        bundle.file(MAP).write_bytes(sound)


def _parser(
    name: str,
    sound: bytes,
    damaged: Callable[[random.Random, bytes], bytes],
    use: Callable[[Path], object],
    *refusals: type[EngramError],
) -> Parser:
    return Parser(name=name, damaged=lambda rng: damaged(rng, sound), use=use, refusals=refusals, sound=sound)


STREAMS = tuple(_stream_parser(name, geometry) for name, geometry in DEVICES.items())
BATCH = b"".join(json.dumps(REQUEST).encode() + b"\n" for _ in range(3))
OTHERS = (
    TRACE,
    _parser("commands", _sound_commands(), lambda rng, sound: _damaged_commands(rng), _use_commands, TargetError),
    Parser(
        name="profile",
        damaged=_damaged_profile,
        use=lambda path: load_profile(str(path)),
        refusals=(TargetError,),
        sound=_profiles()["x86-64-v3"],
        file="mine.toml",
    ),
    _parser("batch", BATCH, _damaged_lines, _use_batch),
    _parser("results", json.dumps(RESULT).encode() + b"\n", _damaged_lines, _use_results, BundleError),
    _parser("journal", _sound_journal(), _damaged_lines, _use_journal, BundleError, RequestError),
    _parser("token map", token_map().tobytes(), blind, _use_token_map, BundleError),
)


def command_streams(count: int) -> Outcome:
    """Damage command streams of both accelerators."""
    return survey(*evenly(count, STREAMS))


def others(count: int) -> Outcome:
    """Damage files of the other formats, ``count`` in all."""
    return survey(*evenly(count, OTHERS))


ROWS = (
    Row(
        name="A3 streams",
        fault="command streams of both accelerators, damaged in fields, commands or bytes",
        expected="TargetError, or a stream that runs to its end; at most 1 s and 64 MiB",
        quick=10_000,
        full=200_000,
        run=command_streams,
    ),
    Row(
        name="A3 others",
        fault="traces, files of commands, profiles, batches and their results, journals, token maps; each damaged",
        expected="the format's own error, or what it holds; at most 1 s and 64 MiB",
        quick=10_000,
        full=200_000,
        run=others,
    ),
)
