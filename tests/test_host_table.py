"""Host tables from a checkpoint's tensors: whatever the format, rows copied or read in place are torch's values."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tests.conftest import Command
from tests.rows import gathered
from tests.tiny import ROW_DIM, TinyModel, TinySite
from tests.workshop import Workshop, copy_folder, export

from engram_export import table_writer
from engram_export.host_table import TableSource, numbered_tensors, table_source
from engram_export.repack import RowErrors, encode_rows, repacked_format
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_export.table_writer import (
    WrittenTable,
    checkpoint_site,
    copy_table,
    open_rows,
    reference_table,
    repack_table,
    table_files,
    write_token_map,
)
from engram_runtime.bundle import Bundle
from engram_runtime.errors import CheckpointError, TableError
from engram_runtime.hashing import column_offsets
from engram_runtime.keyer_spec import KeyerSpec, NgramKeyerSpec, TokenKeyerSpec
from engram_runtime.session import open_sites
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.files import FileTable

COLUMNS, VOCAB = 64, 50
PRIMES = (29, 31)
ROWS = sum(PRIMES)
DTYPES = ("int8", "int4", "fp8")
NGRAMS = NgramKeyerSpec(
    orders=(2,),
    num_heads=2,
    multipliers=(3, 5),
    primes=PRIMES,
    offsets=tuple(column_offsets(np.array(PRIMES)).tolist()),
    pad_id=2,
)
TOKENS = TokenKeyerSpec(vocab_size=ROWS, pad_id=0)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a family stores a table: its files, which tensors mean what, and the values torch makes of them."""

    files: tuple[Tensors, ...]
    payload: tuple[str, ...]
    values: torch.Tensor
    scales: tuple[str, ...] = ()
    factor: str | None = None
    keyer: KeyerSpec = NGRAMS
    row_multiple: int = 1

    def source(self, folder: Path) -> TableSource:
        """Write the files and describe the table."""
        return table_source(
            site="layer_1",
            keyer=self.keyer,
            token_map=None,
            columns=COLUMNS,
            tensors=save(folder, self.files),
            payload=self.payload,
            scales=self.scales,
            factor=self.factor,
            row_multiple=self.row_multiple,
        )


def save(folder: Path, files: Sequence[Tensors]) -> SafetensorsShards:
    opened: dict[str, SafetensorsFile] = {}
    for number, tensors in enumerate(files):
        path = folder / f"{number}.safetensors"
        safetensors.torch.save_file(tensors, path)
        opened |= dict.fromkeys(tensors, SafetensorsFile(path))
    return SafetensorsShards(opened)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4)) / 50


def single(dtype: torch.dtype) -> Layout:
    rows = normal(ROWS, COLUMNS).to(dtype)
    return Layout(files=({"rows": rows},), payload=("rows",), values=rows.float())


def int8_with(scale_dtype: torch.dtype) -> Layout:
    """The project's own layout: one scale a row."""
    values = normal(ROWS, COLUMNS)
    scales = (values.abs().amax(dim=1) / 127).to(scale_dtype)
    rows = (values / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Layout(
        files=({"rows": rows, "scales": scales},),
        payload=("rows",),
        scales=("scales",),
        values=rows.float() * scales.float()[:, None],
    )


def deepseek(scale_dtype: torch.dtype = torch.float8_e8m0fnu) -> Layout:
    """One E8M0 scale for 32 columns, in another tensor than the payload."""
    scales = torch.randint(110, 125, (ROWS, COLUMNS // 32), dtype=torch.uint8)
    rows = (normal(ROWS, COLUMNS) * 2000).to(torch.float8_e4m3fn)
    wide = torch.exp2(scales.float() - 127).repeat_interleave(32, dim=1)
    return Layout(
        files=({"embed.weight": rows}, {"embed.scale": scales.view(scale_dtype)}),
        payload=("embed.weight",),
        scales=("embed.scale",),
        values=rows.float() * wide,
    )


def qwen(dtype: torch.dtype = torch.bfloat16) -> Layout:
    """Twelve shards over three files, rows rounded up to a multiple of 24, float8 with one factor."""
    rows = (normal(72, COLUMNS) * (1 if dtype == torch.bfloat16 else 4000)).to(dtype)
    names = [f"shard_{number}.weight" for number in range(12)]
    shards = dict(zip(names, rows.view(torch.uint8).chunk(12), strict=True))
    shards = {name: values.view(dtype).contiguous() for name, values in shards.items()}
    files = [{name: shards[name] for name in sorted(names)[start::3]} for start in range(3)]
    float8 = dtype == torch.float8_e4m3fn
    factor = torch.tensor([0.00037], dtype=torch.float32)
    return Layout(
        files=(*files, *([{"weight_scale": factor}] if float8 else [])),
        payload=tuple(names),
        factor="weight_scale" if float8 else None,
        values=rows.float() * factor if float8 else rows.float(),
        row_multiple=24,
    )


def per_layer_embeddings() -> Layout:
    rows = normal(ROWS, COLUMNS).bfloat16()
    return Layout(files=({"rows": rows},), payload=("rows",), values=rows.float(), keyer=TOKENS)


def chunked() -> Layout:
    """Shards as ``torch.chunk`` makes them: 16, 16, 16 and 12 rows."""
    rows = normal(ROWS, COLUMNS)
    chunks = [chunk.contiguous() for chunk in torch.split(rows, 16)]
    shards = {f"shard_{number}": chunk for number, chunk in enumerate(chunks)}
    return Layout(files=(shards,), payload=tuple(shards), values=rows)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "chunked": chunked,
    "float32": lambda: single(torch.float32),
    "float16": lambda: single(torch.float16),
    "int8-float16": lambda: int8_with(torch.float16),
    "int8-float32": lambda: int8_with(torch.float32),
    "deepseek": deepseek,
    "deepseek-bytes": lambda: deepseek(torch.uint8),
    "qwen": qwen,
    "qwen-float8": lambda: qwen(torch.float8_e4m3fn),
    "per-layer-embeddings": per_layer_embeddings,
}


def no_progress(count: int) -> None:
    pass


def rows_in_place(source: TableSource) -> NDArray[np.float32]:
    with open_rows(source) as table:
        return gathered(table, source.record.columns, np.arange(source.num_rows))


def rows_written(folder: Path, spec: TableSpec) -> NDArray[np.float32]:
    """Return all rows of a table of a bundle whose table folder is ``folder``."""
    with FileTable(spec, lambda rows: folder.parent / rows.file) as table:
        return gathered(table, spec.record.columns, np.arange(spec.num_rows))


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """The folder of a bundle for its tables."""
    folder = tmp_path / "bundle" / "tables"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]()


def test_rows_in_place_are_those_torch_reads(tmp_path: Path, layout: Layout) -> None:
    found = rows_in_place(layout.source(tmp_path))
    np.testing.assert_array_equal(found, layout.values.numpy(), strict=True)


def test_copied_rows_are_those_torch_reads(tmp_path: Path, tables: Path, layout: Layout) -> None:
    source = layout.source(tmp_path)
    written = copy_table(source, source.keyer, tables, no_progress)
    assert written.errors is None
    np.testing.assert_array_equal(rows_written(tables, written.spec), layout.values.numpy(), strict=True)


def test_a_copied_table_can_be_read_with_numpy_alone(tmp_path: Path, tables: Path, layout: Layout) -> None:
    source = layout.source(tmp_path)
    copy_table(source, source.keyer, tables, no_progress)
    records = safetensors.numpy.load_file(tables / "layer_1-00001-of-00001.safetensors")["records"]
    np.testing.assert_array_equal(source.record.decode(records), layout.values.numpy(), strict=True)


def test_a_table_referred_to_writes_nothing(tmp_path: Path, tables: Path, layout: Layout) -> None:
    source = layout.source(tmp_path)
    spec = reference_table(source, source.keyer)
    assert (spec.files, list(tables.iterdir())) == ((), [])
    assert {rows.external for rows in spec.ranges} == {True}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_errors_reported_are_those_of_the_repacked_rows(
    tmp_path: Path, tables: Path, layout: Layout, dtype: str
) -> None:
    source = layout.source(tmp_path)
    written = repack_table(source, source.keyer, dtype, tables, no_progress)
    found = rows_written(tables, written.spec).astype(np.float64)
    true = layout.values.double().numpy()
    errors = np.linalg.norm(found - true, axis=1) / np.linalg.norm(true, axis=1)
    assert written.errors is not None
    assert written.errors.num_rows == len(true)
    assert (written.errors.mean, written.errors.max) == pytest.approx((errors.mean(), errors.max()))
    assert written.errors.max < {"int8": 0.015, "int4": 0.12, "fp8": 0.05}[dtype]


def write(source: TableSource, dtype: str | None, folder: Path) -> WrittenTable:
    if dtype is None:
        return copy_table(source, source.keyer, folder, no_progress)
    return repack_table(source, source.keyer, dtype, folder, no_progress)


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize(("slice_bytes", "file_bytes", "files"), [(1, 1 << 30, 1), (700, 1300, None), (1, 1, 72)])
def test_rows_are_the_same_however_they_are_sliced_and_split(
    tmp_path: Path,
    tables: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str | None,
    slice_bytes: int,
    file_bytes: int,
    files: int | None,
) -> None:
    source = qwen().source(tmp_path)
    whole = write(source, dtype, tables)
    expected = rows_written(tables, whole.spec)
    monkeypatch.setattr(table_writer, "SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(table_writer, "FILE_BYTES", file_bytes)
    other = tables.parent / "again"
    other.mkdir()
    cut = write(source, dtype, other)
    np.testing.assert_array_equal(rows_written(other, cut.spec), expected, strict=True)
    assert len(cut.spec.ranges) == (files or -(-72 // (file_bytes // whole.spec.record.record_bytes)))


def test_errors_of_two_sets_of_rows_add_up() -> None:
    rng = np.random.default_rng(1)
    values, other = rng.normal(size=(2, 7, 32)).astype(np.float32)
    whole, parts = (
        RowErrors.of(values, other),
        RowErrors.of(values[:2], other[:2]) + RowErrors.of(values[2:], other[2:]),
    )
    assert (parts.num_rows, parts.max) == (whole.num_rows, whole.max)
    assert parts.mean == pytest.approx(whole.mean)


def test_progress_counts_the_bytes_written(tmp_path: Path, tables: Path) -> None:
    source, counts = deepseek().source(tmp_path), list[int]()
    repack_table(source, source.keyer, "int8", tables, counts.append)
    assert sum(counts) == ROWS * (COLUMNS + 2)


def test_the_files_of_a_table_are_known_before_they_are_written(tmp_path: Path, tables: Path) -> None:
    source = deepseek().source(tmp_path)
    (file,) = table_files(source, source.record, tables)
    assert not file.path.exists()
    written = copy_table(source, source.keyer, tables, no_progress)
    assert written.spec.ranges == (file.rows,)
    assert file.rows.offset == SafetensorsFile(file.path).locate("records")[1].start == 65536


def test_the_site_of_a_checkpoint_hashes_with_its_token_map(tmp_path: Path) -> None:
    layout = single(torch.float32)
    token_map = (np.arange(VOCAB) % 9).astype(np.int32)
    source = table_source(
        site="layer_1",
        keyer=NGRAMS,
        token_map=token_map,
        columns=COLUMNS,
        tensors=save(tmp_path, layout.files),
        payload=layout.payload,
    )
    with open_rows(source) as rows:
        found = checkpoint_site(source, VOCAB, rows).rows([], np.array([40, 13]))
    mixed = [40 % 9 * 3 ^ 2 * 5, 13 % 9 * 3 ^ 40 % 9 * 5]
    expected = layout.values[torch.tensor([[h % 29, h % 31 + 29] for h in mixed])]
    np.testing.assert_array_equal(found, expected.numpy(), strict=True)
    keyer = write_token_map(source, tmp_path)
    assert (tmp_path / "layer_1.token_map.int32").read_bytes() == token_map.astype("<i4").tobytes()
    assert keyer.files == (f"{tmp_path.name}/layer_1.token_map.int32",)


def test_rows_keyed_by_the_token_need_no_map(tmp_path: Path) -> None:
    layout = per_layer_embeddings()
    source = layout.source(tmp_path)
    with open_rows(source) as rows:
        found = checkpoint_site(source, VOCAB, rows).rows([], np.array([40, 0, 40]))
    np.testing.assert_array_equal(found, layout.values[[40, 0, 40]].numpy()[:, None], strict=True)
    assert write_token_map(source, tmp_path) == TOKENS


def refused(layout: Layout, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        layout.source(folder)
    return str(caught.value)


def rows_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def one_file(**tensors: torch.Tensor) -> dict[str, Any]:
    return {"files": (tensors,), "payload": ("rows",), "values": torch.empty(0)}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            Layout(**one_file(rows=rows_of(ROWS, COLUMNS, dtype=torch.int32))),
            "rows is I32 [60, 64], expected rows in BF16 or F16 or F32 or F8_E4M3 or I8",
        ),
        (
            Layout(**one_file(rows=rows_of(ROWS, COLUMNS, 1))),
            "rows is F32 [60, 64, 1], expected rows in BF16 or F16 or F32 or F8_E4M3 or I8",
        ),
        (Layout(**one_file(rows=rows_of(ROWS, 48))), "rows has shape [60, 48], expected [rows, 64]"),
        (Layout(**one_file(rows=rows_of(ROWS))), "rows has shape [60], expected [rows, 64]"),
        (Layout(**one_file(rows=rows_of(61, COLUMNS))), "rows has 61 rows, the hash of table layer_1 wants 60"),
        (
            Layout(**one_file(rows=rows_of(ROWS, COLUMNS)), row_multiple=32),
            "rows has 60 rows, the hash of table layer_1 wants 64",
        ),
        (
            Layout(**one_file(rows=rows_of(ROWS, COLUMNS), scales=rows_of(59)), scales=("scales",)),
            "scales has 59 rows, the hash of table layer_1 wants 60",
        ),
        (
            Layout(**one_file(rows=rows_of(ROWS, COLUMNS), scales=rows_of(ROWS, 5)), scales=("scales",)),
            "scales has 5 scales a row, expected a divisor of 64 columns",
        ),
        (
            Layout(
                **one_file(rows=rows_of(ROWS, COLUMNS), scales=rows_of(ROWS, dtype=torch.bfloat16)), scales=("scales",)
            ),
            "scales is BF16 [60], expected rows in F16 or F32 or F8_E8M0 or U8",
        ),
        (
            Layout(**one_file(rows=rows_of(ROWS, COLUMNS), factor=rows_of(2)), factor="factor"),
            "factor has shape [2], expected one number for the whole table",
        ),
        (
            Layout(**one_file(rows=rows_of(ROWS, COLUMNS), factor=torch.tensor(-2.0)), factor="factor"),
            "factor is -2.0, expected a positive finite factor; download the checkpoint again",
        ),
        (
            Layout(**one_file(rows=rows_of(ROWS, COLUMNS), factor=torch.tensor(torch.inf)), factor="factor"),
            "factor is inf, expected a positive finite factor; download the checkpoint again",
        ),
        (
            Layout(**one_file(other=rows_of(ROWS, COLUMNS))),
            "the index lists no tensor 'rows'; the checkpoint lacks a weight the model needs",
        ),
    ],
)
def test_tensors_that_are_no_table_are_refused(tmp_path: Path, layout: Layout, expected: str) -> None:
    assert refused(layout, tmp_path) == expected


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (rows_of(31, COLUMNS), "F32 [31, 64]"),
        (rows_of(30), "F32 [30]"),
        (rows_of(30, 32), "F32 [30, 32]"),
        (rows_of(30, COLUMNS, dtype=torch.float16), "F16 [30, 64]"),
    ],
)
def test_shards_that_are_not_alike_are_refused(tmp_path: Path, second: torch.Tensor, found: str) -> None:
    layout = Layout(
        files=({"shard_0": rows_of(30, COLUMNS), "shard_1": second},),
        payload=("shard_0", "shard_1"),
        values=torch.empty(0),
    )
    assert refused(layout, tmp_path) == (
        f"shard_1 is {found}, shard_0 F32 [30, 64]; shards must be equal, the last alone may have fewer rows"
    )


def test_a_shorter_shard_before_the_last_is_refused(tmp_path: Path) -> None:
    files = ({"shard_0": rows_of(21, COLUMNS), "shard_1": rows_of(18, COLUMNS), "shard_2": rows_of(21, COLUMNS)},)
    layout = Layout(files=files, payload=tuple(files[0]), values=torch.empty(0))
    assert refused(layout, tmp_path) == (
        "shard_1 is F32 [18, 64], shard_0 F32 [21, 64]; shards must be equal, the last alone may have fewer rows"
    )


def test_shards_of_another_table_are_named_together(tmp_path: Path) -> None:
    names = ("shard_0", "shard_1", "shard_2")
    layout = Layout(files=tuple({name: rows_of(30, COLUMNS)} for name in names), payload=names, values=torch.empty(0))
    assert refused(layout, tmp_path) == "shard_0 to shard_2 has 90 rows, the hash of table layer_1 wants 60"


def test_numbered_tensors_come_by_number(layout: Layout) -> None:
    names = sorted(f"ngram.shard_{number}.weight" for number in range(12))
    others = [f"ngram.shard_{number}.weight" for number in ("x", "01", "9" * 5000)]  # int() refuses the last
    ordered = numbered_tensors([*names, *others], "ngram.shard_{}.weight", 12)
    assert ordered == [f"ngram.shard_{number}.weight" for number in range(12)]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 1, 3], "the checkpoint lacks shard_2, one of 4; it is incomplete"),
        ([0, 1, 2], "the checkpoint lacks shard_3, one of 4; it is incomplete"),
        ([], "the checkpoint lacks shard_0, one of 4; it is incomplete"),
        ([0, 1, 2, 3, 4], "the checkpoint has shard_4, its config says 4 of them"),
    ],
)
def test_numbers_that_are_missing_or_too_many_are_named(numbers: list[int], expected: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        numbered_tensors([f"shard_{number}" for number in numbers], "shard_{}", 4)
    assert str(caught.value) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 37, 59])
def test_a_scale_that_is_not_finite_is_named_with_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, row: int
) -> None:
    monkeypatch.setattr("engram_export.host_table.SCAN_BYTES", 20)
    layout = int8_with(torch.float16)
    layout.files[0]["scales"][row] = value
    with pytest.raises(CheckpointError) as caught:
        layout.source(tmp_path).check_scales()
    expected = f"scales has scale {value} in row {row}, expected finite scales; download the checkpoint again"
    assert str(caught.value) == expected


def test_an_e8m0_scale_that_is_no_number_is_named_with_its_row(tmp_path: Path) -> None:
    layout = deepseek(torch.uint8)
    layout.files[1]["embed.scale"][5, 1] = 255
    with pytest.raises(CheckpointError, match=r"^embed\.scale has scale nan in row 5, expected finite scales; "):
        layout.source(tmp_path).check_scales()


def test_finite_scales_pass_and_their_bytes_are_counted(tmp_path: Path, layout: Layout) -> None:
    source, counts = layout.source(tmp_path), list[int]()
    source.check_scales(counts.append)
    assert sum(counts) == source.scales_bytes


def test_rows_that_were_cut_off_since_the_header_was_read_are_named(tmp_path: Path, tables: Path) -> None:
    source = single(torch.float32).source(tmp_path)
    path = tmp_path / "0.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(TableError) as caught:
        copy_table(source, source.keyer, tables, no_progress)
    assert str(caught.value) == (
        f"table file {path} holds {len(data) - 1} bytes, its rows need {len(data)}; export it again"
    )


SIZES = st.floats(2**-10, 60_000, width=32)
FINITE = st.floats(-1, 1, width=16)


@st.composite
def rows_of_any_size(draw: st.DrawFn) -> NDArray[np.float32]:
    """Rows ``[N, 32]`` whose largest values lie between a thousandth and what is accepted, some of them zero."""
    values = draw(hnp.arrays(np.float32, (draw(st.integers(1, 6)), 32), elements=FINITE))
    sizes = draw(hnp.arrays(np.float32, (len(values), 1), elements=SIZES))
    largest = np.abs(values).max(axis=1, keepdims=True)
    rows: NDArray[np.float32] = np.where(largest > 0.01, values / np.maximum(largest, 0.01), 0) * sizes
    return rows


def through(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    record = repacked_format(values.shape[1], dtype)
    records = encode_rows(values, record)
    assert records.shape == (len(values), record.record_bytes)
    return record.decode(records)


# A float16 scale is off by 2**-11 of itself, or by 2**-25 where it is subnormal; the largest code is off by as much.
def scale_slack(largest: NDArray[np.float32], codes: int) -> NDArray[np.float32]:
    return largest * np.float32(2**-10) + np.float32(codes * 2**-24)


@settings(max_examples=200, deadline=None)
@given(values=rows_of_any_size())
def test_int8_is_off_by_half_a_step(values: NDArray[np.float32]) -> None:
    largest = np.abs(values).max(axis=1, keepdims=True)
    assert (np.abs(through(values, "int8") - values) <= largest / 254 + scale_slack(largest, 127)).all()


@settings(max_examples=200, deadline=None)
@given(values=rows_of_any_size())
def test_float8_is_off_by_a_sixteenth_or_half_its_smallest_step(values: NDArray[np.float32]) -> None:
    largest = np.abs(values).max(axis=1, keepdims=True)
    bound = np.maximum(np.abs(values) / 16, largest / 448 / 1024) + scale_slack(largest, 448)
    assert (np.abs(through(values, "fp8") - values) <= bound).all()


@settings(max_examples=200, deadline=None)
@given(values=rows_of_any_size())
def test_int4_is_no_worse_than_plain_rounding_to_fifteen_steps(values: NDArray[np.float32]) -> None:
    largest = np.abs(values).max(axis=1, keepdims=True)
    scales = (largest / 7).astype(np.float16).astype(np.float32)
    plain = np.rint(np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)).clip(-7, 7) * scales
    found = np.linalg.norm(through(values, "int4") - values, axis=1)
    assert (found <= np.linalg.norm(plain - values, axis=1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_stay_zeros_and_count_as_exact(dtype: str) -> None:
    zeros = np.zeros((3, 32), dtype=np.float32)
    np.testing.assert_array_equal(through(zeros, dtype), zeros, strict=True)
    assert RowErrors.of(zeros, zeros) == RowErrors(num_rows=3, mean=0.0, max=0.0)


def test_float8_codes_are_those_of_ml_dtypes() -> None:
    values = normal(5, 32).numpy()
    scales = (np.abs(values).max(axis=1, keepdims=True) / 448).astype(np.float16).astype(np.float32)
    expected = (values / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales
    np.testing.assert_array_equal(through(values, "fp8"), expected, strict=True)


@pytest.mark.parametrize(("columns", "scale_columns", "record_bytes"), [(160, 32, 90), (80, 16, 50), (48, 16, 30)])
def test_int4_shares_a_scale_over_32_columns_or_16(columns: int, scale_columns: int, record_bytes: int) -> None:
    record = repacked_format(columns, "int4")
    assert (record.scale_columns, record.record_bytes) == (scale_columns, record_bytes)


@pytest.mark.parametrize("columns", [1, 8, 24, 100])
def test_rows_that_int4_has_no_groups_for_are_refused(columns: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        repacked_format(columns, "int4")
    assert str(caught.value) == f"rows of {columns} columns can't be int4, it takes multiples of 16; use int8 or fp8"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.nan, "nan, which isn't finite; download the checkpoint again"),
        (-np.inf, "inf, which isn't finite; download the checkpoint again"),
        (-1e5, "magnitude 100000.0, at most 65504 can be repacked; use --tables copy"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_cant_be_repacked_is_named(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, value: float, expected: str
) -> None:
    monkeypatch.setattr(table_writer, "SLICE_BYTES", 1000)
    layout = single(torch.float32)
    layout.files[0]["rows"][41, 3] = value
    source = layout.source(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        repack_table(source, source.keyer, dtype, tables, no_progress)
    assert str(caught.value) == f"row 41 of the table has a value of {expected}"


def test_barriers_and_silent_tokens_of_a_block_reach_the_bundle(workshop: Workshop, tmp_path: Path) -> None:
    site = copy_folder(workshop.site_folder(TinyModel(), TinySite()), tmp_path / "site")
    config = json.loads((site / "config.json").read_text())
    config["engram"]["hash"] |= {"barrier_ids": [0, 2], "silent_ids": [2]}
    (site / "config.json").write_text(json.dumps(config))
    export(workshop.checkpoint(TinyModel()), tmp_path / "bundle", engram=site)
    bundle = Bundle.open(tmp_path / "bundle")
    (opened,) = open_sites(bundle)
    text, after_barrier = opened.rows([], np.array([9, 2, 0, 5, 6])), opened.rows([], np.array([5, 6]))
    opened.table.close()
    assert np.flatnonzero(np.abs(text).max(axis=(1, 2)) == 0).tolist() == [1]
    np.testing.assert_array_equal(text[3:], after_barrier, strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_repacked_bundle_is_its_graph_with_those_rows(
    workshop: Workshop, tmp_path: Path, command: Command, dtype: str
) -> None:
    checkpoint = workshop.checkpoint(TinyModel(), TinySite(payload="bfloat16"))
    line = ("engram-export", checkpoint, "-o", tmp_path / "bundle", "--quant", "none", "--json")
    outcome = command(*line, "--tables", "repack", "--table-dtype", dtype)
    bundle = Bundle.open(tmp_path / "bundle")
    (spec,) = bundle.manifest.tables
    assert outcome.json["graph_parity"]["max_abs"] < 1e-4
    assert outcome.json["plan"]["tables_bytes"] == spec.num_rows * spec.record.record_bytes
    assert spec.record == repacked_format(ROW_DIM, dtype)
    assert command("engram", "verify", bundle.path, "--executor", "onnxruntime").code == 0
