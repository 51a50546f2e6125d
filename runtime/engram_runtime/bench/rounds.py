"""Which measurements there are, and taking them in turn, so that a busy machine slows all runners alike."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from engram_runtime.bench.process import Worker
from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.errors import RequestError
from engram_runtime.tables.options import AUTO

DRAFTS = "drafts"
VERIFIED_TOKENS = (1, 2, 4, 8, 16)
MOST_ROUNDS = 200  # to compare reports all pairs of their rounds are ranked
WARM_UP_TOKENS = 1  # decoded before those that count
SETTLE_S = 0.02  # idle threads of the one before still spin for some milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes of what is measured, in tokens; ``depths`` are how many tokens stand before.

    ``table_io`` and ``table_ram`` are those of `engram_runtime.tables.options.TableOptions`. ``prompts`` are the texts
    that drafts are measured on, by name, of each the first ``prompt_tokens``; none without drafts.
    """

    prompt_tokens: int
    decode_tokens: int
    depths: tuple[int, ...]
    rounds: int
    tables_on: bool
    profile: bool
    table_io: str = AUTO
    table_ram: int | None = None
    drafts: DraftOptions = NO_DRAFTS
    prompts: Mapping[str, str] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """Return how long the longest sequence gets."""
        deepest = max(self.depths) + max(self.prompt_tokens, WARM_UP_TOKENS + self.decode_tokens)
        profiled = 2 * self.prompt_tokens if self.profile else 0  # a prompt after as many tokens
        drafted = self.prompt_tokens + self.decode_tokens if self.prompts else 0
        return max(deepest, profiled, drafted, self.prompt_tokens + max(VERIFIED_TOKENS))

    @property
    def steps(self) -> int:
        """Return how often `measure` tells of progress."""
        return (len(self.measurements()) + (2 if self.prompts else 1)) * (1 + self.rounds)

    def check_context(self, context_length: int) -> None:
        """Raise RequestError where the measurements need more than the model's context."""
        if self.positions > context_length:
            raise RequestError(
                f"these measurements need {self.positions} tokens, the context holds {context_length}; give a smaller "
                f"--prompt-tokens, --decode-tokens or --depth"
            )

    def measurements(self) -> dict[str, dict[str, Any]]:
        """Return what the workers are asked, by name."""
        found: dict[str, dict[str, Any]] = {}
        for depth in self.depths:
            found[f"prefill@{depth}"] = {"what": "prefill", "depth": depth, "tokens": self.prompt_tokens}
            found[f"decode@{depth}"] = {"what": "decode", "depth": depth, "tokens": self.decode_tokens}
        # All sizes in one turn: a ratio of two of them is then one of times that are near each other.
        found["verify"] = {"what": "verify", "depth": self.prompt_tokens, "sizes": VERIFIED_TOKENS}
        return found

    def continuations(self) -> dict[str, Any]:
        """Return what a worker that drafts is asked."""
        return {
            "what": DRAFTS,
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.decode_tokens,
            "drafts": asdict(self.drafts),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """What is measured: a runner's name, what it is told to load, and what only the caller knows of that.

    ``target`` is that of the library to run, or None for the runner's own choice; ``weight_bytes`` are those each token
    reads, or None to believe the runner; ``types`` are those of its tensors, for the report, where they don't follow
    from what is measured; ``drafts`` tells whether it can draft.
    """

    runner: str
    model: str
    target: str | None = None
    weight_bytes: int | None = None
    types: str | None = None
    drafts: bool = True


@dataclass(slots=True)
class Result:
    """What a contestant's worker answered.

    Attributes:
        facts: on loading in the process that all but the starts are measured in.
        samples: those of the counted rounds; ``start`` are of a fresh process each.
    """

    contestant: Contestant
    facts: Mapping[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    memory: Mapping[str, float] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None


def measure(
    contestants: Sequence[Contestant],
    settings: Settings,
    *,
    threads: int | None,
    progress: Callable[[], None],
    start_worker: Callable[[str], Worker] = Worker,
) -> list[Result]:
    """Measure all, each in a process of its own, round by round.

    Args:
        threads: or None for what the first contestant chooses; the others get the same number.
        progress: called after each round of a measurement.
        start_worker: makes the process of a runner of that name.

    Raises:
        EngramError: as a worker answers.
    """
    with ExitStack() as opened:
        workers, results = [], []
        for contestant in contestants:
            worker = opened.enter_context(start_worker(contestant.runner))
            facts = _load(worker, contestant, settings, threads)
            threads = facts["threads"]
            workers.append(worker)
            results.append(Result(contestant, facts))
        if settings.profile:
            results[0].profile = workers[0].ask("profile", depth=settings.prompt_tokens, tokens=settings.prompt_tokens)
        if settings.prompts:  # first, as it may be that there is nothing to draft with
            able = [place for place, contestant in enumerate(contestants) if contestant.drafts]
            asks = [partial(workers[place].ask, **settings.continuations()) for place in able]
            _in_turn([results[place] for place in able], asks, settings.rounds, DRAFTS, progress)
        for name, request in settings.measurements().items():
            asks = [partial(worker.ask, **request) for worker in workers]
            _in_turn(results, asks, settings.rounds, name, progress)
        for worker, result in zip(workers, results, strict=True):
            result.memory = worker.ask("memory")

    def fresh_start(contestant: Contestant) -> dict[str, Any]:
        with start_worker(contestant.runner) as worker:
            return _load(worker, contestant, settings, threads)

    _in_turn(results, [partial(fresh_start, each) for each in contestants], settings.rounds, "start", progress)
    return results


def _load(worker: Worker, contestant: Contestant, settings: Settings, threads: int | None) -> dict[str, Any]:
    return worker.ask(
        "load",
        runner=contestant.runner,
        model=contestant.model,
        **({} if contestant.target is None else {"target": contestant.target}),
        threads=threads,
        tables_on=settings.tables_on,
        table_io=settings.table_io,
        table_ram=settings.table_ram,
        positions=settings.positions,
    )


def _in_turn(
    results: Sequence[Result],
    takes: Sequence[Callable[[], dict[str, Any]]],
    rounds: int,
    name: str,
    progress: Callable[[], None],
) -> None:
    """Take a measurement of each in every round; the first round isn't counted."""
    for counted in [False, *[True] * rounds]:
        for result, take in zip(results, takes, strict=True):
            time.sleep(SETTLE_S)
            answer = take()
            if counted:
                result.samples[name].append(answer)
        progress()
