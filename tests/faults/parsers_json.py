"""A1: damaged descriptions in JSON, of a bundle, its libraries, its golden values and what the user's cache keeps."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tests.faults.parsers_mutators import damage_document, damage_json
from tests.faults.parsers_survey import Parser, evenly, survey
from tests.faults.row import Outcome, Row
from tests.test_bundle import GOLDEN, contents, manifest_json, write_bundle

from engram_compilers.pack import launcher
from engram_compilers.tuning import store
from engram_runtime.bundle import MANIFEST_NAME, UNSEALED_VERSION, Bundle, sealed
from engram_runtime.drafting.costs import MOST_ROWS, VERSION, ForwardCosts
from engram_runtime.errors import BundleError
from engram_runtime.golden import Golden
from engram_runtime.gpu.plan import read_plan
from engram_runtime.library import LIBRARY_INFO_VERSION, LibraryInfo, graph_digest
from engram_runtime.manifest import DECODER, DRAFT_HEAD
from engram_runtime.strict_json import Fields, read_json_object
from engram_runtime.tables.opening import open_table
from engram_runtime.tables.options import MMAP, PREAD, RESIDENT

TOKENS = np.array([7, 0, 49, 7], dtype=np.int64)
LIBRARY = {
    "version": LIBRARY_INFO_VERSION,
    "target": "x86-64-v3",
    "device": "cpu",
    "machine": "x86_64",
    "cpu_flags": ["avx2", "fma"],
    "graph_sha256": "0" * 64,
    "compiler": "apache-tvm 0.27",
    "ffi": "0.1.14",
    "library": "decoder.so",
    "runtime": None,
    "weights": "weights.bin",
    "commands": None,
    "weights_bytes": 4096,
    "sha256": {"library": "0" * 64, "weights": "1" * 64},
    "passes": [[1, 1], [4, 1], [4, 4]],
    "batches": [2, 4],
    "tensors": [{"name": "embed", "dtype": "float32", "shape": [8, 16], "offset": 64}],
    "graph_tensors": {"decoder": [0], "mtp": [0]},
    "expert_bytes": [100],
    "threads": 2,
    "float16_states": ["key.0"],
}
PLACES = [["input", "token_ids", 32], ["weight", 0, 64], ["scratch", 0, 512], ["temporary", 0, 64], ["output", 0, 40]]
PLAN = {
    "version": 1,
    "temporary_bytes": 512,
    "passes": {
        "forward_1_1": {
            "steps": [["await", 0], ["kernel_0", [4, 1, 1], [64, 1, 1], PLACES]],
            "results": [["float32", [1, 10], ["output", 0, 40]]],
            "scratch_bytes": 1024,
        }
    },
}
COSTS = {
    **{"version": VERSION, "library": "0" * 64, "threads": 2, "machine": "m"},
    **{"forward_s": [0.5 + row for row in range(MOST_ROWS)], "draft_s": 0.1},
}
PACK = {
    **{"target": "x86-64-v3", "machine": "x86_64", "system": "linux", "install": "pip install numpy"},
    **{
        "pythons": ["3.11", "3.12"],
        "modules": {"numpy": "numpy"},
        "files": {"pack.json": [9, None], "a": [1, "0" * 64]},
    },
}
SIZES = {"version": store.VERSION, "sizes": [{"kind": "int8", "rows": 4, "sums": 8}]}


def use_bundle(folder: Path) -> None:
    """Open a bundle and read rows of its tables by every way there is, its golden values and its draft vocabulary."""
    bundle = Bundle.open(folder)
    for spec in bundle.manifest.tables:
        row_ids = bundle.keyer(spec.keyer).row_ids([], TOKENS).ravel()
        row_ids = np.append(row_ids[row_ids >= 0], spec.num_rows - 1)
        for io in (PREAD, MMAP, RESIDENT):
            table = open_table(bundle, spec, io)
            table.gather(row_ids, np.empty((len(row_ids), spec.record.columns), dtype=np.float32))
            table.close()
    if DECODER in bundle.manifest.graphs:
        graph_digest(bundle)
    if DRAFT_HEAD in bundle.manifest.graphs:
        bundle.draft_vocabulary()
    if bundle.file(GOLDEN).exists():
        Golden.read(bundle)


def _bundle_beside(path: Path) -> Path:
    """Return the sound bundle beside a file, written the first time."""
    folder = path.parent / "bundle"
    return folder if folder.exists() else write_bundle(folder)


def _use_manifest(path: Path) -> None:
    folder = _bundle_beside(path)
    (folder / MANIFEST_NAME).write_bytes(path.read_bytes())
    use_bundle(folder)


def _use_golden(path: Path) -> None:
    bundle = Bundle.open(_bundle_beside(path))
    bundle.file(GOLDEN).write_bytes(path.read_bytes().ljust(len(SOUND_GOLDEN)))
    try:
        Golden.read(bundle)
    finally:
        bundle.file(GOLDEN).write_bytes(SOUND_GOLDEN)


def _use_library(path: Path) -> None:
    info = LibraryInfo.from_dict(read_json_object(path))
    str(info.misfit())


def _use_costs(path: Path) -> None:
    ForwardCosts.from_dict(read_json_object(path))


def _use_sizes(path: Path) -> None:
    store._parsed(Fields(read_json_object(path), str(path)))


def _use_plan(path: Path) -> None:
    str(read_plan(path).most_threads)


def _use_pack(path: Path) -> None:
    """Check a packed folder as its launcher does, which ends where the folder won't do."""
    with mock.patch.object(launcher, "HERE", path.parent):
        try:
            pack = launcher.packed()
        except SystemExit as error:
            raise BundleError(f"exit {error.code}") from error
        str((launcher.misfit(pack), launcher.damage(pack)))


def _parser(name: str, sound: Any, use: Callable[[Path], object], file: str = "file") -> Parser:
    text = sound if isinstance(sound, bytes) else json.dumps(sound).encode()
    return Parser(
        name=name, damaged=lambda rng: damage_json(rng, text), use=use, refusals=(BundleError,), sound=text, file=file
    )


def _damaged_manifest(rng: random.Random) -> bytes:
    """Return a manifest with damaged values and a seal of them, or one of before there were seals, damaged at will."""
    raw = json.loads(SOUND_MANIFEST)
    if rng.random() < 0.4:
        return damage_json(rng, json.dumps(raw | {"format_version": UNSEALED_VERSION}).encode())
    return sealed(damage_document(rng, raw))


SOUND_MANIFEST = json.dumps(manifest_json(contents()))
SOUND_GOLDEN = contents()[GOLDEN]
MANIFEST = Parser(
    name="manifest",
    damaged=_damaged_manifest,
    use=_use_manifest,
    refusals=(BundleError,),
    sound=sealed(manifest_json(contents())),
)
PARSERS = (
    _parser("golden.json", SOUND_GOLDEN, _use_golden),
    _parser("compile.json", LIBRARY, _use_library),
    _parser("costs", COSTS, _use_costs),
    _parser("block sizes", SIZES, _use_sizes),
    _parser("program.json", PLAN, _use_plan),
    _parser("pack.json", PACK, _use_pack, "pack.json"),
)


def manifests(count: int) -> Outcome:
    """Damage the manifest of a bundle."""
    return survey((MANIFEST, count))


def descriptions(count: int) -> Outcome:
    """Damage the other descriptions, ``count`` times in all."""
    return survey(*evenly(count, PARSERS))


ROWS = (
    Row(
        name="A1",
        fault="a manifest damaged in its values or its spelling",
        expected="BundleError, or a bundle whose tables give rows; at most 1 s and 64 MiB",
        quick=10_000,
        full=500_000,
        run=manifests,
    ),
    Row(
        name="A1 others",
        fault="golden.json, compile.json, pack.json, measured costs and block sizes, a GPU's plan; each damaged",
        expected="BundleError, or what it holds; at most 1 s and 64 MiB",
        quick=10_000,
        full=200_000,
        run=descriptions,
    ),
)
