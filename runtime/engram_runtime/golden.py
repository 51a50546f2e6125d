"""Golden values of a bundle: token ids and what the tables and the graph gave for them at export."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.draft_head import DraftHead
from engram_runtime.errors import BundleError, VerificationError
from engram_runtime.manifest import DECODER, DRAFT_HEAD, Manifest
from engram_runtime.session import Session
from engram_runtime.site import Site
from engram_runtime.strict_json import Fields, read_json_object

GOLDEN_FILE = "golden/golden.json"
MAX_REGRET = 0.02  # of the distance from a position's mean logit to its largest; rounding of activations costs 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class TableGolden:
    """Row ids ``[T, C]`` of a site for the first tokens, and the digest of the rows they lead to."""

    site: str
    row_ids: list[list[int]]
    rows_sha256: str

    @classmethod
    def from_fields(cls, fields: Fields) -> Self:
        table = cls(
            site=fields.take("site", str),
            row_ids=[list(row) for row in fields.integer_lists("row_ids")],
            rows_sha256=fields.take("rows_sha256", str),
        )
        fields.finish()
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """The content of ``golden/golden.json``; without a decoder there are token ids and tables alone.

    Attributes:
        draft_argmax: places in its vocabulary of what the draft head drafts after all tokens but the first.
    """

    token_ids: list[int]
    argmax: list[int]
    last_ids: list[int]
    last_logits: list[float]
    tables: list[TableGolden]
    parity: dict[str, float]
    draft_argmax: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, bundle: Bundle) -> Self:
        """Read a bundle's golden values; raises BundleError where they can't be those of this bundle."""
        fields = Fields(read_json_object(bundle.file(GOLDEN_FILE)), GOLDEN_FILE)
        golden = cls(
            token_ids=list(fields.integers("token_ids")),
            argmax=list(fields.integers("argmax")),
            last_ids=list(fields.integers("last_ids")),
            last_logits=list(fields.numbers("last_logits")),
            tables=[
                TableGolden.from_fields(Fields(table, f"{GOLDEN_FILE}.tables[{i}]"))
                for i, table in enumerate(fields.items("tables"))
            ],
            parity=dict(fields.fields("parity").remaining()),
            draft_argmax=list(fields.integers("draft_argmax")) if fields.given("draft_argmax") else [],
        )
        fields.finish()
        golden.check(bundle.manifest)
        return golden

    def check(self, manifest: Manifest) -> None:
        """Refuse values that contradict each other or the model."""
        tokens, vocab_size = len(self.token_ids), manifest.model.vocab_size
        if DECODER in manifest.graphs:
            self._check_logits(manifest.model.context_length)
        elif self.argmax or self.last_ids or self.last_logits or not tokens:
            raise BundleError(
                f"{GOLDEN_FILE} has {tokens} token ids and {len(self.argmax)} argmax, expected token ids alone: "
                f"the bundle has no decoder"
            )
        drafts = tokens - 1 if DRAFT_HEAD in manifest.graphs else 0
        if len(self.draft_argmax) != drafts:
            raise BundleError(f"{GOLDEN_FILE} has {len(self.draft_argmax)} draft_argmax, expected {drafts}")
        for token_id in (*self.token_ids, *self.argmax, *self.last_ids):
            if not 0 <= token_id < vocab_size:
                raise BundleError(f"{GOLDEN_FILE} has token id {token_id}, expected 0 to {vocab_size - 1}")
        found, expected = [table.site for table in self.tables], [table.site for table in manifest.tables]
        if found != expected:
            raise BundleError(f"{GOLDEN_FILE} has values of sites {found}, the bundle has sites {expected}")
        for table in self.tables:
            if not 0 < len(table.row_ids) <= tokens:
                raise BundleError(
                    f"{GOLDEN_FILE} has row ids of {len(table.row_ids)} tokens for site {table.site}, "
                    f"expected 1 to {tokens}"
                )

    def _check_logits(self, context: int) -> None:
        tokens = len(self.token_ids)
        if not 0 < tokens == len(self.argmax) <= context:
            raise BundleError(
                f"{GOLDEN_FILE} has {tokens} token ids and {len(self.argmax)} argmax, "
                f"expected as many of both, 1 to {context}"
            )
        if not 0 < len(self.last_ids) == len(self.last_logits):
            raise BundleError(
                f"{GOLDEN_FILE} has {len(self.last_ids)} last ids and {len(self.last_logits)} last logits, "
                f"expected as many of both"
            )


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
        if site.keyer.row_ids([], token_ids).tolist() != table.row_ids:
            raise VerificationError(f"row ids of site {table.site} differ from those at export; export again")
        if record_digest(site.rows([], token_ids)) != table.rows_sha256:
            raise VerificationError(f"rows of site {table.site} differ from those at export; export again")


def check_logits(golden: Golden, session: Session) -> dict[str, Any]:
    """Run the golden tokens through an empty session; returns agreement and difference.

    Raises:
        VerificationError: the tokens chosen at export are clearly not the best ones now.
    """
    logits = np.concatenate(list(session.logits(golden.token_ids)))
    agreement = float((logits.argmax(axis=1) == np.array(golden.argmax)).mean())
    regret = mean_regret(logits, golden.argmax)
    if not regret <= MAX_REGRET:  # NaN included, which logits that are NaN or all the same give
        raise VerificationError(
            f"logits differ from those at export: the tokens chosen then are {regret:.1%} short of the best now, "
            f"expected at most {MAX_REGRET:.0%}, and only {agreement:.1%} are the same; compile or export again"
        )
    difference = float(np.abs(logits[-1][golden.last_ids] - np.array(golden.last_logits)).max())
    return {
        "tokens": len(golden.token_ids),
        "argmax_agreement": agreement,
        "mean_regret": regret,
        "last_logits_max_abs": difference,
    }


def check_drafts(golden: Golden, head: DraftHead, hidden: NDArray[np.float32]) -> dict[str, Any]:
    """Run the golden tokens through an empty draft head; returns agreement.

    Args:
        hidden: ``[T, D]`` that the decoder gives for these tokens.

    Raises:
        VerificationError: the drafts at export are clearly not the best ones now.
    """
    logits = head.extend(golden.token_ids[1:], hidden[:-1], every_row=True).logits
    regret = mean_regret(logits, golden.draft_argmax)
    if not regret <= MAX_REGRET:
        raise VerificationError(
            f"drafts differ from those at export: they are {regret:.1%} short of the best now, expected at most "
            f"{MAX_REGRET:.0%}; compile or export again"
        )
    agreement = float((logits.argmax(axis=1) == np.array(golden.draft_argmax)).mean())
    return {"tokens": len(logits), "argmax_agreement": agreement, "mean_regret": regret}


def mean_regret(logits: NDArray[np.float32], chosen: Sequence[int]) -> float:
    """Return how far ``chosen [T]`` falls short of the best token of ``[T, V]`` logits, as a share of the spread.

    Executors round activations differently, so near-ties fall either way: those cost next to nothing here.
    """
    best = logits.max(axis=1)
    spread = best - logits.mean(axis=1)
    return float(((best - logits[np.arange(len(logits)), list(chosen)]) / spread).mean())
