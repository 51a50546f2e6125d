"""A3: damaged overlays and traces, which are safetensors with facts as JSON."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from tests.faults.parsers_checkpoint import damaged_safetensors
from tests.faults.parsers_mutators import blind, damage_json
from tests.faults.parsers_survey import Parser, scratch, survey
from tests.faults.row import Outcome, Row
from tests.test_bundle import write_bundle

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TableError
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.lens.trace_file import read_trace, write_trace
from engram_runtime.tables.overlay_file import OverlaySpec, read_overlay, write_overlay

NUM_ROWS = 36


def _made(write: Callable[[Path], object]) -> bytes:
    """Return the bytes of a file that a function writes."""
    with scratch() as folder:
        write(folder / "made")
        return (folder / "made").read_bytes()


def _parts(safetensors: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(safetensors[:8], "little")
    return safetensors[8:end], safetensors[end:]


def _damaged_facts(rng: random.Random, sound: bytes, key: str) -> bytes:
    """Return a safetensors file with a damaged header, data, or facts in its metadata."""
    header, data = _parts(sound)
    if rng.random() < 0.5:
        return damaged_safetensors(rng, header, data)
    document = json.loads(header)
    facts = document["__metadata__"][key]
    document["__metadata__"][key] = damage_json(rng, facts.encode()).decode("utf-8", "replace")
    text = json.dumps(document).encode()
    data = blind(rng, data) if rng.random() < 0.2 else data
    return len(text).to_bytes(8, "little") + text + data


def small_bundle(path: Path) -> Bundle:
    folder = path.parent / "bundle"
    return Bundle.open(folder if folder.exists() else write_bundle(folder))


@cache
def sound_overlay() -> bytes:
    """Return an overlay of three rows of the small bundle's table."""

    def write(path: Path) -> None:
        bundle = small_bundle(path)
        spec = OverlaySpec.of(bundle, bundle.manifest.tables[0])
        records = np.zeros((3, spec.record.record_bytes), dtype=np.uint8)
        write_overlay(path, spec, np.array([0, 5, NUM_ROWS - 1], dtype=np.int64), records)

    return _made(write)


@cache
def sound_trace() -> bytes:
    """Return a trace of four tokens of the small bundle."""

    def write(path: Path) -> None:
        bundle = small_bundle(path)
        site = TraceSite.of(bundle, bundle.manifest.tables[0])
        rows = np.array([site.first_rows] * 4, dtype=site.dtype)
        trace = Trace(model="tiny", text="t", command="c", sites=(site,), row_ids={site.site: rows})
        write_trace(path, trace)

    return _made(write)


def _use_trace(path: Path) -> None:
    trace = read_trace(path)
    for site in trace.sites:
        sum(block.sum() for block in trace.blocks(site))
        trace.counts(site)


OVERLAY = Parser(
    name="overlay",
    damaged=lambda rng: _damaged_facts(rng, sound_overlay(), "engram_overlay"),
    use=read_overlay,
    refusals=(TableError,),
    sound=sound_overlay(),
)
TRACE = Parser(
    name="trace",
    damaged=lambda rng: _damaged_facts(rng, sound_trace(), "engram_trace"),
    use=_use_trace,
    refusals=(TableError,),
    sound=sound_trace(),
)


def overlays(count: int) -> Outcome:
    """Damage overlays."""
    return survey((OVERLAY, count))


ROWS = (
    Row(
        name="A3 overlay",
        fault="an overlay with a damaged header, facts, row ids or records",
        expected="TableError, or rows; at most 1 s and 64 MiB",
        quick=10_000,
        full=200_000,
        run=overlays,
    ),
)
