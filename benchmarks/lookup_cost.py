"""What a look-up of one token costs against the size of the table and the length of the history: JSON and a plot.

    python benchmarks/big_table.py build/int8.engram --gib 6
    python benchmarks/lookup_cost.py build/int8.engram -o docs/lookup_cost

Warm look-ups are of tables of holes, from 64 MiB to 64 GiB: pages of zeros that no disk is read for, so cold ones are
of the first rows of BUNDLE's table, as far as it goes. All sizes are measured in every round.
"""

import contextlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from big_table import RECORDS_BY_BYTES, big_table, write_manifest, write_sparse_bundle

from engram_runtime.bench.tables_cache import evict
from engram_runtime.bundle import Bundle, file_identity
from engram_runtime.session import close_sites, open_sites
from engram_runtime.site import Site
from engram_runtime.sizes import format_size
from engram_runtime.tables.aio import DirectReader
from engram_runtime.tables.options import MMAP, TableOptions

MIB = 1 << 20
SIZES = tuple(64 * MIB << doublings for doublings in range(11))
HISTORIES = tuple(1024 << doublings for doublings in range(11))
WARM_TOKENS, COLD_TOKENS = 200, 50  # looked up one by one for each point of a round: few, to stay cold
WARM_UP = 8
FLAT = 0.2  # growth over the whole range that is called flat

Times = dict[int, list[float]]  # medians of the rounds in seconds, by size in bytes or tokens of history
Progress = Callable[[int], object]
Lookups = list[tuple[list[int], Any]]


def lookups(site: Site, seed: int, count: int, history: int = 2) -> Lookups:
    """Return random tokens after random histories."""
    rng, vocabulary = np.random.default_rng(seed), 100_000
    before = rng.integers(0, vocabulary, size=history).tolist()
    return [(before, rng.integers(0, vocabulary, size=1)) for _ in range(count)]


def look_up(site: Site, wanted: Lookups) -> float:
    """Look tokens up and return the median of their seconds."""
    seconds, rows = [], site.empty(1)
    for history, token_ids in wanted:
        started = time.perf_counter()
        site.gather(site.keyer.row_ids(history, token_ids), rows)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def warm(site: Site, wanted: Lookups) -> float:
    """Return the median of look-ups whose rows have just been read."""
    look_up(site, wanted)
    return look_up(site, wanted)


@contextlib.contextmanager
def opened(bundle: Bundle) -> Iterator[Site]:
    """Open a bundle's only table."""
    sites = open_sites(bundle, TableOptions(io=MMAP))
    try:
        yield sites[0]
    finally:
        close_sites(sites)


def cold(bundle: Bundle, seed: int) -> float:
    """Return the median of look-ups after the table's pages were dropped."""
    (spec,) = bundle.manifest.tables
    for path in {bundle.table_path(rows) for rows in spec.ranges}:
        evict(path)
    with opened(bundle) as site:
        look_up(site, lookups(site, seed + 1, WARM_UP))  # code, not rows
        return look_up(site, lookups(site, seed, COLD_TOKENS))


def raw(bundle: Bundle, seed: int) -> float:
    """Return the median of as many direct reads at once, at random places of the table's first file."""
    (spec,) = bundle.manifest.tables
    rows, reads = spec.ranges[0], spec.keyer.columns
    rng = np.random.default_rng(seed)
    with DirectReader(bundle.table_path(rows), reads) as reader:
        ids = [np.sort(rng.integers(0, rows.num_rows, size=reads)) for _ in range(COLD_TOKENS)]
        return statistics.median(reader.read(rows.offset + each * spec.parts[0].row_bytes).elapsed_s for each in ids)


def first_rows(bundle: Bundle, size_bytes: int, folder: Path) -> Bundle:
    """Write a bundle whose table is the first rows of another's, where they lie."""
    (spec,) = bundle.manifest.tables
    table = big_table(size_bytes, spec.record, spec.keyer.columns)
    ranges = []
    for rows in spec.ranges:
        path, count = bundle.table_path(rows).resolve(), min(rows.num_rows, table.num_rows - rows.first_row)
        if count > 0:
            kept = replace(rows, num_rows=count, file=str(path), external=True, identity=file_identity(path))
            ranges.append(kept)
    folder.mkdir()
    return write_manifest(folder, table.spec(tuple(ranges)), [])


def measure_holes(bundle: Bundle, rounds: int, folder: Path, progress: Progress) -> Times:
    """Return warm times of tables of holes by size."""
    (spec,) = bundle.manifest.tables
    tables = {size: big_table(size, RECORDS_BY_BYTES[spec.record.record_bytes], spec.keyer.columns) for size in SIZES}
    times: Times = {size: [] for size in SIZES}
    with contextlib.ExitStack() as stack:
        holes = {size: write_sparse_bundle(folder / f"holes-{size}", table) for size, table in tables.items()}
        sites = {size: stack.enter_context(opened(each)) for size, each in holes.items()}
        for seed in range(rounds):
            for size, site in sites.items():
                times[size].append(warm(site, lookups(site, seed, WARM_TOKENS)))
            progress(1)
    return times


def measure_rows(bundle: Bundle, rounds: int, folder: Path, progress: Progress) -> tuple[Times, Times]:
    """Return cold times of the bundle's first rows by size, and those of raw reads there."""
    (spec,) = bundle.manifest.tables
    sizes = [size for size in SIZES if size * 1.001 < spec.num_rows * spec.record.record_bytes]  # primes take more
    parts = {size: first_rows(bundle, size, folder / f"rows-{size}") for size in sizes}
    colds: Times = {size: [] for size in sizes}
    raws: Times = {size: [] for size in sizes}
    for seed in range(rounds):
        for size, part in parts.items():
            colds[size].append(cold(part, 1000 + seed))
            raws[size].append(raw(part, 2000 + seed))
        progress(1)
    return colds, raws


def measure_histories(bundle: Bundle, rounds: int, progress: Progress) -> Times:
    """Return warm times by length of the history."""
    times: Times = {length: [] for length in HISTORIES}
    with opened(bundle) as site:
        for seed in range(rounds):
            for length, found in times.items():
                found.append(warm(site, lookups(site, seed, WARM_TOKENS, length)))
            progress(1)
    return times


def fit(times: Times) -> dict[str, Any]:
    """Return the points in us and a straight line through them over the logarithm of the size."""
    sizes = sorted(times)
    points = [1e6 * statistics.median(times[size]) for size in sizes]
    slope, _ = np.polyfit(np.log2(sizes), points, 1)
    growth = float(slope) * math.log2(sizes[-1] / sizes[0]) / statistics.mean(points)
    return {
        "sizes": sizes,
        "us": [round(point, 2) for point in points],
        "us_per_doubling": round(float(slope), 3),
        "growth": round(growth, 3),
        "flat": abs(growth) <= FLAT,
    }


def sentence(name: str, found: Mapping[str, Any]) -> str:
    """Say whether the cost is flat."""
    sizes = found["sizes"]
    return (
        f"{name}: {min(found['us'])} to {max(found['us'])} us over {math.log2(sizes[-1] / sizes[0]):.0f} doublings, "
        f"fit {found['us_per_doubling']:+} us a doubling, {found['growth']:+.1%} over all: "
        f"{'flat' if found['flat'] else 'not flat'}"
    )


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw the points, a panel for each kind of cost."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    panels: tuple[tuple[str, str, Callable[[int], str]], ...] = (
        ("warm", "table (holes), rows in memory", format_size),
        ("cold", "table (random bytes), rows on the disk", format_size),
        ("history", "tokens of history, rows in memory", lambda tokens: f"{tokens:,}"),
    )
    for axes, (name, label, spelt) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        sizes = found[name]["sizes"]
        axes.plot(sizes, found[name]["us"], "o-", label="look-up")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes[::2], [spelt(size) for size in sizes[::2]], rotation=30)
        axes.set(xlabel=label, ylabel=f"one token, {found['rows_per_token']} rows: us")
        axes.set_ylim(0, 1.3 * max(found[name]["us"]))
        if name == "cold":
            axes.plot(sizes, found["raw"]["us"], "o--", label="raw reads at once")
            axes.legend()
    figure.savefig(path, dpi=100)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Of the .json and the .png.")
@click.option("--rounds", default=9, show_default=True)
def main(bundle: Path, out: Path, rounds: int) -> None:
    """Measure look-ups in BUNDLE, made by big_table.py."""
    table = Bundle.open(bundle)
    before = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory(dir=bundle.resolve().parent) as folder,  # /tmp may be memory
        click.progressbar(length=3 * rounds, label="rounds") as bar,
    ):
        warms = measure_holes(table, rounds, Path(folder), bar.update)
        colds, raws = measure_rows(table, rounds, Path(folder), bar.update)
        histories = measure_histories(table, rounds, bar.update)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}",
        "load_average": [before, os.getloadavg()[0]],
        "rounds": rounds,
        "rows_per_token": table.manifest.tables[0].keyer.columns,
        "warm": fit(warms),
        "cold": fit(colds),
        "raw": fit(raws),
        "history": fit(histories),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, out.with_suffix(".png"))
    for name in ("warm", "cold", "raw", "history"):
        click.echo(sentence(name, found[name]))


if __name__ == "__main__":
    main()
