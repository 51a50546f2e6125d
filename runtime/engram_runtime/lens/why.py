"""Why a token came out as it did: the n-grams it looked up, and how far sites let their rows in."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram_runtime.activity import SiteActivity
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, RequestError
from engram_runtime.executor import Executor
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.keyers import NO_ROW
from engram_runtime.lens.chunks import chunks
from engram_runtime.manifest import ACTIVITY
from engram_runtime.session import Session, close_sites, open_sites
from engram_runtime.site import Site
from engram_runtime.tables.opening import AUTO_OPTIONS, Announce, silently
from engram_runtime.tables.options import TableOptions

CHUNK_TOKENS = 512  # whose rows are held at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Ngram:
    """The last tokens of a text, which a site looked up.

    Attributes:
        token_ids: oldest first; None before the text begins and behind a barrier, where the pad is hashed.
        row_ids: one a hash head.
        row_norms: L2 norms of these rows; that of a dead row is 0.
    """

    token_ids: tuple[int | None, ...]
    row_ids: tuple[int, ...]
    row_norms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a site did at a token; ``gate``, ``added`` and ``stream`` are those of `SiteActivity`, one a stream.

    Attributes:
        contribution: see `SiteActivity.contribution`.
        ngrams: in the order of the site's `orders`; empty for a token that reads no row.
    """

    position: int
    token_id: int
    gate: tuple[float, ...]
    added: tuple[float, ...]
    stream: tuple[float, ...]
    contribution: float
    ngrams: tuple[Ngram, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReadings:
    """What a site with n-grams of lengths ``orders``, ``num_heads`` rows each, did at every token of a text."""

    site: str
    orders: tuple[int, ...]
    num_heads: int
    readings: tuple[Reading, ...]


def explain(
    bundle: Bundle,
    executor: Executor,
    token_ids: Sequence[int],
    *,
    only: str | None = None,
    options: TableOptions = AUTO_OPTIONS,
    announce: Announce = silently,
) -> list[SiteReadings]:
    """Run a text and return what its sites with n-grams did, or the one that is named.

    Args:
        options: how tables are read, overlays included.
        announce: see `open_sites`.

    Raises:
        RequestError: no such site, a text the model can't take, or no room for resident tables.
        BundleError: the bundle's graph doesn't say what its sites do.
        TableError: as for `open_sites`.
    """
    keyers = explained_sites(bundle, only)
    with contextlib.ExitStack() as opened:
        sites = open_sites(bundle, options, executor, announce=announce)
        opened.callback(close_sites, sites)
        session = opened.enter_context(Session(bundle, executor, sites))
        passes = [session.activity for _ in session.logits(token_ids)]
        activity = {name: SiteActivity(np.concatenate([told[name].values for told in passes])) for name in keyers}
        return [
            SiteReadings(
                site=site.name,
                orders=keyers[site.name].orders,
                num_heads=keyers[site.name].num_heads,
                readings=tuple(_readings(site, keyers[site.name], token_ids, activity[site.name])),
            )
            for site in sites
            if site.name in keyers
        ]


def explained_sites(bundle: Bundle, only: str | None) -> Mapping[str, NgramKeyerSpec]:
    """Return the keyers of the sites to explain by name; errors as for `explain`."""
    tables = bundle.manifest.tables
    keyers = {table.site: table.keyer for table in tables if isinstance(table.keyer, NgramKeyerSpec)}
    if not keyers:
        raise RequestError(f"bundle {bundle.path} has no site that reads n-grams, so there is nothing to explain")
    if only is not None and only not in keyers:
        raise RequestError(f"site {only!r} is unknown; bundle {bundle.path} reads n-grams at {list(keyers)}")
    outputs = bundle.manifest.decoder.activity_outputs
    if any(f"{ACTIVITY}{name}" not in outputs for name in keyers):
        raise BundleError(f"bundle {bundle.path} was exported without site outputs; export it again")
    return keyers if only is None else {only: keyers[only]}


def _readings(site: Site, keyer: NgramKeyerSpec, token_ids: Sequence[int], activity: SiteActivity) -> Iterator[Reading]:
    ids = np.asarray(token_ids, dtype=np.int64)
    row_ids = site.keyer.row_ids([], ids)  # [T, C]
    norms = _row_norms(site, ids)
    parts = (activity.gate, activity.added, activity.stream)
    for position, contribution in enumerate(activity.contribution):
        gate, added, stream = (tuple(part[position].tolist()) for part in parts)
        yield Reading(
            position=position,
            token_id=token_ids[position],
            gate=gate,
            added=added,
            stream=stream,
            contribution=float(contribution),
            ngrams=tuple(
                _ngrams(
                    keyer,
                    token_ids[max(0, position - site.keyer.context) : position + 1],
                    row_ids[position],
                    norms[position],
                )
            ),
        )


def _row_norms(site: Site, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the L2 norms ``[T, C]`` of the rows of a text."""
    pieces = chunks(token_ids, CHUNK_TOKENS, site.keyer.context)
    return np.concatenate([np.linalg.norm(site.rows(history, chunk), axis=2) for history, chunk in pieces])


def _ngrams(
    keyer: NgramKeyerSpec, token_ids: Sequence[int], row_ids: NDArray[np.int64], norms: NDArray[np.float32]
) -> Iterator[Ngram]:
    """Yield what the last of ``token_ids`` looked up, rows ``[C]`` with a column for each order and head."""
    if (row_ids == NO_ROW).any():
        return
    hashed = hashed_ids(keyer, token_ids)
    for index, order in enumerate(keyer.orders):
        heads = slice(index * keyer.num_heads, (index + 1) * keyer.num_heads)
        yield Ngram(
            token_ids=hashed[len(hashed) - order :],
            row_ids=tuple(row_ids[heads].tolist()),
            row_norms=tuple(norms[heads].tolist()),
        )


def hashed_ids(keyer: NgramKeyerSpec, token_ids: Sequence[int]) -> tuple[int | None, ...]:
    """Return the tokens of the longest n-gram that ends a text as they are hashed; None stands for the pad."""
    seen: list[int | None] = [token_ids[-1]]
    for token_id in token_ids[-2 : -max(keyer.orders) - 1 : -1]:
        if token_id in keyer.barrier_ids:
            break
        seen.insert(0, token_id)
    return (None,) * (max(keyer.orders) - len(seen)) + tuple(seen)
