"""Trace files: safetensors with a tensor ``rows.<site> [T, C]`` of int32 or int64 for each site, and facts as JSON.

A trace may come from anywhere, so everything in it is checked before it is used.
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from engram_runtime.errors import BundleError, TableError
from engram_runtime.keyers import NO_ROW
from engram_runtime.lens.trace import Trace, TraceSite
from engram_runtime.new_file import new_file
from engram_runtime.safetensors_layout import SafetensorsLayout, TensorPlan
from engram_runtime.strict_json import parse_facts, version_error

FORMAT_VERSION = 1
FACTS = "engram_trace"  # key of the metadata
MAX_TOKENS = 10_000_000
MAX_ROW_IDS = 160_000_000  # over all sites: 10 M tokens of 16 rows, 640 MB
DTYPES = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}  # as safetensors call them


def tensor_name(site: str) -> str:
    """Return the name of a site's tensor."""
    return f"rows.{site}"


def check_size(tokens: int, columns: int) -> None:
    """Refuse a trace that would not fit; raises TableError."""
    if tokens > MAX_TOKENS or tokens * columns > MAX_ROW_IDS:
        most = min(MAX_TOKENS, MAX_ROW_IDS // columns)
        raise TableError(
            f"a trace of {tokens} tokens of {columns} rows is too large, {most} tokens are the most; use --tokens"
        )


def write_trace(path: Path, trace: Trace, *, replace: bool = False) -> None:
    """Write a trace, whole or not at all; raises RequestError where a file is there that may not be replaced."""
    facts = {
        "format_version": FORMAT_VERSION,
        "model": trace.model,
        "text": trace.text,
        "command": trace.command,
        "tokens": trace.tokens,
        "sites": [dataclasses.asdict(site) for site in trace.sites],
    }
    tensors = {tensor_name(site.site): trace.row_ids[site.site] for site in trace.sites}
    plans = [TensorPlan(name, ids.dtype.name, ids.shape) for name, ids in tensors.items()]
    layout = SafetensorsLayout.of(plans, metadata={FACTS: json.dumps(facts)})
    with new_file(path, replace=replace) as file:
        file.write(layout.header)
        for name in layout.offsets:
            file.write(np.ascontiguousarray(tensors[name]).data)


def read_trace(path: Path) -> Trace:
    """Read a trace; nothing in it is trusted.

    Raises:
        TableError: not a trace, of another version, too large, or with row ids its table doesn't have.
    """
    if not path.is_file():
        raise TableError(f"{path} is not a trace: there is no such file; make one with engram tables trace")
    try:
        with safe_open(path, framework="numpy") as file:
            return _read(file)
    except (SafetensorError, BundleError, OSError) as error:
        raise TableError(f"{path} is not a trace that can be used: {error}") from error


def _read(file: Any) -> Trace:
    facts = parse_facts(file.metadata(), FACTS, "make one with engram tables trace")
    version = facts.count("format_version")
    if version != FORMAT_VERSION:
        raise version_error("it has format", version, FORMAT_VERSION, "record it again")
    tokens = facts.count("tokens", least=1)
    model, text, command = (facts.take(name, str) for name in ("model", "text", "command"))
    sites = tuple(TraceSite.from_fields(item) for item in facts.objects("sites"))
    facts.finish()
    _check_names([site.site for site in sites], list(file.keys()))
    check_size(tokens, sum(site.columns for site in sites))
    row_ids = {site.site: _row_ids(file, site, tokens) for site in sites}
    return Trace(model=model, text=text, command=command, sites=sites, row_ids=row_ids)


def _check_names(sites: Sequence[str], tensors: Sequence[str]) -> None:
    if not sites or len(set(sites)) != len(sites) or sorted(map(tensor_name, sites)) != sorted(tensors):
        raise BundleError(f"it has tensors {sorted(tensors)[:8]} for sites {sorted(sites)[:8]}")


def _row_ids(file: Any, site: TraceSite, tokens: int) -> NDArray[np.signedinteger[Any]]:
    tensor = file.get_slice(tensor_name(site.site))
    dtype, shape = tensor.get_dtype(), list(tensor.get_shape())
    if DTYPES.get(dtype) != site.dtype or shape != [tokens, site.columns]:
        raise BundleError(
            f"row ids of site {site.site} are {dtype} {shape}, expected {site.dtype} {[tokens, site.columns]}"
        )
    row_ids: NDArray[np.signedinteger[Any]] = file.get_tensor(tensor_name(site.site))
    for column, (first, end) in enumerate(itertools.pairwise((*site.first_rows, site.num_rows))):
        _check_rows(site, column, row_ids[:, column], first, end)
    return row_ids


def _check_rows(site: TraceSite, column: int, row_ids: NDArray[np.signedinteger[Any]], first: int, end: int) -> None:
    outside = (row_ids != NO_ROW) & ((row_ids < first) | (row_ids >= end))
    if outside.any():
        found = int(row_ids[outside.argmax()])
        raise BundleError(f"row id {found} of column {column} of site {site.site} is outside [{first}, {end})")
