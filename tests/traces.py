"""Small traces made by hand."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from engram_runtime.lens.addresses import PartAddresses
from engram_runtime.lens.trace import Trace, TraceSite


def trace_site(**changes: Any) -> TraceSite:
    """Return a site of 1,000 rows of 160 bytes, two columns of 500 rows, or what ``changes`` make of it."""
    site = TraceSite(
        site="layer_1",
        num_rows=1000,
        record_bytes=160,
        keyer_sha256="ab" * 32,
        orders=(2,),
        first_rows=(0, 500),
        parts=(PartAddresses(row_bytes=160, first_rows=(0,), addresses=(65536,)),),
    )
    return dataclasses.replace(site, **changes)


def make_trace(row_ids: Sequence[Sequence[int]], *, num_rows: int = 1000, sites: Sequence[TraceSite] = ()) -> Trace:
    """Return a trace whose sites all read ``row_ids [T, C]``."""
    sites = tuple(sites) or (trace_site(num_rows=num_rows),)
    return Trace(
        model="tiny",
        text="text.txt",
        command="engram tables trace",
        sites=sites,
        row_ids={site.site: np.array(row_ids, dtype=site.dtype) for site in sites},
    )
