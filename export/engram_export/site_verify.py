"""Hold sites that were exported by themselves against the checkpoint's own, on a fixed text and random streams."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from engram_export.exact_graph import open_exact_graph
from engram_export.formats import FLOAT, WeightFormat
from engram_export.golden import write_table_golden
from engram_export.pipeline import VERIFY_THREADS, Reporter
from engram_export.repack import RowErrors
from engram_export.site_source import SiteSource, TablesSource
from engram_export.streamed import BundleRows, EncodedRows, streamed_format
from engram_export.table_writer import WrittenTable, checkpoint_site, open_rows
from engram_export.verify import bundle_rows, verify_tokens
from engram_runtime.bundle import Bundle
from engram_runtime.errors import VerificationError
from engram_runtime.manifest import SITE_GRAPH

# Largest difference of a graph from torch, as a share of what the site adds: a gate jumps by 5e-4 of it where its score
# changes sign, which other summation orders may move over zero.
SITE_TOLERANCE = 1e-3

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteVerification:
    """Largest differences of a site's output over random streams and the rows of a text.

    Attributes:
        graph: against torch with the same weights and rows.
        model: against the checkpoint's float32 weights and own rows.
        row_errors: of rows that were repacked.
    """

    site: str
    tokens: int
    graph: float
    model: float
    row_errors: RowErrors | None


def verify_sites(
    source: TablesSource,
    bundle: Bundle,
    chosen: WeightFormat,
    written: Sequence[WrittenTable],
    reporter: Reporter,
) -> list[SiteVerification]:
    """Hold rows and graphs against the checkpoint on a fixed text; the rows are kept as golden.

    Raises:
        VerificationError: rows that are not the checkpoint's, or a graph that is not its site.
    """
    token_ids = verify_tokens(source.checkpoint, source.text.vocab_size, source.text.max_positions)
    rows = bundle_rows(bundle, token_ids)
    verifications = []
    for site, table, site_rows in zip(source.sites, written, rows, strict=True):
        reporter.step(f"running {SITE_GRAPH}{site.name}")
        with open_rows(site.table) as store:
            own_rows = checkpoint_site(site.table, source.text.vocab_size, store).rows([], token_ids)
        if table.errors is None and not np.array_equal(site_rows, own_rows, equal_nan=True):
            raise VerificationError(f"rows of table {site.name} are not those of the checkpoint; export again")
        graph, model = compare_site(site, bundle, chosen, site_rows, own_rows)
        verifications.append(
            SiteVerification(site=site.name, tokens=len(token_ids), graph=graph, model=model, row_errors=table.errors)
        )
    write_table_golden(bundle, token_ids)
    return verifications


def compare_site(
    site: SiteSource, bundle: Bundle, chosen: WeightFormat, rows: Values, own_rows: Values
) -> tuple[float, float]:
    """Run a site's graph over random streams; returns the two differences of `SiteVerification`.

    Args:
        rows: ``[T, C, d]`` of the bundle. ``own_rows``: of the checkpoint.

    Raises:
        VerificationError: the graph does not compute what torch does with the same weights and rows.
    """
    graph = bundle.manifest.graphs[f"{SITE_GRAPH}{site.name}"]
    shape = (len(rows), site.config.num_streams, site.config.hidden_size)
    hidden = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    reference = site_output(site, FLOAT, site, hidden, own_rows)
    encoded: EncodedRows = site if chosen is FLOAT else BundleRows.open(site, bundle.file(graph.weights))
    path = bundle.file(graph.file)
    exact = run_site(open_exact_graph(path, threads=VERIFY_THREADS), site, hidden, rows)
    difference = _largest(site_output(site, chosen, encoded, hidden, rows), exact)
    limit = SITE_TOLERANCE * _largest(reference, hidden)
    if difference > limit:
        raise VerificationError(
            f"the graph of site {site.name} differs from torch by {difference:.2e} with the same weights, at most "
            f"{limit:.2e} is rounding; this is another site"
        )
    return difference, _largest(reference, exact)


def site_output(site: SiteSource, weights: WeightFormat, encoded: EncodedRows, hidden: Values, rows: Values) -> Values:
    """Run a site's torch module on hidden ``[T, G, D]`` and rows ``[T, C, d]``, its weights read as they are needed."""
    module = site.build(streamed_format(weights, encoded).make_linear)
    module.gain.data = torch.from_numpy(site.weights.read("gain"))
    with torch.no_grad():
        output: Values = module(torch.from_numpy(hidden), torch.from_numpy(rows)).numpy()
    return output


def run_site(session: ort.InferenceSession, site: SiteSource, hidden: Values, rows: Values) -> Values:
    """Run a site's graph on onnxruntime."""
    (output,) = session.run(None, {"hidden": hidden, f"rows.{site.name}": rows})
    values: Values = output
    return values


def _largest(reference: Values, found: Values) -> float:
    difference = float(np.abs(reference - found).max())
    if not np.isfinite(difference):
        raise VerificationError("a site gives values that are not finite numbers; download the checkpoint again")
    return difference
