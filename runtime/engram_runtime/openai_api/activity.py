"""What tables did for a token, as the field ``engram`` of a choice tells it."""

import math
from typing import Any

from engram_runtime.serving.events import SiteReading, Token


def token_activity(token: Token) -> dict[str, Any]:
    """Return a token, the text that became certain with it, and its sites; those are null where none tells."""
    sites = None if token.sites is None else {name: _reading(reading) for name, reading in token.sites.items()}
    return {"id": token.token_id, "text": token.piece, "sites": sites}


def _reading(reading: SiteReading) -> dict[str, Any]:
    """Return what a site read; a contribution to nothing, which is infinite, is null."""
    contribution = reading.contribution if math.isfinite(reading.contribution) else None
    return {"rows": [int(row) for row in reading.row_ids], "gate": float(reading.gate), "contribution": contribution}
