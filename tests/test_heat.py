"""Heat pictures: reads are counted where they fall, and names of a trace stay text."""

import html.parser
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Command
from tests.traces import make_trace, trace_site

from engram_runtime.lens.heat import HeatStrip, heat_strips
from engram_runtime.lens.heat_page import script_json, write_heat_page
from engram_runtime.lens.trace import Trace
from engram_runtime.lens.trace_file import write_trace

HOSTILE = "</script><script>alert(1)</script>&<!--"


def two_order_trace(tokens: int = 600, seed: int = 0) -> Trace:
    """Return a trace of random rows, two columns for each of two orders, where every tenth token reads none."""
    site = trace_site(num_rows=1000, orders=(2, 3), first_rows=(0, 250, 500, 750))
    row_ids = np.random.default_rng(seed).integers(0, 250, size=(tokens, 4)) + site.first_rows
    row_ids[::10] = -1
    return make_trace(row_ids.tolist(), sites=(site,))


def counted(trace: Trace, strip: HeatStrip, columns: slice) -> list[list[int]]:
    """Count a strip's reads one by one by its edges."""
    counts = np.zeros(strip.counts.shape, dtype=int)
    for token, rows in enumerate(trace.row_ids["layer_1"][:, columns].tolist()):
        span = max(at for at, edge in enumerate(strip.token_edges[:-1]) if edge <= token)
        for row in rows:
            if row >= 0:
                counts[max(at for at, edge in enumerate(strip.row_edges[:-1]) if edge <= row), span] += 1
    as_lists: list[list[int]] = counts.tolist()
    return as_lists


def test_each_order_has_a_strip_with_the_rows_of_its_columns() -> None:
    trace = two_order_trace()
    first, second = heat_strips(trace, trace.sites[0])
    assert (first.order, first.heads, second.order, second.heads) == (2, (0, 250, 500), 3, (500, 750, 1000))
    assert (first.row_edges[0], first.row_edges[-1], second.row_edges[-1]) == (0, 500, 1000)
    assert (first.token_edges[0], first.token_edges[-1]) == (0, 600)


@pytest.mark.parametrize("tokens", [1, 7, 300, 600])
def test_reads_are_counted_between_the_edges_that_are_told(tokens: int) -> None:
    trace = two_order_trace(tokens)
    first, second = heat_strips(trace, trace.sites[0])
    assert first.counts.tolist() == counted(trace, first, slice(0, 2))
    assert second.counts.tolist() == counted(trace, second, slice(2, 4))


def test_first_touches_are_told_apart_from_repetition() -> None:
    trace = make_trace([[0, 500], [0, 501], [1, 501], [-1, -1]])
    (strip,) = heat_strips(trace, trace.sites[0])
    assert strip.first_touches.tolist() == [1.0, 0.5, 0.5, 0.0]
    assert (strip.reads, strip.distinct) == (6, 4)


def test_most_counts_lie_between_the_darkest_and_the_brightest_colour() -> None:
    trace = two_order_trace()
    (strip, _) = heat_strips(trace, trace.sites[0])
    low, high = strip.colour_range
    assert 1 <= low < high <= 2 * strip.counts.max()


def test_a_page_asks_nothing_of_the_network_and_keeps_names_as_text() -> None:
    trace = make_trace([[0, 500]], sites=(trace_site(site=HOSTILE),))
    file = io.BytesIO()
    write_heat_page(file, trace, heat_strips(trace, trace.sites[0]))
    page = file.getvalue().decode()
    assert "alert(1)</script>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert json.loads(Scripts.of(page)[0])["strips"][0]["title"].startswith(HOSTILE)


def test_data_in_a_script_is_json_that_can_not_end_it() -> None:
    text = script_json({"name": HOSTILE})
    assert (json.loads(text), "<" in text, "&" in text) == ({"name": HOSTILE}, False, False)


class Scripts(html.parser.HTMLParser):
    """Collects what stands in script elements."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._inside = False

    @classmethod
    def of(cls, page: str) -> list[str]:
        scripts = cls()
        scripts.feed(page)
        return scripts.texts

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts.append(data)
            self._inside = False


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG\r\n\x1a\n"), ("a.html", b"<!doctype html>")])
def test_the_command_writes_a_picture(tmp_path: Path, command: Command, name: str, start: bytes) -> None:
    write_trace(tmp_path / "a.trace", two_order_trace())
    outcome = command("engram", "tables", "heat", tmp_path / "a.trace", "-o", tmp_path / name, "--json")
    assert (outcome.code, outcome.json["tokens"]) == (0, 600)
    assert [(strip["order"], strip["reads"]) for strip in outcome.json["strips"]] == [(2, 1080), (3, 1080)]
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_name_with_dollar_signs_is_no_formula(tmp_path: Path, command: Command) -> None:
    write_trace(tmp_path / "a.trace", make_trace([[0, 500]], sites=(trace_site(site="$\\frac$"),)))
    assert command("engram", "tables", "heat", tmp_path / "a.trace", "-o", tmp_path / "a.png").code == 0


def test_a_picture_of_another_kind_is_refused(tmp_path: Path, command: Command) -> None:
    outcome = command("engram", "tables", "heat", tmp_path / "a.trace", "-o", "a.gif")
    assert (outcome.code, outcome.err) == (
        2,
        "engram: picture a.gif has the suffix '.gif', expected .png or .html\n",
    )


def test_a_picture_that_can_not_be_written_is_refused_before_the_trace_is_read(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("engram", "tables", "heat", tmp_path / "gone.trace", "-o")
    assert command(*line, tmp_path / "no" / "a.html").err == (
        f"engram: there is no folder {tmp_path / 'no'} to write a.html to; make it or choose another place\n"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = command(*line, tmp_path / "a.png")
    assert (outcome.code, outcome.err) == (4, "engram: plots need matplotlib: pip install 'engram-edge[plot]'\n")


def test_more_strips_than_a_picture_holds_are_refused(tmp_path: Path, command: Command) -> None:
    sites = [trace_site(site=f"layer_{layer}") for layer in range(130)]
    write_trace(tmp_path / "a.trace", make_trace([[0, 500]], sites=sites))
    line = ("engram", "tables", "heat", tmp_path / "a.trace", "-o", tmp_path / "a.png")
    outcome = command(*line)
    assert (outcome.code, outcome.err) == (
        2,
        "engram: the picture would be 66405 pixels high, 65536 are too many; choose one site with --site\n",
    )
    assert not (tmp_path / "a.png").exists()
    assert command(*line, "--site", "layer_7").code == 0


def test_a_trace_without_reads_is_drawn_empty() -> None:
    trace = make_trace([[-1, -1], [-1, -1]])
    (strip,) = heat_strips(trace, trace.sites[0])
    assert (strip.reads, strip.colour_range, strip.first_touches.tolist()) == (0, (1.0, 2.0), [0.0, 0.0])
