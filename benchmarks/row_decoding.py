"""Rows in memory by the prefill: a library's decoder beside numpy's and beside numpy's take of the same records.

    python benchmarks/row_decoding.py build/fp8.engram [--tokens 2048] [--rounds 9] [--threads 1]

The decoder is compiled here as `engram compile` puts it into libraries, so that bundles without a decoder graph can be
measured as well. The table is mapped; each round has other random tokens, whose rows are touched before they are timed.
Row ids are part of a look-up, not of the take.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray

from engram_compilers.linking import link
from engram_compilers.table_functions import table_functions
from engram_runtime.bundle import Bundle
from engram_runtime.executors.tvm_rows import TvmRowDecoder
from engram_runtime.library import row_function
from engram_runtime.site import Site
from engram_runtime.table_spec import RowRange, TableSpec
from engram_runtime.tables.decoding import NumpyRowDecoder, RowDecoder
from engram_runtime.tables.mapped import MappedTable
from engram_targets import load_cpu_profile

TAKE, NUMPY, COMPILED = "numpy's take of the records", "look-up, decoded by numpy", "look-up, decoded by the library"


def compiled_decoder(table: TableSpec, threads: int, folder: Path) -> RowDecoder:
    """Compile a table's row function for this machine; raises LookupError where it has none."""
    profile = load_cpu_profile("native")
    target = tvm.target.Target(profile.llvm.target)
    path = folder / "rows.so"
    tvm.compile(table_functions([table]), target).export_library(
        str(path), fcompile=partial(link, mtriple=profile.llvm.mtriple)
    )
    module = tvm_ffi.load_module(str(path))
    use_threads = module.get_function("use_threads", query_imports=True)

    def claim_pool() -> bool:
        use_threads(threads)
        return True

    function = module.get_function(row_function(table), query_imports=True)
    return TvmRowDecoder(function, tvm_ffi.from_dlpack, claim_pool)


def mapped_records(bundle: Bundle, rows: RowRange, row_bytes: int) -> NDArray[np.uint8]:
    """Map the records of a range, ``[num_rows, row_bytes]``."""
    return np.memmap(bundle.table_path(rows), np.uint8, "r", rows.offset, shape=(rows.num_rows, row_bytes))


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--tokens", default=2048, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(bundle: Path, tokens: int, rounds: int, threads: int) -> None:
    """Time look-ups of many tokens in the first table of BUNDLE."""
    opened = Bundle.open(bundle)
    spec = opened.manifest.tables[0]
    keyer, rng = opened.keyer(spec.keyer), np.random.default_rng(time.time_ns())
    with tempfile.TemporaryDirectory() as folder:
        decoders = {
            NUMPY: NumpyRowDecoder(spec.record, [part.row_bytes for part in spec.parts]),
            COMPILED: compiled_decoder(spec, threads, Path(folder)),
        }
    sites = {
        name: Site(spec, keyer, MappedTable(spec, opened.table_path, decoder)) for name, decoder in decoders.items()
    }
    (part,) = spec.parts
    files = [mapped_records(opened, rows, part.row_bytes) for rows in part.ranges]
    firsts = np.array([rows.first_row for rows in part.ranges])
    taken = np.empty((tokens * keyer.columns, spec.record.record_bytes), dtype=np.uint8)
    filled = next(iter(sites.values())).empty(tokens)
    seconds: dict[str, list[float]] = {name: [] for name in (TAKE, *sites)}
    for _ in range(rounds + 1):
        ids = rng.integers(0, opened.manifest.model.vocab_size, tokens)
        row_ids = keyer.row_ids([], ids)

        flat = row_ids.ravel()
        file_of_row = firsts.searchsorted(flat, side="right") - 1
        pieces = [flat[file_of_row == index] for index in range(len(files))]

        def take(pieces: list[Any] = pieces) -> None:
            start = 0
            for file, first, ids_of_file in zip(files, firsts, pieces, strict=True):
                file.take(ids_of_file - first, 0, taken[start : start + len(ids_of_file)], "clip")
                start += len(ids_of_file)

        def look_up(site: Site, ids: Any = ids) -> None:
            site.gather(keyer.row_ids([], ids), filled)

        for site in sites.values():
            look_up(site)  # brings the rows in
        take()  # maps the pages
        seconds[TAKE].append(timed(take))
        for name, site in sites.items():
            seconds[name].append(timed(partial(look_up, site)))
    of_take = statistics.median(seconds[TAKE][1:])
    for name, each in seconds.items():
        median = statistics.median(each[1:])
        rate = tokens * keyer.columns / median
        click.echo(
            json.dumps(
                {"what": name, "million_rows_per_s": round(rate / 1e6, 2), "of_take": round(of_take / median, 2)}
            )
        )


if __name__ == "__main__":
    main()
