"""Miss-ratio curves equal an LRU cache that is played out, and samples come close to it."""

import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.conftest import Command
from tests.traces import make_trace, trace_site

from engram_runtime.errors import TableError
from engram_runtime.lens import miss_ratio
from engram_runtime.lens.addresses import PAGE_BYTES, PartAddresses, touched_pages
from engram_runtime.lens.cache_curves import PAGE, ROW, cache_curve
from engram_runtime.lens.miss_ratio import EXACT_ACCESSES, miss_ratio_curve, sample_rate
from engram_runtime.lens.stack_distances import FIRST_TOUCH, stack_distances
from engram_runtime.lens.trace_file import write_trace
from engram_runtime.sizes import format_size

SAMPLED_ERROR = 0.02  # of a hit rate, for samples of a tenth of 20 000 things and caches that hold 16 of the sample


def lru_hits(ids: Sequence[int], capacity: int) -> int:
    """Play out a cache that throws out what was used longest ago."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for each in ids:
        hits += each in cache
        cache[each] = None
        cache.move_to_end(each)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits


def zipf_reads(count: int, things: int) -> NDArray[np.int64]:
    """Return ``[count]`` ids, the k-th commonest about 1 / k as often as the first."""
    rng = np.random.default_rng(3)
    weights = 1 / np.arange(1, things + 1)
    return rng.permutation(things)[rng.choice(things, size=count, p=weights / weights.sum())]


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 12), max_size=80))
def test_a_distance_is_the_number_of_other_things_since(ids: list[int]) -> None:
    expected = []
    for place, each in enumerate(ids):
        earlier = [at for at in range(place) if ids[at] == each]
        expected.append(len(set(ids[earlier[-1] + 1 : place])) if earlier else FIRST_TOUCH)
    assert stack_distances(np.array(ids, dtype=np.int64)).tolist() == expected


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 30), min_size=1, max_size=120), capacity=st.integers(0, 40))
def test_an_exact_curve_is_that_of_an_lru_cache(ids: list[int], capacity: int) -> None:
    curve = miss_ratio_curve([np.array(ids[:7]), np.array(ids[7:], dtype=np.int64)])
    assert curve.hit_rates([capacity]) == pytest.approx([lru_hits(ids, capacity) / len(ids)], abs=1e-12)
    assert (curve.accesses, curve.distinct) == (len(ids), len(set(ids)))


def test_a_cache_of_everything_serves_all_but_first_touches() -> None:
    curve = miss_ratio_curve([np.array([5, 5, 5, 9])])
    assert (curve.first_touches, curve.ceiling, curve.hit_rates([100])) == (0.5, 0.5, [0.5])


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_a_sampled_curve_is_close_to_the_exact_one(rate: float) -> None:
    ids = zipf_reads(300_000, 20_000)
    capacities = [round(16 / rate) << k for k in range(8)]
    exact, sampled = (np.array(miss_ratio_curve([ids], each).hit_rates(capacities)) for each in (1.0, rate))
    assert np.abs(exact - sampled).max() < SAMPLED_ERROR


def test_a_sample_keeps_every_access_of_its_things() -> None:
    ids = np.repeat(np.arange(5000), 3)
    curve = miss_ratio_curve([ids], 0.25)
    assert curve.sampled == 3 * curve.distinct * 0.25
    assert abs(curve.distinct - 5000) < 5000 * SAMPLED_ERROR * 3


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 60), min_size=1, max_size=120), rate=st.floats(0.01, 1))
def test_a_cache_for_all_that_is_read_serves_what_any_does(ids: list[int], rate: float) -> None:
    curve = miss_ratio_curve([np.array(ids)], rate)
    assert curve.hit_rates([curve.distinct]) == [curve.ceiling]


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 12), max_size=80))
def test_the_shares_of_the_work_that_are_told_add_up(ids: list[int]) -> None:
    told: list[float] = []
    stack_distances(np.array(ids, dtype=np.int64), told.append)
    assert sum(told) == pytest.approx(1 if len(ids) > 1 else 0)


def test_long_sequences_are_sampled_and_short_ones_not() -> None:
    assert sample_rate(EXACT_ACCESSES) == 1.0
    assert sample_rate(4 * EXACT_ACCESSES) == 0.25


def test_a_row_touches_every_page_of_its_parts() -> None:
    payload = PartAddresses(row_bytes=3000, first_rows=(0, 4), addresses=(0, 40960))
    scales = PartAddresses(row_bytes=4, first_rows=(0,), addresses=(81920,))
    rows = np.array([0, 1, 4, 5])
    pages, places = touched_pages([payload, scales], rows)
    assert pages.tolist() == [0, 20, 0, 1, 20, 10, 20, 10, 11, 20]
    assert places.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


def test_pages_are_those_of_the_addresses_byte_by_byte() -> None:
    part = PartAddresses(row_bytes=160, first_rows=(0,), addresses=(65536 + 32,))
    rows = np.arange(200)
    expected = []
    for row in rows.tolist():
        expected += sorted({(65568 + 160 * row + byte) // PAGE_BYTES for byte in range(160)})
    assert touched_pages([part], rows)[0].tolist() == expected


def test_caches_of_rows_and_of_pages_are_told_apart() -> None:
    trace = make_trace([[0, 500], [1, 501], [0, 500], [2, 502]])
    rows, pages = (cache_curve(trace, trace.sites[0], unit, None) for unit in (ROW, PAGE))
    assert (rows.curve.accesses, rows.curve.distinct, rows.curve.ceiling) == (8, 6, 0.25)
    assert (pages.curve.accesses, pages.curve.distinct, pages.curve.ceiling) == (8, 2, 0.75)
    assert rows.verdict == (
        "64.0 KiB of rows would serve 25.0 % of the reads, and no cache of rows more than 25.0 %: "
        "the other 75.0 % are first touches"
    )


def test_pages_are_sampled_by_how_many_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miss_ratio, "EXACT_ACCESSES", 100)
    part = PartAddresses(row_bytes=8 * PAGE_BYTES, first_rows=(0,), addresses=(0,))
    site = trace_site(record_bytes=part.row_bytes, parts=(part,))
    trace = make_trace([[row, row + 500] for row in range(50)], sites=(site,))
    assert cache_curve(trace, site, ROW, None).curve.rate == 1
    assert cache_curve(trace, site, PAGE, None).curve.rate == 1 / 8


def test_a_trace_without_repetition_says_that_no_cache_helps() -> None:
    trace = make_trace([[0, 500], [1, 501]])
    assert cache_curve(trace, trace.sites[0], ROW, None).verdict == (
        "no row is read twice: no cache of rows serves anything"
    )


def test_sizes_double_until_everything_fits() -> None:
    trace = make_trace([[row, row + 1000] for row in range(1000)] * 2, num_rows=2000)
    curve = cache_curve(trace, trace.sites[0], ROW, None)
    assert [format_size(size) for size in curve.sizes] == ["64.0 KiB", "128.0 KiB", "256.0 KiB", "512.0 KiB"]
    assert (curve.hit_rates[0], curve.hit_rates[-1]) == (0.0, 0.5)


def test_rows_that_are_not_read_count_for_nothing() -> None:
    trace = make_trace([[-1, -1], [3, 500], [-1, -1], [3, 500]])
    curve = cache_curve(trace, trace.sites[0], ROW, None).curve
    assert (curve.accesses, curve.distinct) == (4, 2)


def test_a_trace_that_reads_nothing_is_refused() -> None:
    trace = make_trace([[-1, -1]])
    with pytest.raises(TableError) as caught:
        cache_curve(trace, trace.sites[0], ROW, None)
    assert str(caught.value) == "the trace reads no row of site layer_1; record one of another text"


def test_a_sample_without_reads_is_refused() -> None:
    trace = make_trace([[0, 500]])
    with pytest.raises(TableError) as caught:
        cache_curve(trace, trace.sites[0], ROW, 1e-7)
    assert str(caught.value) == "a sample of 1e-07 has none of the 2 reads of site layer_1; use a larger one"


def test_the_command_prints_a_table_and_a_verdict(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "text.trace"
    write_trace(path, make_trace([[0, 500], [1, 501], [0, 500], [2, 502]]))
    outcome = command("engram", "tables", "mrc", path)
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "layer_1: 8 reads of 6 rows of 160 bytes, 960 B in all, exact",
        "layer_1: 8 reads of 2 pages of 4096 bytes, 8.0 KiB in all, exact",
        "     cache      rows     pages",
        "  64.0 KiB    25.0 %    75.0 %",
        "64.0 KiB of rows would serve 25.0 % of the reads, and no cache of rows more than 25.0 %: "
        "the other 75.0 % are first touches",
        "64.0 KiB of pages would serve 75.0 % of the reads, and no cache of pages more than 75.0 %: "
        "the other 25.0 % are first touches",
    ]


def test_the_command_prints_json_and_draws(tmp_path: Path, command: Command) -> None:
    path, plot = tmp_path / "text.trace", tmp_path / "curve.png"
    write_trace(path, make_trace([[0, 500], [0, 501]]))
    outcome = command("engram", "tables", "mrc", path, "--unit", "row", "--plot", plot, "--json")
    (site,) = outcome.json["sites"]
    (curve,) = site["curves"]
    assert (site["site"], curve["unit"], curve["reads"], curve["hit_rates"]) == ("layer_1", "row", 4, [0.25])
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_plot_that_can_not_be_written_is_refused_before_anything_is_computed(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("engram", "tables", "mrc", tmp_path / "gone.trace", "--plot")
    (tmp_path / "mine.png").write_text("mine")
    outcome = command(*line, tmp_path / "mine.png")
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: {tmp_path / 'mine.png'} exists; replace it with --force or choose another place\n",
    )
    outcome = command(*line, "curve.jpg")
    assert (outcome.code, outcome.err) == (2, "engram: plot curve.jpg has the suffix '.jpg', expected .png\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = command(*line, "curve.png")
    assert (outcome.code, outcome.err) == (4, "engram: plots need matplotlib: pip install 'engram-edge[plot]'\n")


@pytest.mark.parametrize("rate", ["0", "1.5", "nan", "much"])
def test_a_share_that_is_none_is_a_usage_error(tmp_path: Path, command: Command, rate: str) -> None:
    outcome = command("engram", "tables", "mrc", tmp_path / "text.trace", "--sample", rate)
    assert outcome.code == 2
    assert f"{rate!r} is not auto or a share above 0 and up to 1" in outcome.err


def test_a_site_the_trace_lacks_is_named(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "text.trace"
    write_trace(path, make_trace([[0, 500]]))
    outcome = command("engram", "tables", "mrc", path, "--site", "layer_9")
    assert (outcome.code, outcome.err) == (2, "engram: the trace has no site 'layer_9', it has ['layer_1']\n")


def test_curves_of_several_sites_are_apart(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "text.trace"
    first, second = trace_site(), trace_site(site="layer_2")
    write_trace(path, make_trace([[0, 500], [0, 500]], sites=(first, second)))
    sites = json.loads(command("engram", "tables", "mrc", path, "--json").out)["sites"]
    assert [site["site"] for site in sites] == ["layer_1", "layer_2"]
