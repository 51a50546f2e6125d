"""Compiled row decoders give numpy's values of the same records, wherever those lie, on any processor and threads."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.emulated import EmulatedKernels
from tests.small_tables import row_format
from tests.test_kernels import compile_kernels, needs_avx2
from tests.workshop import Workshop

from engram_compilers.kernels.table_rows import decode_rows
from engram_compilers.table_functions import table_functions
from engram_runtime.executor import Executor, load_executor
from engram_runtime.executors.tvm_library import TvmExecutor
from engram_runtime.executors.tvm_pool import LibraryPool
from engram_runtime.executors.tvm_rows import TvmRowDecoder
from engram_runtime.keyer_spec import TokenKeyerSpec
from engram_runtime.library import find_library
from engram_runtime.records import RecordFormat
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.decoding import SHARED_FROM_ROWS, RowDecoder

Rows = NDArray[np.float32]

FACTOR = float(np.float32(0.3)).hex()
BIG_OFFSET = 5 << 30  # beyond 32 bits
COUNTS = [0, 1, 7, SHARED_FROM_ROWS - 1, SHARED_FROM_ROWS, 1000]
WHOLE = [
    row_format("float32", "none", columns=40),
    row_format("float16", "none", columns=80),
    row_format("bfloat16", "none", columns=17),
    row_format("float8_e4m3", "none", columns=16),
    row_format("int8", "none", columns=3),
    row_format("int4", "none", columns=2),
]
SCALED = [
    row_format("int8", "float32", columns=156),
    row_format("int8", "float16", columns=32),
    row_format("int8", "float16", columns=12, scale_columns=4, factor=FACTOR),
    row_format("float8_e4m3", "e8m0", columns=256, scale_columns=32),
    row_format("float8_e4m3", "float32", columns=21, scale_columns=7),
    row_format("float8_e4m3", "float16", columns=5, scale_columns=1),
    row_format("int4", "float16", columns=64, scale_columns=32),
    row_format("int4", "float32", columns=40),
    row_format("int4", "e8m0", columns=54, scale_columns=27, factor=FACTOR),
    row_format("float16", "e8m0", columns=24),
    row_format("bfloat16", "float16", columns=18, factor=FACTOR),
    row_format("float32", "float32", columns=33),
]
Layout = tuple[RecordFormat, tuple[int, ...]]
JOINED: list[Layout] = [(record, (record.record_bytes,)) for record in WHOLE + SCALED]
APART: list[Layout] = [
    (record, (record.payload_bytes, record.record_bytes - record.payload_bytes)) for record in SCALED
]
LAYOUTS = JOINED + APART
OLD, NEW = "x86-64-v2", "haswell"  # without and with float16 and 256-bit vectors
PROCESSORS = [pytest.param(None, id="host"), OLD, pytest.param(NEW, marks=needs_avx2)]


@dataclass(frozen=True, slots=True, eq=False)
class Scattered:
    """Records whose parts lie anywhere in memory, also over each other."""

    memory: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def decoded(self, layout: Layout) -> Rows:
        """Return the rows by numpy's decoding."""
        record, parts = layout
        pieces = [
            np.lib.stride_tricks.sliding_window_view(self.memory, size)[starts]
            for size, starts in zip(parts, self.offsets, strict=True)
        ]
        return record.decode(np.concatenate(pieces, axis=1))


def scattered(layout: Layout, count: int, seed: int = 0, memory_bytes: int = 3001) -> Scattered:
    """Return random records at random places."""
    rng = np.random.default_rng(seed)
    memory = rng.integers(0, 256, memory_bytes, dtype=np.uint8)
    return Scattered(memory, np.stack([rng.integers(0, memory_bytes - size + 1, count) for size in layout[1]]))


def assert_same_values(found: Rows, expected: Rows) -> None:
    """The same bits, or both a nan."""
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@cache
def kernels(mcpu: str | None) -> dict[Any, Callable[..., None]]:
    return compile_kernels({layout: decode_rows(*layout) for layout in LAYOUTS}, mcpu)


def run(kernel: Callable[..., None], layout: Layout, records: Scattered) -> Rows:
    count = records.offsets.shape[1]
    out = np.full((count, layout[0].columns), np.nan, dtype=np.float32)
    if count:
        kernel(records.memory, records.offsets, out)
    return out


@pytest.mark.parametrize("mcpu", PROCESSORS)
@settings(max_examples=100, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), count=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_a_kernel_gives_the_values_of_numpy(mcpu: str | None, layout: Layout, count: int, seed: int) -> None:
    records = scattered(layout, count, seed)
    assert_same_values(run(kernels(mcpu)[layout], layout, records), records.decoded(layout))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_number_of_rows_has_the_values_of_numpy(layout: Layout) -> None:
    for count in COUNTS:
        records = scattered(layout, count)
        assert_same_values(run(kernels(None)[layout], layout, records), records.decoded(layout))


@pytest.mark.parametrize("payload", ["float8_e4m3", "int8", "int4"])
@pytest.mark.parametrize("scale", ["e8m0", "float16"])
def test_every_byte_and_every_scale_have_the_values_of_numpy(payload: str, scale: str) -> None:
    """Column c of row r holds byte c, under scale r of all there are."""
    columns = 512 if payload == "int4" else 256
    record = row_format(payload, scale, columns=columns)
    scales = np.arange(256 if scale == "e8m0" else 65536).astype("u1" if scale == "e8m0" else "<u2").view(np.uint8)
    memory = np.concatenate([np.arange(256, dtype=np.uint8), scales])
    layout = record, (256, record.record_bytes - 256)
    starts = np.arange(256, len(memory), layout[1][1])[:: len(scales) // 256]
    records = Scattered(memory, np.stack([np.zeros_like(starts), starts]))
    kernel = compile_kernels({layout: decode_rows(*layout)})[layout]
    assert_same_values(run(kernel, layout, records), records.decoded(layout))


def test_every_float16_has_the_value_of_numpy() -> None:
    layout = row_format("float16", "none", columns=16), (32,)
    records = Scattered(np.arange(65536, dtype="<u2").view(np.uint8), np.arange(0, 131072, 32)[None])
    kernel = compile_kernels({layout: decode_rows(*layout)})[layout]
    assert_same_values(run(kernel, layout, records), records.decoded(layout))


def test_arm_code_gives_the_values_of_numpy() -> None:
    functions = {f"rows_{i}": decode_rows(*layout) for i, layout in enumerate(LAYOUTS)}
    emulated = EmulatedKernels(functions, "aarch64-dotprod")
    for name, layout in zip(functions, LAYOUTS, strict=True):
        records = scattered(layout, 5)
        out = np.full((5, layout[0].columns), np.nan, dtype=np.float32)
        assert_same_values(emulated(name, records.memory, records.offsets, out)[-1], records.decoded(layout))


# Through the library of a bundle


def loaded(workshop: Workshop, name: str = "tvm", threads: int = 2) -> tuple[Executor, TableSpec]:
    bundle = workshop.ready()
    (table,) = bundle.manifest.tables
    return load_executor(name, bundle, threads=threads), table


def decoder_of(workshop: Workshop, threads: int = 2) -> tuple[RowDecoder, Layout]:
    executor, table = loaded(workshop, threads=threads)
    decoder = executor.row_decoder(table.site)
    assert decoder is not None
    return decoder, (table.record, tuple(part.row_bytes for part in table.parts))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", COUNTS)
def test_a_librarys_decoder_gives_the_values_of_numpy(workshop: Workshop, threads: int, count: int) -> None:
    decoder, layout = decoder_of(workshop, threads)
    records = scattered(layout, count)
    assert_same_values(run(decoder, layout, records), records.decoded(layout))


@pytest.mark.parametrize("count", COUNTS)
def test_rows_decoded_while_a_step_is_at_work_have_the_same_values(workshop: Workshop, count: int) -> None:
    executor, table = loaded(workshop)
    assert isinstance(executor, TvmExecutor)
    decoder = executor.row_decoder(table.site)
    assert decoder is not None
    layout = table.record, tuple(part.row_bytes for part in table.parts)
    records = scattered(layout, count)
    with executor.pool.for_step():
        assert_same_values(run(decoder, layout, records), records.decoded(layout))


def test_a_step_keeps_its_threads_while_rows_are_decoded() -> None:
    claimed: list[int] = []
    calls: list[tuple[int, int]] = []
    pool = LibraryPool(claimed.append, 3)

    def function(memory: NDArray[np.uint8], offsets: NDArray[np.int64], out: Rows) -> None:
        calls.append((len(out), len(claimed)))
        np.copyto(out, memory[offsets[0] + offsets[1]][:, None])

    decoder = TvmRowDecoder(function, lambda array: array, pool.for_rows)
    records = scattered((row_format("int8", "none", columns=1), (1, 1)), 2 * SHARED_FROM_ROWS, memory_bytes=100)
    memory, out = np.arange(200, dtype=np.uint8), np.empty((2 * SHARED_FROM_ROWS, 1), dtype=np.float32)
    decoder(memory, records.offsets, out)
    assert calls == [(512, 1)]
    with pool.for_step(), pool.for_step():
        decoder(memory, records.offsets, out)
    assert calls[1:] == [(255, 3), (255, 3), (2, 3)]
    np.testing.assert_array_equal(out[:, 0], records.offsets.sum(axis=0))
    decoder(memory, records.offsets, out)
    assert (calls[4:], claimed) == ([(512, 4)], [3, 3, 3, 3])


def test_a_decoder_serves_several_memories_and_sizes_in_turn(workshop: Workshop) -> None:
    decoder, layout = decoder_of(workshop)
    for count, seed in ((5, 1), (300, 2), (5, 2), (1, 1), (300, 1)):
        records = scattered(layout, count, seed)
        assert_same_values(run(decoder, layout, records), records.decoded(layout))


def test_rows_may_be_put_anywhere_in_a_buffer(workshop: Workshop) -> None:
    decoder, layout = decoder_of(workshop)
    records = scattered(layout, 3)
    buffer = np.full(3 * layout[0].columns + 1, np.nan, dtype=np.float32)
    decoder(records.memory, records.offsets, buffer[1:].reshape(3, -1))
    assert_same_values(buffer[1:].reshape(3, -1), records.decoded(layout))
    assert np.isnan(buffer[0])


def test_a_mapped_file_is_read_beyond_32_bits_and_can_be_closed(workshop: Workshop, tmp_path: Path) -> None:
    decoder, layout = decoder_of(workshop)
    records = scattered(layout, 40)
    with (tmp_path / "sparse").open("w+b") as file:
        file.seek(BIG_OFFSET)
        file.write(records.memory.tobytes())
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    memory = np.frombuffer(mapped, dtype=np.uint8)
    out = run(decoder, layout, Scattered(memory, records.offsets + BIG_OFFSET))
    assert_same_values(out, records.decoded(layout))
    del memory
    mapped.close()  # refused while an array of it is alive


def table_of(site: str, *row_bytes: int) -> TableSpec:
    rows = RowRange(first_row=0, num_rows=9, file="rows.bin", external=False, offset=0)
    return TableSpec(
        site=site,
        num_rows=9,
        record=row_format("int8", "float16", columns=sum(row_bytes) - 2),
        parts=tuple(TablePart(row_bytes=size, ranges=(rows,)) for size in row_bytes),
        keyer=TokenKeyerSpec(vocab_size=9, pad_id=0),
    )


def test_records_of_one_kind_have_one_function() -> None:
    tables = [table_of("a", 34), table_of("b", 34), table_of("c", 32, 2), table_of("d", 66)]
    assert sorted(variable.name_hint for variable in table_functions(tables).get_global_vars()) == [
        "rows_int8_32_float16_32_0000803f_32_2",
        "rows_int8_32_float16_32_0000803f_34",
        "rows_int8_64_float16_64_0000803f_66",
    ]


def test_records_cut_within_their_values_have_no_decoder(workshop: Workshop) -> None:
    table = table_of("cut", 16, 18)
    assert len(table_functions([table]).functions) == 0
    assert TvmExecutor(*find_library(workshop.ready()), [table], threads=1).row_decoder("cut") is None


def test_onnxruntime_has_no_decoder(workshop: Workshop) -> None:
    executor, table = loaded(workshop, "onnxruntime")
    assert executor.row_decoder(table.site) is None
