"""C11: values that are not finite numbers, at every stage from the checkpoint to the sampler."""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tests.faults.libraries_code import compiled_bundle
from tests.faults.row import Outcome, Row
from tests.test_host_table import COLUMNS, NGRAMS, int8_with, single
from tests.test_host_table import ROWS as TABLE_ROWS
from tests.tiny import TinyModel, TinySite
from tests.workshop import Workshop, export

from engram_export.table_writer import copy_table, repack_table
from engram_export.weights_file import SafetensorsWriter
from engram_runtime import LLM, Bundle, SamplingOptions
from engram_runtime.errors import BundleError, CheckpointError, EngramError, NumericError, TableError
from engram_runtime.library import find_library
from engram_runtime.safetensors_layout import TensorPlan
from engram_runtime.sampling import finite, make_sampler
from engram_runtime.tables.overlay_file import OverlaySpec, write_overlay

BAD = (float("nan"), float("inf"), float("-inf"))
PROMPT_IDS = [5, 6, 7, 8]
VOCABULARY, REPEATS = 49_152, 2000
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WHOLE_EXPORTS_OF = 60  # injections for one export of a whole model, which takes seconds

Injection = Callable[[random.Random, Path], object]


def not_finite(count: int) -> Outcome:
    """Put NaN or infinity somewhere, so many times; an error that says so must come before any token."""
    rng, failures = random.Random("C11"), []
    with compiled_bundle() as bundle, tempfile.TemporaryDirectory() as folder:
        stages: dict[str, tuple[Injection, type[EngramError]]] = {
            "weight": (weight, CheckpointError),
            "table row": (table_row, CheckpointError),
            "table scale": (table_scale, CheckpointError),
            "overlay": (overlay_row, TableError),
            "sampler": (logit, NumericError),
            "state": (state_of(bundle), NumericError),
            "packed weights": (packed_weights_of(bundle), BundleError),
            "table file": (table_file_of(bundle), TableError),
        }
        for number in range(count):
            name = list(stages)[number % len(stages)] if number % WHOLE_EXPORTS_OF else "export"
            inject, wanted = stages.get(name, (whole_export, CheckpointError))
            place = Path(folder) / str(number)
            place.mkdir()
            found = error_of(partial(inject, rng, place))
            shutil.rmtree(place)
            word = "CRC-32" if name == "table file" else "finite"
            if not isinstance(found, wanted) or word not in str(found):
                failures.append(f"{number}, {name}: {found!r}")
    return Outcome(
        tried=count, survived=count - len(failures), figure=cost_of_the_check(), failures=tuple(failures[:10])
    )


def error_of(act: Callable[[], object]) -> EngramError | None:
    try:
        act()
    except EngramError as error:
        return error
    return None


def spoiled(rng: random.Random, values: torch.Tensor) -> torch.Tensor:
    """Return values of which one is not finite."""
    changed = values.clone()
    changed.view(-1)[rng.randrange(changed.numel())] = rng.choice(BAD)
    return changed


def weight(rng: random.Random, place: Path) -> None:
    """Write a tensor of a bundle's weights."""
    shape = tuple(rng.randrange(1, 40) for _ in range(rng.randrange(1, 4)))
    dtype = rng.choice(["float32", "float16"])
    values = np.zeros(shape, dtype=dtype)
    values.reshape(-1)[rng.randrange(values.size)] = rng.choice(BAD)
    with SafetensorsWriter(place / "weights", [TensorPlan("w", dtype, shape)]) as writer:
        if rng.random() < 0.5:
            writer.write("w", values)
        else:
            for start in range(shape[0]):
                writer.write_rows("w", start, values[start : start + 1])


def table_row(rng: random.Random, place: Path) -> None:
    """Copy or repack a table of floats."""
    layout = single(rng.choice(FLOATS))
    ((name, rows),) = layout.files[0].items()
    layout.files[0][name] = spoiled(rng, rows)
    source = layout.source(place)
    if rng.random() < 0.5:
        copy_table(source, NGRAMS, place, lambda count: None)
    else:
        repack_table(source, NGRAMS, "int8", place, lambda count: None)


def table_scale(rng: random.Random, place: Path) -> None:
    """Look through the scales of a table, as exports do before all else."""
    layout = int8_with(torch.float16)
    layout.files[0]["scales"] = spoiled(rng, layout.files[0]["scales"])
    layout.source(place).check_scales()


def overlay_row(rng: random.Random, place: Path) -> None:
    """Write rows to lay over a table."""
    layout = single(torch.float32)
    record = layout.source(place).record
    ids = np.sort(rng.sample(range(TABLE_ROWS), 5)).astype(np.int64)
    values = spoiled(rng, torch.zeros(5, COLUMNS)).numpy()
    spec = OverlaySpec(site="x", num_rows=TABLE_ROWS, record=record, keyer_sha256="ab" * 32, others="table")
    write_overlay(place / "overlay", spec, ids, values.view(np.uint8))


def logit(rng: random.Random, place: Path) -> None:
    """Choose a token by one bad logit among many."""
    logits = np.zeros(VOCABULARY, dtype=np.float32)
    logits[rng.randrange(VOCABULARY)] = rng.choice(BAD)
    make_sampler(SamplingOptions(temperature=rng.choice([0.0, 0.7]), top_k=rng.choice([0, 5])))(logits, PROMPT_IDS)


def state_of(bundle: Bundle) -> Injection:
    """Return what spoils a value in a cache.

    Not a key: the softmax passes a key over whose score is no number, and nothing computed here is one without its
    token's logits having been refused.
    """

    def inject(rng: random.Random, place: Path) -> None:
        with LLM(bundle.path, threads=1) as llm:
            llm.session.prefill(PROMPT_IDS)
            name = rng.choice([spec.name for spec in llm.session.state_specs if spec.name.startswith("value")])
            state = llm.session.states[name]
            head, position, column = (rng.randrange(size) for size in (state.shape[1], 4, state.shape[3]))
            state[0, head, position, column] = rng.choice(BAD)
            logits = llm.session.decode([9])[-1]
            make_sampler(SamplingOptions())(logits, PROMPT_IDS)

    return inject


def packed_weights_of(bundle: Bundle) -> Injection:
    """Return what spoils a number of the compiled library's scales, gains and biases."""

    def inject(rng: random.Random, place: Path) -> None:
        copy = Path(shutil.copytree(bundle.path, place / "bundle"))
        folder, info = find_library(Bundle.open(copy))
        tensor = rng.choice([each for each in info.tensors if each.dtype == "float32"])
        (folder / info.weights).chmod(0o644)
        weights = np.memmap(folder / info.weights, dtype=np.uint8, mode="r+")
        values = weights[tensor.offset : tensor.end].view(np.float32)
        values[rng.randrange(len(values))] = rng.choice(BAD)
        weights.flush()
        say(copy)

    return inject


def table_file_of(bundle: Bundle) -> Injection:
    """Return what spoils the scales of all rows of a table that is written: their checksums tell."""

    def inject(rng: random.Random, place: Path) -> None:
        copy = Path(shutil.copytree(bundle.path, place / "bundle"))
        (table,) = bundle.manifest.tables
        (part,) = table.parts
        (rows,) = part.ranges
        path = copy / rows.file
        path.chmod(0o644)
        records = np.memmap(path, dtype=np.uint8, mode="r+", offset=rows.offset)
        scales = records.reshape(rows.num_rows, part.row_bytes)[:, table.record.payload_bytes :]
        scales[:] = np.array([rng.choice(BAD)], dtype=np.float16).view(np.uint8)
        records.flush()
        say(copy)

    return inject


def say(folder: Path) -> Sequence[int]:
    with LLM(folder, threads=1) as llm:
        return llm.generate(PROMPT_IDS, max_tokens=4).token_ids


def whole_export(rng: random.Random, place: Path) -> None:
    """Export a checkpoint of which one value isn't finite."""
    checkpoint = Workshop(place).checkpoint(TinyModel(), TinySite())
    path = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = rng.choice([name for name, values in tensors.items() if values.is_floating_point() and name != "scale"])
    tensors[name] = spoiled(rng, tensors[name])
    safetensors.torch.save_file(tensors, path, {"format": "pt", "spoiled": json.dumps(name)})
    export(checkpoint, place / "bundle", quant="int8")


def cost_of_the_check() -> str:
    """Time what every token's logits are checked by."""
    logits = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        finite(logits)
        took.append(time.perf_counter() - began)
    return f"checking {VOCABULARY:,} logits takes {1e6 * float(np.median(took)):.0f} us"


ROWS = (
    Row(
        name="C11",
        fault="NaN or infinity in weights, rows, scales, overlays, states, packed weights, logits",
        expected="export refuses it, running ends with an error that says so",
        quick=96,
        full=5000,
        run=not_finite,
    ),
)
