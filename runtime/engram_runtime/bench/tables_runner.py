"""One site of a bundle in a process of its own: look-ups timed beside raw reads of the same file."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bench.tables_cache import cached_share, evict, fill
from engram_runtime.bundle import Bundle
from engram_runtime.errors import TargetError
from engram_runtime.executor import Executor, load_executor
from engram_runtime.manifest import DECODER
from engram_runtime.session import close_sites, open_sites
from engram_runtime.site import Site
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.aio import DirectReader
from engram_runtime.tables.options import TableOptions

WARM, COLD, CAPPED = "warm", "cold", "capped"
SINGLE_TOKENS = 100  # looked up one by one in a round
WARM_UP_TOKENS = 8  # before them, so that code is in the caches and only rows are cold

Sample = dict[str, Any]  # what a round took: lists of seconds by name, one for each token or for the chunk
Lookup = tuple[Sequence[int], NDArray[np.int64]]  # history and token ids


class TableRunner:
    """A site whose table is opened anew where its rows must be cold."""

    def __init__(
        self, bundle: Bundle, spec: TableSpec, executor: Executor | None, options: TableOptions, no_library: str = ""
    ) -> None:
        """Open the table; ``no_library`` says why there is no executor where there could be one."""
        self._no_library = no_library
        # The other tables stay closed: what they hold in memory is none of this one's.
        self._bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, tables=(spec,)))
        self._spec, self._executor, self._options = spec, executor, options
        self._files = {rows.file: bundle.table_path(rows) for rows in spec.ranges}
        self._buffers: dict[int, NDArray[np.float32]] = {}  # of rows, by number of tokens
        self._site = self._open()
        assert self._site.choice is not None  # `open_sites` chose
        self._choice = self._site.choice
        self._options = TableOptions(io=self._choice.io)  # whatever memory is free when it is opened anew

    @property
    def facts(self) -> dict[str, Any]:
        """What is measured, for the report."""
        compiled = self._executor is not None and self._executor.row_decoder(self._spec.site) is not None
        return {
            "io": self._choice.io,
            "choice": str(self._choice),
            "decoder": self._executor.name if self._executor is not None and compiled else "numpy",
            "reads_per_token": self.reads_per_token,
            "probed_file": str(self.probed_file),
            **({"no_library": self._no_library} if self._no_library else {}),
        }

    @property
    def reads_per_token(self) -> int:
        """Records a token reads, times the places a record lies in."""
        return self._spec.keyer.columns * len(self._spec.parts)

    @property
    def probed_file(self) -> Path:
        """The largest file of the table."""
        return max(self._files.values(), key=lambda path: path.stat().st_size)

    def evict(self) -> Sample:
        """Drop the table's pages and open it anew; returns the share of the largest file's that stayed."""
        self.close()  # pages that are mapped stay
        for path in self._files.values():
            evict(path)
        stayed = cached_share(self.probed_file)
        self._site = self._open()
        return {"stayed": stayed}

    def fill(self, num_bytes: int) -> Sample:
        """Fill a cap with pages of the table; see `engram_runtime.bench.tables_cache.fill`."""
        fill(self.probed_file, num_bytes)
        return {}

    def round(self, state: str, seed: int, tokens: int, depth: int) -> Sample:
        """Time single tokens and a chunk of ``tokens``, all random; the raw probe reads as often elsewhere."""
        rng = np.random.default_rng(seed)
        if state == COLD:
            self.evict()
        _each(self._look_up, self._singles(rng, WARM_UP_TOKENS))
        singles, chunk = self._singles(rng, SINGLE_TOKENS), self._lookup(rng, tokens)
        if state == WARM:
            _each(self._look_up, [*singles, chunk])  # the chunk's rows drive those of the tokens from the caches
        before = dataclasses.replace(self._site.table.counters)
        sample = {**self._tokens(rng, singles), **self._chunk(rng, chunk, depth)}
        asked = self._site.table.counters - before
        sample["cold_share"] = asked.cold / asked.unique if asked.unique else 0.0
        if state == WARM:
            sample["take"] = self._take(self._site.keyer.row_ids(*chunk).ravel())
        return sample

    def close(self) -> None:
        """Close the table."""
        close_sites([self._site])

    def _open(self) -> Site:
        (site,) = open_sites(self._bundle, self._options, self._executor)
        return site

    def _singles(self, rng: np.random.Generator, count: int) -> list[Lookup]:
        return [self._lookup(rng, 1) for _ in range(count)]

    def _lookup(self, rng: np.random.Generator, tokens: int) -> Lookup:
        context = self._site.keyer.context
        ids = rng.integers(0, self._bundle.manifest.model.vocab_size, size=context + tokens)
        return ids[:context].tolist(), ids[context:]

    def _look_up(self, history: Sequence[int], token_ids: NDArray[np.int64]) -> None:
        """Do what a session does for a forward pass, into a buffer that it uses again."""
        count = len(token_ids)
        if count not in self._buffers:
            self._buffers[count] = self._site.empty(count)
        self._site.gather(self._site.keyer.row_ids(history, token_ids), self._buffers[count])

    def _tokens(self, rng: np.random.Generator, lookups: Sequence[Lookup]) -> Sample:
        places = [self._places(rng, self.reads_per_token) for _ in lookups]
        return {
            "ids_token": _each(self._site.keyer.row_ids, lookups),
            "token": _each(self._look_up, lookups),
            **self._raw("raw_token", places, self.reads_per_token),
        }

    def _chunk(self, rng: np.random.Generator, lookup: Lookup, depth: int) -> Sample:
        places = self._places(rng, len(lookup[1]) * self.reads_per_token)
        return {
            "ids_chunk": _each(self._site.keyer.row_ids, [lookup]),
            "chunk": _each(self._look_up, [lookup]),
            **self._raw("raw_chunk", [places], depth),
        }

    def _raw(self, name: str, places: Sequence[NDArray[np.int64]], depth: int) -> Sample:
        """Read at places as a look-up would; where the system refuses direct reads, say why instead."""
        try:
            with DirectReader(self.probed_file, depth) as reader:
                return {name: [reader.read(each).elapsed_s for each in places]}
        except OSError as error:
            return {"no_raw": error.strerror}

    def _places(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return ``[count]`` random places in the probed file, ascending as a store reads them."""
        return np.sort(rng.integers(0, self.probed_file.stat().st_size, size=count))

    def _take(self, row_ids: NDArray[np.int64]) -> list[float]:
        """Time numpy's take of the same records, their pages in memory."""
        chosen = []
        for rows, first_row in self._record_maps():
            inside = (row_ids >= first_row) & (row_ids < first_row + len(rows))
            chosen.append((rows, row_ids[inside] - first_row))

        def take() -> None:
            for rows, ids in chosen:
                rows.take(ids, axis=0)

        take()  # to find its pages
        return [_seconds(take)]

    def _record_maps(self) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """Yield each range of rows, ``[rows, row_bytes]`` mapped from its file, and its first row."""
        for part in self._spec.parts:
            for rows in part.ranges:
                shape = rows.num_rows, part.row_bytes
                mapped = np.memmap(self._files[rows.file], np.uint8, "r", rows.offset, shape)
                yield mapped.view(np.ndarray), rows.first_row


def load(model: str, *, site: str, executor: str, options: Mapping[str, Any]) -> TableRunner:
    """Open one site of a bundle.

    Args:
        executor: whose row decoder is used where the bundle has a decoder and a library for this machine.
        options: fields of `TableOptions`.

    Raises:
        EngramError: as `Bundle.open` and the table's store.
    """
    bundle = Bundle.open(Path(model))
    (spec,) = [table for table in bundle.manifest.tables if table.site == site]
    if DECODER not in bundle.manifest.graphs:
        return TableRunner(bundle, spec, None, TableOptions(**options))
    try:
        loaded = load_executor(executor, bundle, threads=None)
    except TargetError as error:  # rows are decoded by numpy then, which the report says
        return TableRunner(bundle, spec, None, TableOptions(**options), str(error))
    return TableRunner(bundle, spec, loaded, TableOptions(**options))


def _each(what: Callable[..., object], lookups: Sequence[Lookup]) -> list[float]:
    return [_seconds(partial(what, *lookup)) for lookup in lookups]


def _seconds(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started
