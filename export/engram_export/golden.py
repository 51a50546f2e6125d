"""What a bundle computed when it was made, kept to hold later runs against."""

import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from engram_export.verify import Parity
from engram_runtime.bundle import Bundle
from engram_runtime.golden import GOLDEN_FILE, Golden, TableGolden, record_digest
from engram_runtime.session import open_sites

TABLE_TOKENS = 32  # tokens whose row ids are kept


def write_golden(bundle: Bundle, token_ids: NDArray[np.int64], logits: NDArray[np.float32], parity: Parity) -> None:
    """Write ``golden/golden.json`` for ``[T]`` token ids and the ``[T, V]`` logits onnxruntime gave for them."""
    tables = []
    for site in open_sites(bundle):
        row_ids = site.keyer.row_ids([], token_ids[:TABLE_TOKENS])
        rows = site.rows([], token_ids[:TABLE_TOKENS])
        tables.append(TableGolden(site=site.name, row_ids=row_ids.tolist(), rows_sha256=record_digest(rows)))
        site.table.close()
    golden = Golden(
        token_ids=token_ids.tolist(),
        argmax=logits.argmax(axis=1).tolist(),
        last_logits=[float(value) for value in logits[-1][logits[-1].argsort()[::-1][:16]]],
        last_ids=logits[-1].argsort()[::-1][:16].tolist(),
        tables=tables,
        parity=asdict(parity),
    )
    path = bundle.file(GOLDEN_FILE)
    path.parent.mkdir()
    path.write_text(json.dumps(asdict(golden)), encoding="utf-8")
