"""Figures of look-ups from the samples of their rounds, as JSON values and as Markdown."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from engram_runtime.bench.tables import STATES, TableResult, TableSettings
from engram_runtime.bench.tables_runner import CAPPED, COLD, Sample
from engram_runtime.sizes import format_size

Tree = dict[str, Any]


def table_report(results: Sequence[TableResult], settings: TableSettings, load_average: Sequence[float]) -> Tree:
    """Return the whole report as JSON values.

    Args:
        load_average: of the last minute, before and after.
    """
    return {
        "tables": [table_figures(result, settings) for result in results],
        "tokens": settings.tokens,
        "depth": settings.depth,
        "rounds": settings.rounds,
        "load_average": load_average[0],
        "load_average_after": load_average[1],
    }


def table_figures(result: TableResult, settings: TableSettings) -> Tree:
    """Return a site's figures: what was measured, then each state's or why it has none."""
    spec = result.spec
    size = spec.num_rows * spec.record.record_bytes
    found: Tree = {
        "site": spec.site,
        "table_bytes": size,
        "record_bytes": spec.record.record_bytes,
        "rows_per_token": spec.keyer.columns,
        **result.facts,
        "cap_bytes": settings.cap(size),
    }
    rows = spec.keyer.columns * settings.tokens
    for state in STATES:
        if state in result.skipped:
            found[state] = {"skipped": result.skipped[state]}
        else:
            found[state] = state_figures(result.samples[state], rows, settings.tokens * result.facts["reads_per_token"])
    return found


def state_figures(samples: Sequence[Sample], rows: int, reads: int) -> Tree:
    """Return the figures of one state: percentiles over all its rounds, ratios taken within each round.

    Args:
        rows: of a chunk.
        reads: raw reads of a chunk.
    """
    found: Tree = {
        "token_us": _percentiles(_all(samples, "token"), 1e6),
        "ids_token_us": _percentiles(_all(samples, "ids_token"), 1e6),
        "chunk_ms": _percentiles(_all(samples, "chunk"), 1e3),
        "ids_chunk_ms": _percentiles(_all(samples, "ids_chunk"), 1e3),
        "rows_s": _rounded(rows / statistics.median(_all(samples, "chunk"))),
        "cold_share": _rounded(statistics.mean(sample["cold_share"] for sample in samples)),
    }
    if "take" in samples[0]:
        found["take_rows_s"] = _rounded(rows / statistics.median(_all(samples, "take")))
        found["rate_over_take"] = _ratio(samples, "take", "chunk")
    refused = [sample["no_raw"] for sample in samples if "no_raw" in sample]
    return {**found, **({"no_raw": refused[0]} if refused else _beside_raw(samples, reads))}


def _beside_raw(samples: Sequence[Sample], reads: int) -> Tree:
    own, raw, chunk = (_all(samples, name) for name in ("token", "raw_token", "raw_chunk"))
    return {
        "raw_token_us": _percentiles(raw, 1e6),
        "raw_chunk_ms": _percentiles(chunk, 1e3),
        "raw_reads_s": _rounded(reads / statistics.median(chunk)),
        "token_over_raw": _ratio(samples, "token", "raw_token"),
        "token_p99_over_raw": _rounded(percentile(own, 99) / percentile(raw, 99)),
        "rate_over_raw": _ratio(samples, "raw_chunk", "chunk"),
    }


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the smallest value that ``percent`` of all don't exceed; the largest where there are less than 100."""
    ascending = sorted(values)
    return ascending[math.ceil(len(ascending) * percent / 100) - 1]


def markdown(report: Tree) -> str:
    """Return a report of `table_report` as text: for each site what was measured and a table."""
    lines = [
        f"load average {report['load_average']:.2f} before, {report['load_average_after']:.2f} after; "
        f"{report['rounds']} rounds, chunks of {report['tokens']} tokens; ratios are taken within rounds"
    ]
    for table in report["tables"]:
        lines += ["", *_heading(table), "", *_lines(table, report)]
    return "\n".join(lines)


def _heading(table: Tree) -> Iterator[str]:
    yield (
        f"{table['site']}: {format_size(table['table_bytes'])}, {table['rows_per_token']} rows of "
        f"{table['record_bytes']} bytes a token, rows decoded by {table['decoder']}"
    )
    if "no_library" in table:
        yield f"no library decodes its rows: {table['no_library']}"
    yield table["choice"]
    if "skipped" not in table[COLD]:
        yield "cold: table closed and its pages dropped by fadvise before each round; what lies below may still cache"
    if "skipped" not in table[CAPPED]:
        yield f"capped: a process that may hold {format_size(table['cap_bytes'])}, files' pages included"
    yield from (f"{state} not measured: {table[state]['skipped']}" for state in STATES if "skipped" in table[state])
    refused = {table[state]["no_raw"] for state in STATES if "no_raw" in table[state]}
    yield from (f"raw reads not measured: {reason}" for reason in refused)


Cell = Callable[[Mapping[str, Any]], str]


def _lines(table: Tree, report: Tree) -> Iterator[str]:
    """Yield the table; figures that no state has are left out."""
    states = [state for state in STATES if "skipped" not in table[state]]
    yield "| | " + " | ".join(states) + " |"
    yield "|---|" + "---:|" * len(states)
    for label, key, cell in _rows(table["reads_per_token"], report):
        if any(key in table[state] for state in states):
            cells = [cell(table[state][key]) if key in table[state] else "" for state in states]
            yield "| " + " | ".join([label, *cells]) + " |"


def _rows(reads: int, report: Tree) -> list[tuple[str, str, Callable[[Any], str]]]:
    """Return label, key and format of each line."""
    tokens, depth = report["tokens"], report["depth"]
    return [
        ("one token, us: p50, p99", "token_us", _both),
        ("of that row ids, us", "ids_token_us", _both),
        (f"{reads} raw reads at depth {reads}, us", "raw_token_us", _both),
        ("one token over raw, p50 (least to largest)", "token_over_raw", _spread),
        ("one token over raw, p99", "token_p99_over_raw", lambda value: f"{value:.2f}"),
        (f"{tokens} tokens, ms: p50, p99", "chunk_ms", _both),
        ("of that row ids, ms", "ids_chunk_ms", _both),
        ("M rows/s", "rows_s", _millions),
        (f"M raw reads/s at depth {depth}", "raw_reads_s", _millions),
        ("rate over raw (least to largest)", "rate_over_raw", _spread),
        ("M rows/s of numpy's take of the records", "take_rows_s", _millions),
        ("rate over take (least to largest)", "rate_over_take", _spread),
        ("rows not known to be in memory", "cold_share", lambda value: f"{value:.1%}"),
    ]


def _both(value: Mapping[str, float]) -> str:
    return f"{value['p50']:,.4g}, {value['p99']:,.4g}"


def _spread(value: Mapping[str, float]) -> str:
    return f"{value['median']:.2f} ({value['least']:.2f} to {value['largest']:.2f})"


def _millions(value: float) -> str:
    return f"{value / 1e6:.3g}"


def _all(samples: Sequence[Sample], name: str) -> list[float]:
    return list(chain.from_iterable(sample[name] for sample in samples))


def _percentiles(seconds: Sequence[float], scale: float) -> Tree:
    return {"p50": _rounded(scale * statistics.median(seconds)), "p99": _rounded(scale * percentile(seconds, 99))}


def _ratio(samples: Sequence[Sample], name: str, other: str) -> Tree:
    """Divide the medians of two measurements of the same round."""
    values = [statistics.median(sample[name]) / statistics.median(sample[other]) for sample in samples]
    return {
        "median": _rounded(statistics.median(values)),
        "least": _rounded(min(values)),
        "largest": _rounded(max(values)),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
