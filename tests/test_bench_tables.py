"""``engram bench tables``: figures of made-up rounds, eviction, caps of memory, and the command on tiny bundles."""

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import pytest
from tests.conftest import Command
from tests.tiny import TinyModel
from tests.workshop import Workshop, copy_folder

from engram_export.engram_config import EngramConfig
from engram_runtime import cpu
from engram_runtime.bench import tables as bench_tables
from engram_runtime.bench import tables_runner
from engram_runtime.bench.cgroup import MemoryGroup, memory_group
from engram_runtime.bench.tables import StartWorker, TableBench, TableResult, TableSettings
from engram_runtime.bench.tables_cache import cached_share, evict, fill
from engram_runtime.bench.tables_report import markdown, percentile, state_figures, table_report
from engram_runtime.bench.tables_runner import CAPPED, COLD, WARM, Sample, TableRunner, load
from engram_runtime.errors import TargetError
from engram_runtime.keyer_spec import TokenKeyerSpec
from engram_runtime.records import RecordFormat
from engram_runtime.session import close_sites, open_sites
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.options import TableOptions

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SETTINGS = TableSettings(tokens=100, rounds=2, depth=8, cap_bytes=None)
FACTS = {"io": "mmap", "choice": "it is mapped", "decoder": "numpy", "reads_per_token": 1, "probed_file": "rows"}
RECORD = RecordFormat(payload="int8", columns=4, scale="none", scale_columns=4)
SPEC = TableSpec(
    site="layer_1",
    num_rows=1 << 28,
    record=RECORD,
    parts=(
        TablePart(
            row_bytes=4, ranges=(RowRange(first_row=0, num_rows=1 << 28, file="rows", external=False, offset=0),)
        ),
    ),
    keyer=TokenKeyerSpec(vocab_size=1 << 28, pad_id=0),
)


def sample(speed: float = 1.0) -> Sample:
    """Return a round that is ``speed`` times as fast as the raw probe."""
    return {
        "ids_token": [1e-6, 2e-6],
        "token": [100e-6 / speed, 300e-6 / speed],
        "ids_chunk": [1e-3],
        "chunk": [10e-3 / speed],
        "raw_token": [100e-6, 300e-6],
        "raw_chunk": [10e-3],
        "cold_share": 0.5,
    }


def test_figures_are_over_all_rounds_and_ratios_within_them() -> None:
    found = state_figures([sample(1.0), sample(2.0), sample(4.0)], rows=100, reads=200)
    assert found == {
        "token_us": {"p50": 87.5, "p99": 300.0},
        "ids_token_us": {"p50": 1.5, "p99": 2.0},
        "chunk_ms": {"p50": 5.0, "p99": 10.0},
        "ids_chunk_ms": {"p50": 1.0, "p99": 1.0},
        "rows_s": 20000.0,
        "cold_share": 0.5,
        "raw_token_us": {"p50": 200.0, "p99": 300.0},
        "raw_chunk_ms": {"p50": 10.0, "p99": 10.0},
        "raw_reads_s": 20000.0,
        "token_over_raw": {"median": 0.5, "least": 0.25, "largest": 1.0},
        "token_p99_over_raw": 1.0,
        "rate_over_raw": {"median": 2.0, "least": 1.0, "largest": 4.0},
    }


def test_warm_rounds_are_held_against_numpys_take() -> None:
    found = state_figures([{**sample(), "take": [8e-3]}, {**sample(), "take": [9e-3]}], rows=100, reads=100)
    assert found["take_rows_s"] == 11760.0
    assert found["rate_over_take"] == {"median": 0.85, "least": 0.8, "largest": 0.9}


def test_percentiles_are_values_that_were_measured() -> None:
    values = list(range(200, 0, -1))
    assert [percentile(values, percent) for percent in (50, 99, 100)] == [100, 198, 200]
    assert percentile([3.0, 1.0, 2.0], 99) == 3.0


def made_up_report(**samples: Any) -> dict[str, Any]:
    skipped = {state: "no such state" for state in (WARM, COLD, CAPPED) if state not in samples}
    result = TableResult(SPEC, FACTS, samples, skipped)
    return table_report([result], SETTINGS, (0.5, 0.75))


def test_a_report_says_what_was_not_measured_and_why() -> None:
    report = made_up_report(warm=[{**sample(), "take": [8e-3]}], cold=[sample()])
    (table,) = report["tables"]
    assert table["capped"] == {"skipped": "no such state"}
    assert (table["table_bytes"], table["cap_bytes"]) == (1 << 30, 256 << 20)
    assert json.loads(json.dumps(report)) == report
    assert markdown(report).splitlines() == [
        "load average 0.50 before, 0.75 after; 2 rounds, chunks of 100 tokens; ratios are taken within rounds",
        "",
        "layer_1: 1.0 GiB, 1 rows of 4 bytes a token, rows decoded by numpy",
        "it is mapped",
        "cold: table closed and its pages dropped by fadvise before each round; what lies below may still cache",
        "capped not measured: no such state",
        "",
        "| | warm | cold |",
        "|---|---:|---:|",
        "| one token, us: p50, p99 | 200, 300 | 200, 300 |",
        "| of that row ids, us | 1.5, 2 | 1.5, 2 |",
        "| 1 raw reads at depth 1, us | 200, 300 | 200, 300 |",
        "| one token over raw, p50 (least to largest) | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |",
        "| one token over raw, p99 | 1.00 | 1.00 |",
        "| 100 tokens, ms: p50, p99 | 10, 10 | 10, 10 |",
        "| of that row ids, ms | 1, 1 | 1, 1 |",
        "| M rows/s | 0.01 | 0.01 |",
        "| M raw reads/s at depth 8 | 0.01 | 0.01 |",
        "| rate over raw (least to largest) | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |",
        "| M rows/s of numpy's take of the records | 0.0125 |  |",
        "| rate over take (least to largest) | 0.80 (0.80 to 0.80) |  |",
        "| rows not known to be in memory | 50.0% | 50.0% |",
    ]


def test_a_report_without_raw_reads_says_why() -> None:
    refused = {key: value for key, value in sample().items() if not key.startswith("raw")}
    text = markdown(made_up_report(warm=[{**refused, "no_raw": "direct reads are refused"}]))
    assert "raw reads not measured: direct reads are refused" in text.splitlines()
    assert "over raw" not in text


class FakeWorker:
    """Answers at once and notes what it was asked."""

    def __init__(self, log: list[tuple[str, dict[str, Any]]], facts: dict[str, Any], stayed: float) -> None:
        self._log, self._facts, self._stayed = log, facts, stayed

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        self._log.append((what, details))
        return {"load": self._facts, "evict": {"stayed": self._stayed}, "fill": {}, "round": sample()}[what]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def fake_bench(**facts: Any) -> tuple[TableBench, list[tuple[str, dict[str, Any]]], list[int]]:
    """Return a bench of fake workers, what they are asked, and the steps of its progress."""
    log: list[tuple[str, dict[str, Any]]] = []
    steps: list[int] = []
    stayed = facts.pop("stayed", 0.0)
    bench = TableBench(
        model="x.engram",
        executor="tvm",
        options=TableOptions(),
        settings=SETTINGS,
        progress=steps.append,
        start_worker=cast(StartWorker, lambda name, command: FakeWorker(log, {**FACTS, **facts}, stayed)),
    )
    return bench, log, steps


@pytest.fixture
def no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have control groups be refused."""

    def refuse(name: str, num_bytes: int) -> None:
        raise TargetError("no groups here")

    monkeypatch.setattr(bench_tables, "memory_group", refuse)


@pytest.mark.usefixtures("no_groups")
def test_rounds_have_random_tokens_of_their_own() -> None:
    bench, log, steps = fake_bench()
    result = bench.measure(SPEC)
    rounds = [(asked["state"], asked["seed"]) for what, asked in log if what == "round"]
    assert rounds == [(WARM, 0), (WARM, 3), (WARM, 6), (COLD, 1), (COLD, 4), (COLD, 7)]
    assert {state: len(samples) for state, samples in result.samples.items()} == {WARM: 2, COLD: 2}
    assert sum(steps) == 3 * (1 + SETTINGS.rounds)


@pytest.mark.usefixtures("no_groups")
def test_a_refused_cap_is_said() -> None:
    bench, _, _ = fake_bench()
    assert bench.measure(SPEC).skipped == {CAPPED: "no groups here"}


def test_a_table_that_the_least_cap_holds_is_not_capped_unasked() -> None:
    bench, log, steps = fake_bench()
    reason = "a process needs 256.0 MiB, which hold the whole table of 4.0 MiB; give --memory to measure all the same"
    assert bench.measure(dataclasses.replace(SPEC, num_rows=1 << 20)).skipped == {CAPPED: reason}
    assert "fill" not in {what for what, _ in log}
    assert sum(steps) == 3 * (1 + SETTINGS.rounds)


def test_tables_in_memory_have_no_cold_rows() -> None:
    bench, _, steps = fake_bench(io="resident")
    reason = "the table is held in memory, where no row is cold; measure its files with --table-io mmap"
    assert bench.measure(SPEC).skipped == {COLD: reason, CAPPED: reason}
    assert sum(steps) == 3 * (1 + SETTINGS.rounds)


def test_pages_that_stay_in_memory_are_not_called_cold() -> None:
    bench, _, _ = fake_bench(stayed=0.4)
    assert bench.measure(SPEC).skipped[COLD] == (
        "40% of the table's pages stay in memory: its file system is memory, another process maps them, or this user "
        "may not ask"
    )


def on_disk(folder: Path) -> bool:
    """Whether the file system of a folder is not memory."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    _, kind = max((mount for mount in mounts if folder.is_relative_to(mount[0])), key=lambda mount: len(mount[0]))
    return kind not in ("tmpfs", "ramfs")


def test_evicted_pages_are_gone_and_filling_brings_them_back(tmp_path: Path) -> None:
    if not on_disk(tmp_path):
        pytest.skip("the temporary folder is memory")
    path = tmp_path / "rows"
    path.write_bytes(bytes(8 << 20))
    assert cached_share(path) == 1.0
    evict(path)
    assert cached_share(path) == 0.0
    fill(path, 4 << 20)
    assert cached_share(path) >= 0.5


@pytest.fixture
def own_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have this process be in the control group of a line of /proc/self/cgroup, all of them below ``tmp_path``."""
    monkeypatch.setattr(cpu, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpu, "OWN_CGROUPS", tmp_path / "own")

    def enter(line: str) -> None:
        (tmp_path / "own").write_text(f"{line}\n")

    return enter


def test_systems_without_groups_of_memory_are_told(own_group: Callable[[str], None]) -> None:
    own_group("2:cpu:/here")
    with (
        pytest.raises(TargetError, match=r"^this system has no control groups of memory; measure without a cap$"),
        memory_group("x", 1 << 20),
    ):
        pass


def test_a_group_that_can_not_be_made_is_named(tmp_path: Path, own_group: Callable[[str], None]) -> None:
    own_group("4:memory:/here")
    with pytest.raises(TargetError) as caught, memory_group("x", 1 << 20):
        pass
    place = tmp_path / "memory" / "here"
    assert str(caught.value) == (f"a control group below {place} can't be made: No such file or directory; run as root")


def test_a_group_without_a_say_in_memory_is_told_and_removed(tmp_path: Path, own_group: Callable[[str], None]) -> None:
    (tmp_path / "here").mkdir()
    own_group("0::/here")
    with pytest.raises(TargetError) as caught, memory_group("x", 1 << 20):
        pass
    assert str(caught.value) == (
        f"control groups below {tmp_path / 'here'} can't limit memory; enable the memory controller there"
    )
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize(
    "files",
    [
        {"memory.limit_in_bytes": "4096", "memory.swappiness": "0"},
        {"memory.max": "4096", "memory.swap.max": "0"},
        {"memory.max": "4096"},
    ],
)
def test_limits_are_written_as_each_interface_wants_them(tmp_path: Path, files: dict[str, str]) -> None:
    for name in files:
        (tmp_path / name).write_text("max")
    MemoryGroup(tmp_path).limit(4096)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_a_process_over_its_cap_is_ended() -> None:
    greedy = (sys.executable, "-c", "bytearray(256 << 20)")
    try:
        with memory_group("test", 64 << 20) as group:
            assert subprocess.run(group.command((sys.executable, "-c", "pass")), check=False).returncode == 0
            assert subprocess.run(group.command(greedy), check=False).returncode == -9
    except TargetError as error:
        pytest.skip(str(error))
    assert not group.folder.exists()


FIGURES = {"token_us", "ids_token_us", "chunk_ms", "ids_chunk_ms", "rows_s", "cold_share"}


def test_the_command_measures_a_tiny_bundle(workshop: Workshop, command: Command) -> None:
    line = ("bench", "tables", workshop.uncompiled().path, "--rounds", 1, "--tokens", 8, "--depth", 2)
    (table,) = command("engram", *line, "--table-io", "mmap", "--memory", "256MiB", "--json").json["tables"]
    assert (table["site"], table["rows_per_token"], table["io"], table["decoder"]) == ("layer_1", 4, "mmap", "numpy")
    assert table[WARM].keys() >= {*FIGURES, "take_rows_s", "rate_over_take"}
    assert all(table[state].keys() >= FIGURES or table[state].keys() == {"skipped"} for state in (COLD, CAPPED))


def test_the_command_prints_a_table_and_what_it_leaves_out(workshop: Workshop, command: Command) -> None:
    bundle = workshop.uncompiled().path
    line = ("bench", "tables", bundle, "--rounds", 1, "--tokens", 8, "--table-io", "resident")
    lines = command("engram", *line).out.splitlines()
    assert "| | warm |" in lines
    assert (
        f"no library decodes its rows: bundle {bundle} has no compiled library; "
        f"run: engram compile {bundle} --target native"
    ) in lines
    assert (
        "cold not measured: the table is held in memory, where no row is cold; measure its files with --table-io mmap"
    ) in lines


@pytest.fixture
def runner(workshop: Workshop) -> Iterator[TableRunner]:
    """The site of a tiny bundle, its table mapped."""
    bundle = str(workshop.uncompiled().path)
    with contextlib.closing(load(bundle, site="layer_1", executor="tvm", options={"io": "mmap"})) as runner:
        yield runner


def test_pages_of_a_table_in_use_are_evicted(runner: TableRunner, tmp_path: Path) -> None:
    if not on_disk(tmp_path):
        pytest.skip("the temporary folder is memory")
    runner.round(WARM, seed=0, tokens=8, depth=2)
    assert runner.evict() == {"stayed": 0.0}


def test_a_refused_raw_read_is_said_in_the_sample(runner: TableRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, depth: int) -> None:
        raise OSError(22, "rows can't be read directly: Invalid argument")

    monkeypatch.setattr(tables_runner, "DirectReader", refuse)
    sample = runner.round(WARM, seed=0, tokens=8, depth=2)
    assert sample["no_raw"] == "rows can't be read directly: Invalid argument"
    assert sample.keys().isdisjoint({"raw_token", "raw_chunk"})


def test_a_bundle_without_tables_is_refused(workshop: Workshop, command: Command) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel()))
    outcome = command("engram", "bench", "tables", bundle.path)
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: bundle {bundle.path} has no tables; measure it with: engram bench {bundle.path}\n",
    )


def test_a_bundle_in_a_folder_called_tables_is_reached(
    workshop: Workshop, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_folder(workshop.uncompiled().path, tmp_path / "tables")
    monkeypatch.chdir(tmp_path)
    outcome = command("engram", "bench", "./tables")
    assert outcome.err.splitlines()[-1] == (
        "engram: these measurements need 1024 tokens, the context holds 192; give a smaller --prompt-tokens, "
        "--decode-tokens or --depth"
    )


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a program of benchmarks/ by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.parametrize(("record_bytes", "columns"), [(160, 16), (264, 48)])
def test_a_big_table_is_a_bundle_whose_rows_are_numbers(
    benchmark: Any, tmp_path: Path, record_bytes: int, columns: int
) -> None:
    big = benchmark("big_table")
    table = big.big_table(1 << 20, big.RECORDS_BY_BYTES[record_bytes], columns)
    bundle = big.write_bundle(tmp_path / "big.engram", table, lambda count: None)
    bundle.verify_digests()
    assert table.num_rows * record_bytes >= 1 << 20
    sites = open_sites(bundle)
    rows = sites[0].rows([5, 6, 7], np.arange(1000))
    close_sites(sites)
    assert rows.shape == (1000, columns, table.record.columns)
    assert np.isfinite(rows).all()
    assert rows.std() > 0.1


def test_a_sparse_table_takes_no_disk(benchmark: Any, tmp_path: Path) -> None:
    big = benchmark("big_table")
    big.write_sparse_bundle(tmp_path / "holes.engram", big.big_table(1 << 30, big.INT8, 16))
    holes = (tmp_path / "holes.holes.safetensors").stat()
    assert holes.st_size > 1 << 30
    assert holes.st_blocks * 512 < 1 << 20


def test_a_site_for_smollm2_is_one_that_export_reads(benchmark: Any) -> None:
    big = benchmark("big_table")
    table = big.big_table(1 << 20, big.INT8, 16, vocab_size=big.SMOLLM2_VOCAB)
    config = EngramConfig.from_dict(json.loads(json.dumps(big.site_config(table))))
    assert (config.keyer, config.num_rows, config.row_dim) == (table.keyer, table.num_rows, 160)


def test_costs_that_do_not_grow_are_called_flat(benchmark: Any) -> None:
    cost = benchmark("lookup_cost")
    flat = cost.fit({1024: [10e-6], 2048: [11e-6], 4096: [10e-6]})
    assert flat == {"sizes": [1024, 2048, 4096], "us": [10, 11, 10], "us_per_doubling": 0, "growth": 0, "flat": True}
    assert cost.sentence("warm", cost.fit({1024: [10e-6], 2048: [20e-6]})) == (
        "warm: 10.0 to 20.0 us over 1 doublings, fit +10.0 us a doubling, +66.7% over all: not flat"
    )


SMAPS = """\
7f0000000000-7f0000100000 r--s 00000000 fe:00 1       /tables/rows.safetensors
Rss:                1000 kB
Anonymous:             0 kB
7f0000100000-7f0000200000 rw-p 00000000 fe:00 2       /bundle/lib/target/weights.bin
Rss:                 500 kB
Anonymous:            10 kB
7f0000200000-7f0000300000 r-xp 00000000 fe:00 3       /bundle/lib/target/model.so
Rss:                  40 kB
Anonymous:             0 kB
7f0000300000-7f0000400000 rw-p 00000000 00:00 0
Rss:                 200 kB
Anonymous:           200 kB
"""


def test_resident_memory_is_told_apart_by_what_it_holds(benchmark: Any) -> None:
    found = benchmark("table_decode").resident_bytes(SMAPS, {"/tables/rows.safetensors"}, "/bundle")
    kib = {name: size // 1024 for name, size in found.items()}
    assert kib == {"anonymous": 210, "table": 1000, "weights": 490, "code": 40}
