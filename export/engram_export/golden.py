"""What a bundle computed when it was made, kept to hold later runs against."""

import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from engram_export.exact_graph import GraphLogits
from engram_export.verify import Parity
from engram_runtime.bundle import Bundle
from engram_runtime.golden import GOLDEN_FILE, Golden, TableGolden, record_digest
from engram_runtime.session import UNLOADED, open_sites

TABLE_TOKENS = 32  # tokens whose row ids are kept


def write_golden(
    bundle: Bundle, token_ids: NDArray[np.int64], logits: GraphLogits, parity: Parity, drafts: GraphLogits | None
) -> None:
    """Write ``golden/golden.json`` for ``[T]`` token ids and what onnxruntime gave for them."""
    best = logits.last[-1].argsort()[::-1][:16]
    golden = Golden(
        token_ids=token_ids.tolist(),
        argmax=logits.argmax.tolist(),
        last_logits=[float(value) for value in logits.last[-1][best]],
        last_ids=best.tolist(),
        tables=_table_goldens(bundle, token_ids),
        parity=asdict(parity),
        draft_argmax=[] if drafts is None else drafts.argmax.tolist(),
    )
    _write(bundle, golden)


def write_table_golden(bundle: Bundle, token_ids: NDArray[np.int64]) -> None:
    """Write ``golden/golden.json`` of a bundle without a decoder: what ``[T]`` token ids read from its tables."""
    tables = _table_goldens(bundle, token_ids)
    golden = Golden(token_ids=token_ids.tolist(), argmax=[], last_logits=[], last_ids=[], tables=tables, parity={})
    _write(bundle, golden)


def _table_goldens(bundle: Bundle, token_ids: NDArray[np.int64]) -> list[TableGolden]:
    tables = []
    for site in open_sites(bundle, UNLOADED):
        row_ids = site.keyer.row_ids([], token_ids[:TABLE_TOKENS])
        rows = site.rows([], token_ids[:TABLE_TOKENS])
        tables.append(TableGolden(site=site.name, row_ids=row_ids.tolist(), rows_sha256=record_digest(rows)))
        site.table.close()
    return tables


def _write(bundle: Bundle, golden: Golden) -> None:
    path = bundle.file(GOLDEN_FILE)
    path.parent.mkdir()
    path.write_text(json.dumps(asdict(golden)), encoding="utf-8")
