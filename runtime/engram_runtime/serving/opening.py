"""Opens a bundle to serve requests."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from engram_runtime.bundle import Bundle, file_sha256
from engram_runtime.drafting.opening import open_decoding
from engram_runtime.drafting.options import APPROXIMATE_MASK, MASK, NO_DRAFTS, NONE, DraftOptions
from engram_runtime.errors import RequestError
from engram_runtime.executor import load_executor
from engram_runtime.serving.engine import BundleEngine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.session import UNLOADED, close_sites, open_sites
from engram_runtime.tables.opening import AUTO_OPTIONS, Announce, silently
from engram_runtime.tables.options import TableOptions
from engram_runtime.tokenizer import TextTokenizer
from engram_runtime.trust.levels import LOCALLY, Trust


@contextlib.contextmanager
def open_engine(
    path: str | Path,
    executor: str = "tvm",
    *,
    options: EngineOptions,
    threads: int | None = None,
    target: str | None = None,
    tables: TableOptions = AUTO_OPTIONS,
    drafts: DraftOptions = NO_DRAFTS,
    announce: Announce = silently,
    trust: Trust = LOCALLY,
) -> Iterator[BundleEngine]:
    """Yield an engine on a bundle; texts that run at the end fail. The arguments are those of `engram_runtime.llm.LLM`.

    Args:
        drafts: for a text that is the only one.

    Raises:
        BundleError, TargetError, RequestError: as for `LLM`, no memory for so many texts, or drafts that would change
            a text.
    """
    if drafts.drafter == APPROXIMATE_MASK:
        raise RequestError(
            f"drafter {APPROXIMATE_MASK!r} says its guesses unverified, so that a text would depend on what runs "
            f"beside it; choose {MASK!r}"
        )
    bundle = Bundle.open(Path(path), trust)
    loaded = load_executor(executor, bundle, threads=threads, target=target)
    decoding = None if drafts.drafter == NONE else open_decoding(bundle, loaded, drafts)
    tokenizer = TextTokenizer.load(bundle.path)
    with contextlib.ExitStack() as opened:
        reading = tables if options.tables_on else UNLOADED
        sites = open_sites(bundle, reading, loaded, announce=announce if options.tables_on else silently)
        opened.callback(close_sites, sites)
        overlays = [file_sha256(overlay) for overlay in reading.overlays]
        engine = BundleEngine(bundle, loaded, sites, tokenizer, options, decoding=decoding, overlays=overlays)
        yield opened.enter_context(engine)
