"""Exports of any size: slices give what wholes give, and an interrupted export resumes where it stopped."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from tests.conftest import Command, Outcome
from tests.tiny import CONTEXT, HASH_HEADS, HIDDEN, ORDERS, ROW_DIM, VOCAB, TinyModel, TinySite, save_tokenizer
from tests.workshop import SilentReporter, Workshop, copy_folder, export, export_options, files_of, random_ids
from transformers import AutoConfig, AutoModelForCausalLM

from engram_export import export_memory, table_writer, weight_map
from engram_export.pipeline import Progress, export_bundle
from engram_export.repack import RowErrors
from engram_export.safetensors_file import SafetensorsFile
from engram_export.source import open_source
from engram_export.weights_file import SafetensorsWriter
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError
from engram_runtime.golden import Golden
from engram_runtime.hashing import column_offsets, derive_primes
from engram_runtime.safetensors_layout import TensorPlan
from engram_runtime.session import open_sites
from engram_runtime.tables.options import PREAD, TableOptions

PLAIN = TinyModel()
SITE = TinySite()
TINY_SLICE = 5000  # bytes: no whole number of rows of anything
# What slices of other sizes may round otherwise: the logits of the verification, and so its digest.
VERIFIED = ("golden/golden.json", "engram.json", "README.md")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("mixture")
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that is streamed read a few rows at a time."""
    for module in (weight_map, table_writer):
        monkeypatch.setattr(module, "SLICE_BYTES", TINY_SLICE)


def stored(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name not in VERIFIED}


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_slices_of_a_dense_model_are_the_whole(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    checkpoint = workshop.checkpoint(TinyModel(tied=False), SITE)
    whole = stored(workshop.bundle(checkpoint, quant=quant).path)
    sliced(monkeypatch)
    export(checkpoint, tmp_path / "bundle", quant=quant)
    assert stored(tmp_path / "bundle") == whole


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_slices_of_a_gguf_file_are_the_whole(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    path = workshop.gguf(kind, TinyModel(tied=False))
    whole = stored(workshop.bundle(path, quant="keep").path)
    sliced(monkeypatch)
    export(path, tmp_path / "bundle", quant="keep")
    assert stored(tmp_path / "bundle") == whole


@pytest.mark.parametrize(
    "quant", [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("none", "int8")), "int4"]
)
def test_slices_of_a_mixture_are_the_whole(
    mixture: Path, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    whole = stored(workshop.bundle(mixture, quant=quant).path)
    sliced(monkeypatch)
    export(mixture, tmp_path / "bundle", quant=quant)
    assert stored(tmp_path / "bundle") == whole


@pytest.mark.parametrize(
    "dtype", ["int4", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("int8", "fp8"))]
)
def test_slices_of_a_repacked_table_are_the_whole(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    checkpoint = workshop.checkpoint(PLAIN, SITE)
    whole = stored(workshop.bundle(checkpoint, tables="repack", table_dtype=dtype).path)
    sliced(monkeypatch)
    export(checkpoint, tmp_path / "bundle", tables="repack", table_dtype=dtype)
    assert stored(tmp_path / "bundle") == whole


def test_a_large_vocabulary_is_compared_at_the_last_positions(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = workshop.checkpoint(PLAIN, SITE)
    whole = Golden.read(workshop.bundle(checkpoint))
    monkeypatch.setattr(export_memory, "LOGITS_BYTES", 4 * VOCAB * 50)
    assert export(checkpoint, tmp_path / "bundle").model.tokens == 50
    part = Golden.read(Bundle.open(tmp_path / "bundle"))
    assert part.argmax == whole.argmax
    np.testing.assert_allclose(part.last_logits, whole.last_logits, atol=1e-5)


class Killed(SilentReporter):
    """Kills this process when a stage is through."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    @contextlib.contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Progress]:
        with super().stage(title, total_bytes) as progress:
            yield progress
        if title == self._title:
            signal.raise_signal(signal.SIGKILL)


class Told(SilentReporter):
    """Remembers the steps it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def step(self, title: str) -> None:
        self.steps.append(title)


KILLED_EXPORT = """
import json, sys
from pathlib import Path
from engram_export.pipeline import ExportOptions, export_bundle
from tests.test_streaming import Killed

paths = {"checkpoint": Path(sys.argv[1]), "out": Path(sys.argv[2])}
export_bundle(ExportOptions(**paths, **json.loads(sys.argv[3])), Killed(sys.argv[4]))
"""


def killed_export(checkpoint: Path, out: Path, stage: str, **changes: Any) -> dict[str, int]:
    """Kill an export after a stage; returns the inodes of what it had finished."""
    options = dataclasses.asdict(export_options(checkpoint, out, **changes))
    rest = {name: value for name, value in options.items() if name not in ("checkpoint", "out")}
    line = [sys.executable, "-c", KILLED_EXPORT, str(checkpoint), str(out), json.dumps(rest), stage]
    done = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    return inodes(out)


def inodes(out: Path) -> dict[str, int]:
    """Return the finished files of an interrupted export."""
    work = out.with_name(f".{out.name}.partial")
    lines = [json.loads(line) for line in (work / "journal.jsonl").read_text().splitlines()[1:]]
    return {line["path"]: (work / "bundle" / line["path"]).stat().st_ino for line in lines}


FILES = [
    "graph/weights.safetensors",
    "tables/layer_1.token_map.int32",
    "tables/layer_1-00001-of-00001.safetensors",
    "tables/layer_1-00001-of-00001.crc32",
]


@pytest.mark.parametrize(
    ("stage", "finished"),
    [
        pytest.param("weights", 1, marks=pytest.mark.exhaustive),
        pytest.param("table layer_1", 4, marks=pytest.mark.exhaustive),
        ("verify", 4),
        pytest.param("digests", 4, marks=pytest.mark.exhaustive),
    ],
)
def test_a_killed_export_is_resumed_to_the_same_bundle(
    workshop: Workshop, tmp_path: Path, stage: str, finished: int
) -> None:
    checkpoint, out = workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle"
    before = killed_export(checkpoint, out, stage)
    assert list(before) == FILES[:finished]
    reporter = Told()
    export_bundle(export_options(checkpoint, out), reporter)
    assert reporter.steps[0] == f"resuming an interrupted export, {finished} files are finished"
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert files_of(out) == files_of(workshop.bundle(checkpoint).path)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.exhaustive
def test_a_resumed_repacked_table_keeps_its_errors(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint, out = workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle"
    repack = {"tables": "repack", "table_dtype": "int4"}
    expected = export(checkpoint, tmp_path / "whole", **repack).rows
    before = killed_export(checkpoint, out, "table layer_1", **repack)
    assert export(checkpoint, out, **repack).rows == expected
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert expected.keys() == {"layer_1"}
    assert 0 < expected["layer_1"].mean < expected["layer_1"].max < 0.12


@pytest.mark.parametrize("change", [pytest.param("options", marks=pytest.mark.exhaustive), "checkpoint"])
def test_another_export_starts_anew_and_says_so(workshop: Workshop, tmp_path: Path, change: str) -> None:
    checkpoint = copy_folder(workshop.checkpoint(PLAIN, SITE), tmp_path / "checkpoint")
    killed_export(checkpoint, tmp_path / "bundle", "weights")
    if change == "checkpoint":
        (checkpoint / "model.safetensors").touch()
    reporter = Told()
    quant = "int8" if change == "options" else "none"
    export_bundle(export_options(checkpoint, tmp_path / "bundle", quant=quant), reporter)
    assert reporter.steps[0] == ("starting anew: an interrupted export was of another checkpoint or had other options")
    assert Bundle.open(tmp_path / "bundle").manifest.model.quantisation == quant


def test_a_kept_file_that_was_changed_is_found(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint, out = workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle"
    killed_export(checkpoint, out, "table layer_1")
    path = tmp_path / ".bundle.partial" / "bundle" / FILES[0]
    data = bytearray(path.read_bytes())
    data[-4] ^= 1  # the last bit of a float32, which no logit shows
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        export(checkpoint, out)
    assert str(caught.value) == f"{FILES[0]} is not what the interrupted export wrote; run the same command again"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_a_kept_file_that_was_cut_is_written_again(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint, out = workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle"
    killed_export(checkpoint, out, "table layer_1")
    (tmp_path / ".bundle.partial" / "bundle" / FILES[0]).write_bytes(b"cut")
    export(checkpoint, out)
    assert files_of(out) == files_of(workshop.bundle(checkpoint).path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("torn", [b'{"path": "gra', b"\0\0\0\n"])
def test_a_journal_that_is_torn_is_no_obstacle(workshop: Workshop, tmp_path: Path, torn: bytes) -> None:
    checkpoint, out = workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle"
    killed_export(checkpoint, out, "weights")
    with (tmp_path / ".bundle.partial" / "journal.jsonl").open("ab") as journal:
        journal.write(torn)
    export(checkpoint, out)
    assert files_of(out) == files_of(workshop.bundle(checkpoint).path)


def failing_export(checkpoint: Path, out: Path, command: Command, error: OSError) -> Outcome:
    """Export with a disk that fails at the table."""

    def fail(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_writer, "write_table_file", fail)
        return command("engram-export", checkpoint, "-o", out, "--quant", "none")


def test_a_disk_that_fails_keeps_what_is_finished_and_says_how_to_resume(
    workshop: Workshop, tmp_path: Path, command: Command
) -> None:
    checkpoint, out = workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle"
    outcome = failing_export(checkpoint, out, command, OSError(errno.EIO, "Input/output error"))
    kept = tmp_path / ".bundle.partial"
    assert outcome.code == 3
    told, sentence = outcome.err.splitlines()[-2:]
    assert told == f"finished files are kept in {kept}; run the same command again to resume"
    assert sentence.startswith("engram-export: Input/output error: ")
    assert list(inodes(out)) == FILES[:2]
    assert command("engram-export", checkpoint, "-o", out, "--quant", "none").code == 0
    assert files_of(out) == files_of(workshop.bundle(checkpoint).path)


def test_a_full_disk_gets_nothing_and_what_is_needed_is_said(
    workshop: Workshop, tmp_path: Path, command: Command
) -> None:
    checkpoint, out = workshop.checkpoint(PLAIN, SITE), tmp_path / "bundle"
    outcome = failing_export(checkpoint, out, command, OSError(errno.ENOSPC, "No space left on device"))
    assert outcome.code == 2
    assert re.fullmatch(
        rf"engram-export: no space to write {re.escape(str(out))}: at least [\d,]+ bytes are needed, no space left on "
        "device; free some or choose another place",
        outcome.err.splitlines()[-1],
    )
    assert list(tmp_path.iterdir()) == []


def test_errors_of_repacked_rows_are_printed(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    options = ("--tables", "repack", "--table-dtype", "int4", "--quant", "none")
    checkpoint = workshop.checkpoint(PLAIN, SITE)
    printed = command("engram-export", checkpoint, "-o", tmp_path / "text", *options).out
    result = command("engram-export", checkpoint, "-o", tmp_path / "json", *options, "--json").json
    errors = RowErrors(**result["row_errors"]["layer_1"])
    assert (
        f"{errors.num_rows} repacked rows of layer_1 are off by {errors.mean:.3%}, at most {errors.max:.3%}\n"
        in printed
    )


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "export_memory.py"
BARE_SITE = TinySite(convolution=False, gate_bias=False, gains=False, token_map=None, payload="float32")
TABLE = "engram.table.rows"


def with_large_table(checkpoint: Path, table_bytes: int) -> Path:
    """Give the site of a checkpoint a float32 table of more rows, all of it a hole in the file."""
    config = json.loads((checkpoint / "config.json").read_text())
    per_head = table_bytes // (4 * ROW_DIM) // (len(ORDERS) * HASH_HEADS)
    (primes,) = derive_primes(layers=1, rows_per_head=[per_head] * len(ORDERS), num_heads=HASH_HEADS)
    config["engram"]["num_rows"] = int(primes.sum())
    config["engram"]["hash"] |= {"primes": primes.tolist(), "offsets": column_offsets(primes).tolist()}
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    plans = [TensorPlan(name, "float32", values.shape) for name, values in tensors.items() if name != TABLE]
    (checkpoint / "model.safetensors").unlink()
    with SafetensorsWriter(
        checkpoint / "model.safetensors", [*plans, TensorPlan(TABLE, "float32", (int(primes.sum()), ROW_DIM))]
    ) as writer:
        for plan in plans:
            writer.write(plan.name, tensors[plan.name])
        writer.write_rows(TABLE, int(primes.sum()) - 1, np.ones((1, ROW_DIM), dtype=np.float32))
    return checkpoint


def test_a_system_that_writes_in_pieces_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    with SafetensorsWriter(tmp_path / "w", [TensorPlan("gain", "float32", (3, 4))]) as writer:
        writer.write("gain", values)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "w")["gain"], values, strict=True)


def fill_rows(checkpoint: Path, row_ids: NDArray[np.int64]) -> None:
    """Write random rows of the table."""
    path, entry = SafetensorsFile(checkpoint / "model.safetensors").locate(TABLE)
    rng = np.random.default_rng(0)
    with path.open("r+b") as file:
        for row in np.unique(row_ids).tolist():
            file.seek(entry.start + row * 4 * ROW_DIM)
            file.write(rng.normal(size=ROW_DIM).astype("<f4").tobytes())


def measured(checkpoint: Path) -> dict[str, float]:
    """Export by reference to ``bundle`` beside a checkpoint in a process of its own; returns its memory."""
    line = [sys.executable, str(BENCHMARK), "--one", str(checkpoint)]
    done = subprocess.run(line, cwd=BENCHMARK.parents[1], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_table_of_four_gib_is_exported_by_reference_in_no_more_memory_than_a_small_one(
    workshop: Workshop, tmp_path: Path
) -> None:
    checkpoint = workshop.checkpoint(PLAIN, BARE_SITE)
    small = measured(copy_folder(checkpoint, tmp_path / "small" / "checkpoint"))
    large = with_large_table(copy_folder(checkpoint, tmp_path / "large" / "checkpoint"), 4 << 30)
    source = open_source(large, engram=None, context=None)
    token_ids = np.array(random_ids(40))
    row_ids = source.tables[0].keyer.keyer(VOCAB, None).row_ids([], token_ids)
    fill_rows(large, row_ids)
    assert measured(large)["anonymous"] < small["anonymous"] + (16 << 20)
    (site,) = open_sites(Bundle.open(large.with_name("bundle")), TableOptions(io=PREAD))
    stored = SafetensorsFile(large / "model.safetensors")
    expected = [[stored.read_rows(TABLE, row, row + 1)[0] for row in rows] for rows in row_ids.tolist()]
    np.testing.assert_array_equal(site.rows([], token_ids), np.array(expected))
    assert np.abs(expected).min() > 0
    site.table.close()


@pytest.mark.slow
@pytest.mark.exhaustive  # row B7 of the faults has a bundle of a gigabyte as well
def test_memory_does_not_grow_with_the_checkpoint_and_is_what_the_plan_says() -> None:
    line = [sys.executable, str(BENCHMARK), "--size-mib", "64", "--size-mib", "1024"]
    done = subprocess.run(line, cwd=BENCHMARK.parents[1], capture_output=True, text=True, check=True)
    (_, small, *_), (_, large, predicted, _) = (
        [float(figure.replace(",", "")) for figure in row.split()] for row in done.stdout.splitlines()[2:]
    )
    assert large < 2 * small
    assert large / 2 < predicted < 3 * large
