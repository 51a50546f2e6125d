"""Statistics of tables equal those of plain numpy over the whole table, in memory that does not grow with it."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tests.conftest import Command
from tests.small_tables import as_bytes, row_format
from tests.tiny import TinyModel
from tests.workshop import Workshop, copy_folder

from engram_export.repack import RowErrors, encode_rows, repacked_format
from engram_runtime.keyer_spec import KeyerSpec, NgramKeyerSpec, TokenKeyerSpec
from engram_runtime.lens import distinct as distinct_module
from engram_runtime.lens import table_stats as table_stats_module
from engram_runtime.lens.distinct import DistinctRecords
from engram_runtime.lens.mixing import in_sample, mixed_bits, record_hashes
from engram_runtime.lens.norms import NormHistogram, row_norms
from engram_runtime.lens.repack_errors import REPACKING
from engram_runtime.lens.table_stats import sample_blocks, table_stats
from engram_runtime.records import RecordFormat
from engram_runtime.table_spec import TablePart, TableSpec

STEP_ERROR = 0.006  # of a quantile, see `NormHistogram`
FLOAT16 = row_format("float16", "none", columns=32)


class ArrayReader:
    """Records in memory, that notes which were read."""

    def __init__(self, records: NDArray[np.uint8]) -> None:
        self.records = records
        self.read: list[int] = []

    def read_rows(self, first: int, count: int) -> NDArray[np.uint8]:
        self.read += range(first, first + count)
        return self.records[first : first + count]


def random_values(rows: int, columns: int = 32, seed: int = 0) -> NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, columns)) * rng.lognormal(size=(rows, 1))).astype(np.float16)


def spec_of(rows: int, record: RecordFormat, keyer: KeyerSpec | None = None) -> TableSpec:
    part = TablePart(row_bytes=record.record_bytes, ranges=())
    keyer = keyer or TokenKeyerSpec(vocab_size=rows, pad_id=0)
    return TableSpec(site="layer_1", num_rows=rows, record=record, parts=(part,), keyer=keyer)


def stats_of(values: NDArray[np.float16], keyer: KeyerSpec | None = None, wanted: int | None = None) -> dict[str, Any]:
    """Return the statistics of rows ``[N, 32]``."""
    reader = ArrayReader(as_bytes(values))
    return table_stats(spec_of(len(values), FLOAT16, keyer), reader, wanted).to_dict()


def two_columns(rows: int) -> NgramKeyerSpec:
    """Return a keyer of two heads whose rows are the first and the second half of all but the last three."""
    half = (rows - 3) // 2
    return NgramKeyerSpec(
        orders=(2,), num_heads=2, multipliers=(3, 5), primes=(half, rows - 3 - half), offsets=(0, half), pad_id=0
    )


def check_norms(found: dict[str, Any], norms: NDArray[np.float64]) -> None:
    """Hold the figures of a histogram against all norms."""
    assert (found["rows"], found["min"], found["max"]) == (len(norms), norms.min(), norms.max())
    ranked = np.sort(norms)
    for name, share in (("median", 0.5), ("p99", 0.99)):
        exact = ranked[max(1, math.ceil(share * len(norms))) - 1]
        assert abs(found[name] - exact) <= STEP_ERROR * exact


@pytest.mark.parametrize("rows", [1, 100, 3000])
def test_norms_are_those_of_numpy(rows: int) -> None:
    values = random_values(rows)
    found = stats_of(values)["norms"]
    check_norms(found, np.linalg.norm(values.astype(np.float64), axis=1))
    assert sum(count for _, _, count in found["histogram"]) == rows
    assert len(found["histogram"]) <= 16


def test_norms_of_each_column_are_of_its_own_rows() -> None:
    values = random_values(1003)
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    facts = stats_of(values, two_columns(1003))
    first, second = facts["columns"]
    assert (first["order"], first["head"], second["head"], second["first_row"]) == (2, 0, 1, 500)
    check_norms(first, norms[:500])
    check_norms(second, norms[500:1000])
    assert facts["rows_unreachable"] == 3
    assert facts["norms"]["rows"] == 1003


@settings(deadline=None)
@given(norms=st.lists(st.floats(1e-44, 1e40), min_size=1, max_size=50), share=st.floats(0.01, 1))
def test_a_quantile_is_the_norm_of_its_rank_to_a_step(norms: list[float], share: float) -> None:
    histogram = NormHistogram()
    histogram.add(np.array(norms[:3]))
    histogram.add(np.array(norms[3:]))
    exact = sorted(norms)[max(1, math.ceil(share * len(norms))) - 1]
    assert abs(histogram.quantile(share) - exact) <= STEP_ERROR * exact


@settings(deadline=None)
@given(
    values=arrays(np.float32, (3, 4), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)),
)
def test_a_norm_is_finite_exactly_where_all_values_are(values: NDArray[np.float32]) -> None:
    with np.errstate(invalid="ignore"):
        norms = row_norms(values)
    assert np.isfinite(norms).tolist() == np.isfinite(values).all(axis=1).tolist()


def test_dead_rows_are_counted_and_the_first_named() -> None:
    values = random_values(100)
    values[[3, 50]] = 0
    values[7, 4], values[8, 0], values[99, 31] = np.nan, np.inf, -np.inf
    facts = stats_of(values)
    assert facts["zero"] == {"rows": 2, "first": [3, 50]}
    assert facts["not_finite"] == {"rows": 3, "first": [7, 8, 99]}
    assert (facts["norms"]["rows"], facts["copies"]["compared"]) == (95, 95)


def test_no_more_than_a_few_dead_rows_are_named() -> None:
    values = np.zeros((100, 32), dtype=np.float16)
    facts = stats_of(values)
    assert facts["zero"] == {"rows": 100, "first": [0, 1, 2, 3, 4, 5, 6, 7]}
    assert facts["norms"] == {"rows": 0, "min": None, "median": None, "p99": None, "max": None, "histogram": []}


def test_copies_are_counted_over_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_stats_module, "BLOCK_BYTES", 4 * 32 * 10)
    values = random_values(100)
    values[60], values[99], values[61] = values[2], values[2], values[5]
    assert stats_of(values)["copies"] == {"rows": 3, "compared": 100, "share_compared": 1.0}


def test_of_many_records_a_share_is_compared_with_all_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct_module, "MOST_HASHES", 1000)
    monkeypatch.setattr(distinct_module, "ROOM", 500)
    hashes = mixed_bits(np.repeat(np.arange(4000, dtype=np.uint64), 5))
    records = DistinctRecords(len(hashes))
    for start in range(0, len(hashes), 500):
        records.add(hashes[start : start + 500])
    kept = int(in_sample(hashes, 0.05).sum())
    assert (records.rate, records.compared, records.copies) == (0.05, kept, kept - kept // 5)


def test_records_of_one_hash_alone_do_not_run_out_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct_module, "MOST_HASHES", 100)
    monkeypatch.setattr(distinct_module, "ROOM", 50)
    records = DistinctRecords(10_000)
    for _ in range(200):
        records.add(np.zeros(50, dtype=np.uint64))
    assert (records.compared, records.copies) == (10_000, 9_999)


@settings(deadline=None)
@given(
    records=arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 19)), elements=st.sampled_from([0, 1, 128]))
)
def test_records_have_one_hash_exactly_where_they_are_equal(records: NDArray[np.uint8]) -> None:
    texts = [record.tobytes() for record in records]
    hashes = record_hashes(records).tolist()
    assert len(set(zip(texts, hashes, strict=True))) == len(set(texts)) == len(set(hashes))


@pytest.mark.parametrize("dtype", ["int8", "fp8", "int4"])
def test_errors_are_those_of_repacking(dtype: str) -> None:
    values = random_values(200).astype(np.float32)
    record = repacked_format(32, dtype)
    expected = RowErrors.of(values, record.decode(encode_rows(values, record)))
    found = stats_of(values.astype(np.float16))["requantised"][dtype]
    assert found == {"mean": pytest.approx(expected.mean), "max": pytest.approx(expected.max), "rows": 200}


def test_rows_that_can_not_be_repacked_are_left_out_of_the_errors() -> None:
    values = random_values(50)
    values[3, 0] = np.nan
    assert stats_of(values)["requantised"]["int8"]["rows"] == 49


def test_quantised_rows_are_evenly_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_stats_module, "ERROR_ROWS", 10)
    monkeypatch.setattr(table_stats_module, "BLOCK_BYTES", 4 * 32 * 7)
    values = np.zeros((100, 32), dtype=np.float16)
    values[::10] = random_values(10)
    errors = stats_of(values)["requantised"]["int4"]
    assert (errors["rows"], errors["mean"] > 0.05) == (10, True)


def test_rows_int4_does_not_fit_say_so() -> None:
    record = row_format("float16", "none", columns=5)
    reader = ArrayReader(as_bytes(random_values(20, 5)))
    found = table_stats(spec_of(20, record), reader, None).to_dict()["requantised"]
    assert found["int4"] == ("not measured: rows of 5 columns can't be int4, it takes multiples of 16; use int8 or fp8")
    assert found["int8"]["rows"] == 20


def test_without_the_export_package_errors_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, REPACKING, None)
    message = f"not measured: quantising needs {REPACKING}: pip install 'engram-edge[export]'"
    assert stats_of(random_values(20))["requantised"] == dict.fromkeys(["int8", "fp8", "int4"], message)


@settings(deadline=None)
@given(num_rows=st.integers(1, 3000), wanted=st.integers(1, 4000) | st.none(), block_rows=st.integers(1, 700))
@example(num_rows=1000, wanted=999, block_rows=700)
def test_blocks_do_not_overlap_and_are_as_many_rows_as_wanted(
    num_rows: int, wanted: int | None, block_rows: int
) -> None:
    rows = [row for first, count in sample_blocks(num_rows, wanted, block_rows) for row in range(first, first + count)]
    assert rows == sorted(set(rows))
    assert rows[-1] < num_rows
    assert len(rows) >= min(num_rows, wanted or num_rows)


def test_a_sample_reads_rows_all_over_the_table() -> None:
    reader = ArrayReader(as_bytes(random_values(10_000)))
    facts = table_stats(spec_of(10_000, FLOAT16), reader, 1000).to_dict()
    assert facts["rows_read"] == len(reader.read) == 1024
    assert (reader.read[0], reader.read[-1]) == (0, 7755)


def test_the_command_reads_a_bundle(workshop: Workshop, command: Command) -> None:
    bundle = workshop.uncompiled()
    outcome = command("engram", "tables", "stat", bundle.path, "--json")
    (facts,) = outcome.json["tables"]
    assert (facts["site"], facts["rows"], facts["rows_read"], facts["record_bytes"]) == ("layer_1", 326, 326, 18)
    assert len(facts["columns"]) == 4
    golden = json.loads((bundle.path / "golden/golden.json").read_text())
    assert outcome.json["export_parity"] == golden["parity"]


def test_the_command_prints_a_table(workshop: Workshop, command: Command) -> None:
    lines = command("engram", "tables", "stat", workshop.uncompiled().path).out.splitlines()
    assert lines[0] == "layer_1: 326 rows of 18 bytes (int8 x 16, scale float16), 5.7 KiB, all read"
    assert lines[2:5] == [
        "  0 rows of all zeros",
        "  0 rows of NaN or infinite values",
        "  0 rows are copies of an earlier one; 326 were compared, all that are finite and not zero",
    ]


def test_a_site_the_bundle_lacks_is_named(workshop: Workshop, command: Command) -> None:
    bundle = workshop.uncompiled().path
    outcome = command("engram", "tables", "stat", bundle, "--site", "layer_9")
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: bundle {bundle} has no site 'layer_9', it has ['layer_1']\n",
    )


def test_as_many_rows_are_read_as_are_asked_for(workshop: Workshop, command: Command) -> None:
    line = ("engram", "tables", "stat", workshop.uncompiled().path, "--rows")
    assert command(*line, 5, "--json").json["tables"][0]["rows_read"] == 5
    outcome = command(*line, 0)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (
        2,
        "Error: Invalid value for '--rows': 0 is not in the range x>=1.",
    )


def test_a_bundle_without_tables_has_no_statistics(workshop: Workshop, command: Command) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel())).path
    outcome = command("engram", "tables", "stat", bundle)
    assert (outcome.code, outcome.err) == (2, f"engram: bundle {bundle} has no tables\n")


def test_a_table_that_is_cut_short_is_named(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    bundle = tmp_path / "bundle"
    copy_folder(workshop.uncompiled().path, bundle)
    (table,) = (bundle / "tables").glob("*.safetensors")
    table.write_bytes(table.read_bytes()[:-1])
    assert command("engram", "tables", "stat", bundle).code == 3
