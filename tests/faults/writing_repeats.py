"""B6, B7: the same export twice, and one that may hold little memory."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from tests.faults.row import CannotRun, Outcome, Row
from tests.faults.warm import contents

from engram_runtime.bench.cgroup import memory_group
from engram_runtime.bundle import Bundle
from engram_runtime.errors import TargetError

EXPORT = (sys.executable, "-P", "-c", "from engram_export.cli import main; main()")
WAYS = (
    ("--quant", "int8"),
    ("--quant", "int4", "--tables", "repack", "--table-dtype", "int4"),
    ("--quant", "none", "--tables-only"),
)
CAP_BYTES = 640 << 20  # the goal is 512 MB and one shard
TABLES = ((1 << 30, ()), (1 << 30, ("--tables", "repack", "--table-dtype", "int4")), (3 << 30, ()))


def repeats(count: int) -> Outcome:
    """Export in several ways, each twice, by processes with other hash seeds and other numbers of threads."""
    from tests.tiny import TinyModel, TinySite, add_sites, save_checkpoint

    root = Path(tempfile.mkdtemp())
    checkpoint = add_sites(save_checkpoint(root / "checkpoint", TinyModel()), TinySite())
    failures: list[str] = []
    differing = compared = 0
    for way in WAYS[:count]:
        made = []
        for seed in range(2):
            out = root / f"{'-'.join(way)}-{seed}"
            _export([checkpoint, "-o", out, *way], {"PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": str(seed + 1)})
            made.append(contents(out))
        names = sorted(set(made[0]) | set(made[1]))
        compared += len(names)
        different = [name for name in names if made[0].get(name) != made[1].get(name)]
        differing += bool(different)
        failures += [f"{' '.join(way)}: {name}" for name in different]
    tried = len(WAYS[:count])
    return Outcome(tried=tried, survived=tried - differing, figure=f"{compared} files", failures=tuple(failures[:8]))


def capped(count: int) -> Outcome:
    """Export tables larger than the memory an export may have."""
    root = Path(tempfile.mkdtemp())
    failures, figures = [], []
    for number, (num_bytes, options) in enumerate(TABLES[:count]):
        checkpoint = _large(root / f"checkpoint-{number}", num_bytes)
        peak = _export_capped([checkpoint, "-o", root / "out", *options])
        if peak is None:
            failures.append(f"{num_bytes} bytes {' '.join(options)}: killed or failed with {CAP_BYTES} bytes")
        else:
            Bundle.open(root / "out").verify_digests()
            figures.append(f"{num_bytes >> 20} MiB: {peak >> 20} MiB")
            shutil.rmtree(root / "out")
        shutil.rmtree(checkpoint)
    tried = len(TABLES[:count])
    figure = f"most held for tables of {', '.join(figures)}"
    return Outcome(tried=tried, survived=tried - len(failures), figure=figure, failures=tuple(failures))


def _export_capped(arguments: Sequence[object]) -> int | None:
    """Export in a control group; returns the most memory that was held, None if it failed."""
    try:
        with memory_group(f"fault-{os.getpid()}", CAP_BYTES) as group:
            process = subprocess.Popen(group.command([*EXPORT, *map(str, arguments)]), stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    except TargetError as error:
        raise CannotRun(str(error)) from error
    return usage.ru_maxrss << 10 if process.returncode == 0 else None


def _large(folder: Path, num_bytes: int) -> Path:
    """Save a checkpoint with a table of so many bytes, all of it holes, which read as zeros."""
    from tests import tiny

    from engram_export.weights_file import SafetensorsWriter
    from engram_runtime.safetensors_layout import TensorPlan

    rows = num_bytes // (len(tiny.ORDERS) * tiny.HASH_HEADS * (tiny.ROW_DIM + 2))
    made = tiny._site_tensors
    tiny.save_checkpoint(folder, tiny.TinyModel())
    with (
        mock.patch.object(tiny, "ROWS_PER_HEAD", (rows, rows)),
        mock.patch.object(tiny, "_site_tensors", lambda site, num_rows: made(site, 4)),
    ):
        tiny.add_sites(folder, tiny.TinySite())
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    num_rows = json.loads((folder / "config.json").read_text())["engram"]["num_rows"]
    plans = [TensorPlan(name, values.dtype.name, _shape(name, values, num_rows)) for name, values in tensors.items()]
    path.unlink()
    writer = SafetensorsWriter(path, plans)
    for name, values in tensors.items():
        writer.write_at(writer.offsets[name], np.zeros(0, np.uint8) if ".table." in name else values)
    writer.close()
    return folder


def _shape(name: str, values: NDArray[Any], num_rows: int) -> tuple[int, ...]:
    return (num_rows, *values.shape[1:]) if ".table." in name else values.shape


def _export(arguments: Sequence[object], environment: dict[str, str]) -> None:
    command = [*EXPORT, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"an export fails: {done.stderr[-500:]}")


ROWS = (
    Row(
        name="B6",
        fault="the same export twice, in processes with other hash seeds and numbers of threads",
        expected="every file the same byte for byte",
        quick=2,
        full=3,
        run=repeats,
    ),
    Row(
        name="B7",
        fault=f"an export that may hold {CAP_BYTES >> 20} MiB, of a table of 1 GiB (full: of 3 GiB)",
        expected="it succeeds and verifies",
        quick=1,
        full=3,
        run=capped,
    ),
)
