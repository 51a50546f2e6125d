"""What forward passes of several rows cost on this machine: measured once, and kept in the user's cache."""

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from engram_runtime.bundle import Bundle
from engram_runtime.cpu import available_cpus, cpu_flags, physical_memory
from engram_runtime.draft_head import DraftHead
from engram_runtime.errors import BundleError, RequestError
from engram_runtime.executor import Executor
from engram_runtime.library import Compiled, LibraryInfo
from engram_runtime.manifest import DRAFT_HEAD
from engram_runtime.new_file import new_file
from engram_runtime.session import Session
from engram_runtime.strict_json import Fields, read_json_object
from engram_runtime.user_cache import cache_folder

FOLDER, VERSION = "costs", 2
MEASURED_ROWS = (1, 2, 4, 8, 16)  # forward passes between them are taken to lie on lines between them
MOST_ROWS = 24
DEPTH = 64  # tokens before those of a pass
MOST_S = 3600.0
ROUNDS, BUDGET_S = 7, 1.0  # rounds that begin within the budget, at least one

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCosts:
    """Seconds of passes on one machine with one library and one number of threads.

    Attributes:
        library: SHA-256 of the code that was timed.
        machine: digest of its processor's features, CPUs and memory: bundles are moved.
        forward_s: ``[M]`` of passes over 1, 2, .. M tokens with all their logits, experts as random tokens need them.
        draft_s: of one draft of the draft head, 0 without one.
    """

    library: str
    threads: int
    machine: str
    forward_s: tuple[float, ...]
    draft_s: float

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        """Parse; raises BundleError naming the key."""
        fields = Fields(raw, "costs")
        version = fields.count("version")
        costs = cls(
            library=fields.take("library", str),
            threads=fields.count("threads"),
            machine=fields.take("machine", str),
            forward_s=fields.numbers("forward_s"),
            draft_s=fields.number("draft_s"),
        )
        fields.finish()
        if version != VERSION or len(costs.forward_s) != MOST_ROWS:
            raise BundleError(f"costs have version {version} and {len(costs.forward_s)} rows")
        if min(costs.forward_s) <= 0 or costs.draft_s < 0 or max(*costs.forward_s, costs.draft_s) > MOST_S:
            raise BundleError("costs are of no pass that can be: at most 0 s, or longer than an hour")
        return costs

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that `from_dict` reads."""
        return {"version": VERSION, **asdict(self)}


def forward_costs(bundle: Bundle, executor: Executor) -> ForwardCosts:
    """Return the costs that were stored for this machine, library and number of threads, or measure and store them.

    Where this user has no cache, and for an executor without a library, they are measured each time.
    """
    if not isinstance(executor, Compiled):
        return measure(bundle, executor, library="")
    digest = executor.info.sha256["library"]
    path = costs_path(executor.info, executor.threads)
    stored = None if path is None else read_costs(path)
    current = (digest, executor.threads, _machine())
    if stored is not None and (stored.library, stored.threads, stored.machine) == current:
        return stored
    costs = measure(bundle, executor, library=digest)
    if path is not None:
        write_costs(path, costs)
    return costs


def costs_path(info: LibraryInfo, threads: int) -> Path | None:
    """Return the file for a library and a number of threads, or None where this user has no folder for caches."""
    try:
        return cache_folder() / FOLDER / f"{info.sha256['library'][:32]}.{threads}.json"
    except OSError:
        return None


def read_costs(path: Path) -> ForwardCosts | None:
    """Return what a file holds, None where there is none or it holds anything else: then costs are measured anew."""
    try:
        return ForwardCosts.from_dict(read_json_object(path))
    except BundleError:
        return None


def write_costs(path: Path, costs: ForwardCosts) -> None:
    """Keep costs for the next process where that is possible."""
    with contextlib.suppress(OSError, RequestError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, replace=True) as file:
            file.write((json.dumps(costs.to_dict(), indent=1) + "\n").encode())


def measure(bundle: Bundle, executor: Executor, *, library: str, clock: Clock = time.perf_counter) -> ForwardCosts:
    """Time passes in a session of their own, in about `BUDGET_S` or what two passes of each size take.

    Args:
        clock: tells seconds.
    """
    with Session.open(bundle, executor, tables_on=False) as session:
        most = session.model.context_length // 2
        sizes = sorted({size for rows in MEASURED_ROWS if rows <= max(1, most) for size in session.passes(rows)})
        token_ids = _random_tokens(session)
        takes = [_pass(session, token_ids, size) for size in sizes]
        *seconds, draft_s = _medians([*takes, _draft_pass(bundle, executor)], clock)
        sizes_of_rows = [session.passes(rows) for rows in range(1, MOST_ROWS + 1)]
    return ForwardCosts(
        library=library,
        threads=executor.threads,
        machine=_machine(),
        forward_s=tuple(float(np.interp(each, sizes, seconds).sum()) for each in sizes_of_rows),
        draft_s=draft_s,
    )


class _Take(NamedTuple):
    """What is timed, and what is done before it."""

    prepare: Callable[[], object]
    run: Callable[[], object]


def _random_tokens(session: Session) -> list[int]:
    """Return as many as a pass takes at most, and those before it."""
    count = max(DEPTH, *MEASURED_ROWS)
    ids: list[int] = np.random.default_rng(0).integers(0, session.model.vocab_size, size=count).tolist()
    return ids


def _pass(session: Session, token_ids: Sequence[int], rows: int) -> _Take:
    """Return a plain pass, or one over drafts of which none is right."""

    def prepare() -> None:
        if len(session) == 0 or session.room <= rows:
            session.trim(len(session))
            session.prefill(token_ids[: max(1, min(DEPTH, session.model.context_length // 4))])
        session.catch_up()
        if rows > 1:
            session.decode(token_ids[:1])  # or the checkpoint would stand where it was

    def verify() -> None:
        session.checkpoint()
        session.decode(token_ids[:rows])
        session.trim(rows - 1)
        assert session.put_off < rows  # it steps back where it has to

    return _Take(prepare, verify if rows > 1 else partial(session.decode, token_ids[:1]))


def _draft_pass(bundle: Bundle, executor: Executor) -> _Take:
    """Return what makes one draft, or does nothing where there is no head."""
    if DRAFT_HEAD not in bundle.manifest.graphs:
        return _Take(_nothing, _nothing)
    head = DraftHead(bundle, executor)
    hidden = np.ones((1, bundle.manifest.model.hidden_size), dtype=np.float32)
    return _Take(lambda: head.trim(len(head)), lambda: head.extend([0], hidden))


def _nothing() -> None:
    pass


def _medians(takes: Sequence[_Take], clock: Clock) -> list[float]:
    """Time each in every round; the first round, which finds code and weights cold, isn't counted."""
    samples: list[list[float]] = [[] for _ in takes]
    began = clock()
    for number in range(1 + ROUNDS):
        if number > 1 and clock() - began > BUDGET_S:
            break
        for take, seconds in zip(takes, samples, strict=True):
            take.prepare()
            before = clock()
            take.run()
            seconds.append(clock() - before)
    return [statistics.median(seconds[1:]) for seconds in samples]


def _machine() -> str:
    parts = [len(available_cpus()), physical_memory(), *sorted(cpu_flags())]
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
