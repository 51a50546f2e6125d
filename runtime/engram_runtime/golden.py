"""Golden values of a bundle: token ids and what the tables and the graph gave for them at export."""

import hashlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.errors import VerificationError
from engram_runtime.session import Session, Site
from engram_runtime.strict_json import Fields, read_json_object

GOLDEN_FILE = "golden/golden.json"
MIN_ARGMAX_AGREEMENT = 0.95  # executors round activations differently, so near-ties may fall either way


@dataclass(frozen=True, slots=True, kw_only=True)
class TableGolden:
    """Row ids ``[T, C]`` of a site for the first tokens, and the digest of the rows they lead to."""

    site: str
    row_ids: list[list[int]]
    rows_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """The content of ``golden/golden.json``."""

    token_ids: list[int]
    argmax: list[int]
    last_ids: list[int]
    last_logits: list[float]
    tables: list[TableGolden]
    parity: dict[str, float]

    @classmethod
    def read(cls, bundle: Bundle) -> Self:
        """Read a bundle's golden values."""
        fields = Fields(read_json_object(bundle.file(GOLDEN_FILE)), GOLDEN_FILE)
        golden = cls(
            token_ids=list(fields.integers("token_ids")),
            argmax=list(fields.integers("argmax")),
            last_ids=list(fields.integers("last_ids")),
            last_logits=[float(value) for value in fields.items("last_logits")],
            tables=[TableGolden(**table) for table in fields.items("tables")],
            parity=dict(fields.fields("parity").remaining()),
        )
        fields.finish()
        return golden


def record_digest(rows: NDArray[np.float32]) -> str:
    """Return the SHA-256 of rows as float32 values."""
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def check_tables(golden: Golden, sites: list[Site]) -> None:
    """Hold hashes and rows against their golden values.

    Raises:
        VerificationError: a row id or a row differs.
    """
    by_name = {site.name: site for site in sites}
    for table in golden.tables:
        site = by_name[table.site]
        token_ids = np.array(golden.token_ids[: len(table.row_ids)], dtype=np.int64)
        if site.ngram_hash.row_ids([], token_ids).tolist() != table.row_ids:
            raise VerificationError(f"row ids of site {table.site} differ from those at export; export again")
        if record_digest(site.rows([], token_ids)) != table.rows_sha256:
            raise VerificationError(f"rows of site {table.site} differ from those at export; export again")


def check_logits(golden: Golden, session: Session) -> dict[str, Any]:
    """Run the golden tokens through an empty session; returns agreement and difference.

    Raises:
        VerificationError: too few positions have the golden argmax.
    """
    logits = np.concatenate(list(session.logits(golden.token_ids)))
    agreement = float((logits.argmax(axis=1) == np.array(golden.argmax)).mean())
    difference = float(np.abs(logits[-1][golden.last_ids] - np.array(golden.last_logits)).max())
    if agreement < MIN_ARGMAX_AGREEMENT:
        raise VerificationError(
            f"argmax agrees with export at {agreement:.1%} of positions, expected {MIN_ARGMAX_AGREEMENT:.0%}; "
            f"compile again, then export again"
        )
    return {"tokens": len(golden.token_ids), "argmax_agreement": agreement, "last_logits_max_abs": difference}
