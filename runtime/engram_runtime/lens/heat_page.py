"""Shows the heat of a table as one HTML file that asks nothing of the network."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, BinaryIO

from engram_runtime.lens.heat import HeatStrip
from engram_runtime.lens.trace import Trace

TEMPLATE, PLACE = "heat_page.html", "{{DATA}}"


def write_heat_page(file: BinaryIO, trace: Trace, strips: Sequence[HeatStrip]) -> None:
    """Write a page with a picture of each strip, and what lies under the pointer."""
    page = files("engram_runtime.lens").joinpath(TEMPLATE).read_text(encoding="utf-8")
    data = {
        "title": f"{trace.model}: {trace.tokens:,} tokens of {trace.text}",
        "about": trace.command,
        "strips": [_data(strip) for strip in strips],
    }
    file.write(page.replace(PLACE, script_json(data)).encode())


def script_json(data: dict[str, Any]) -> str:
    """Return JSON that can stand in a script element: names from a trace can't end it."""
    return json.dumps(data).replace("<", "\\u003c").replace("&", "\\u0026")


def _data(strip: HeatStrip) -> dict[str, Any]:
    return {
        "title": strip.title,
        "heads": list(strip.heads),
        "row_edges": strip.row_edges,
        "token_edges": strip.token_edges,
        "colour_range": list(strip.colour_range),
        "counts": strip.counts.tolist(),
        "first_touches": [round(share, 4) for share in strip.first_touches.tolist()],
    }
