"""The readings of `engram_runtime.lens.why` as lines of text and as JSON values."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from engram_runtime.lens.columns import column, quoted
from engram_runtime.lens.why import Ngram, Reading, SiteReadings

LINE_COLUMNS = 120
TOKEN_COLUMNS, NGRAM_COLUMNS, ROWS_COLUMNS = 16, 28, 42  # the numbers between them take the rest
PAD, DEAD = "·", "*"
LEGEND = (
    "gate: 0 to 1, the largest of several streams; adds: norm of what the site adds over the stream's\n"
    f"norm: of an n-gram's rows together; {PAD} no token: before the text or behind a barrier; {DEAD} a row of zeros"
)

Decode = Callable[[Sequence[int]], str]


def by_position(reading: Reading) -> float:
    """Order readings as the text."""
    return reading.position


def by_contribution(reading: Reading) -> float:
    """Order readings with the largest contribution first."""
    return -reading.contribution


SORTS = {"position": by_position, "contribution": by_contribution}


def chosen(site: SiteReadings, *, sort: str, top: int | None) -> list[Reading]:
    """Return the ``top`` readings with the largest contributions, all for None, in the order of that name."""
    return sorted(sorted(site.readings, key=by_contribution)[:top], key=SORTS[sort])


def lines(site: SiteReadings, readings: Sequence[Reading], decode: Decode) -> Iterator[str]:
    """Yield a title, a header, and for each token a line an n-gram, at most `LINE_COLUMNS` wide."""
    orders = " and ".join(map(str, site.orders))
    yield f"site {site.site}: n-grams of {orders} tokens, {site.num_heads} rows each"
    yield _line(("", "token", "gate", "adds"), "n-gram", "norm", "rows")
    for reading in readings:
        token = quoted(decode([reading.token_id]))
        gate = f"{max(reading.gate):.3f}" if reading.ngrams else "-"  # without rows it lets nothing through
        start = (str(reading.position), token, gate, f"{reading.contribution:.1%}")
        if not reading.ngrams:
            yield _line(start, "", "", "none")
        for ngram in reading.ngrams:
            norm = float(np.linalg.norm(ngram.row_norms))
            yield _line(start, ngram_text(ngram, decode), f"{norm:.3g}", _rows_text(ngram))
            start = ("", "", "", "")


def _line(start: tuple[str, str, str, str], ngram: str, norm: str, rows: str) -> str:
    position, token, gate, adds = start
    numbers = f"{column(token, TOKEN_COLUMNS)}  {gate:>5}  {adds:>6}  {column(ngram, NGRAM_COLUMNS)}  {norm:>6}"
    return f"{position:>5}  {numbers}  {rows}".rstrip()


def ngram_text(ngram: Ngram, decode: Decode) -> str:
    """Return the text of an n-gram, after a mark for each pad."""
    known = [token_id for token_id in ngram.token_ids if token_id is not None]
    return PAD * (len(ngram.token_ids) - len(known)) + quoted(decode(known))


def _rows_text(ngram: Ngram) -> str:
    """Return as many row ids as fit, then how many more there are and how many of those are dead."""
    dead = [norm == 0 for norm in ngram.row_norms]
    ids = [f"{row_id}{DEAD if zero else ''}" for row_id, zero in zip(ngram.row_ids, dead, strict=True)]
    for shown in range(len(ids), -1, -1):
        hidden = f"+{len(ids) - shown}" + (f" ({hidden_dead}{DEAD})" if (hidden_dead := sum(dead[shown:])) else "")
        text = " ".join([*ids[:shown], *([hidden] if shown < len(ids) else [])])
        if len(text) <= ROWS_COLUMNS:
            break
    return text


def json_values(site: SiteReadings, readings: Sequence[Reading], decode: Decode) -> dict[str, Any]:
    """Return readings as JSON values, with the texts of tokens and n-grams."""
    return {
        "site": site.site,
        "orders": site.orders,
        "num_heads": site.num_heads,
        "readings": [_reading_json(reading, decode) for reading in readings],
    }


def _reading_json(reading: Reading, decode: Decode) -> dict[str, Any]:
    ngrams = [
        asdict(ngram) | {"text": decode([token_id for token_id in ngram.token_ids if token_id is not None])}
        for ngram in reading.ngrams
    ]
    contribution = reading.contribution if math.isfinite(reading.contribution) else None  # JSON has no infinity
    token = decode([reading.token_id])
    return asdict(reading) | {"contribution": contribution, "token": token, "ngrams": ngrams}
