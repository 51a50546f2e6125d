"""Make a drafter and its schedule for a loaded bundle."""

from dataclasses import dataclass

from engram_runtime.bundle import Bundle
from engram_runtime.draft_head import DraftHead
from engram_runtime.drafting import head, lookup
from engram_runtime.drafting.costs import forward_costs
from engram_runtime.drafting.drafter import Drafter
from engram_runtime.drafting.options import NONE, DraftOptions
from engram_runtime.drafting.schedule import Always, Measured, Schedule
from engram_runtime.errors import RequestError
from engram_runtime.executor import Executor
from engram_runtime.manifest import DRAFT_HEAD


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts for a sequence, and how many tokens."""

    drafter: Drafter
    schedule: Schedule


def open_drafting(bundle: Bundle, executor: Executor, options: DraftOptions) -> Drafting | None:
    """Return what the options call for, None where nothing is drafted.

    Without a fixed number of drafts this measures what forward passes cost, unless that was done before.

    Raises:
        RequestError: the bundle has no draft head for ``mtp``.
    """
    if options.drafter == NONE:
        return None
    drafter = open_drafter(bundle, executor, options.drafter)
    if options.drafts is not None:
        return Drafting(drafter, Always(options.drafts))
    costs = forward_costs(bundle, executor)
    return Drafting(drafter, Measured(costs.forward_s, costs.draft_s if options.drafter == head.NAME else 0.0))


def open_drafter(bundle: Bundle, executor: Executor, name: str) -> Drafter:
    """Return the drafter of that name, which knows no tokens yet; raises RequestError as `open_drafting` does."""
    if name == lookup.NAME:
        return lookup.LookupDrafter()
    if DRAFT_HEAD not in bundle.manifest.graphs:
        raise RequestError(
            f"bundle {bundle.path} has no draft head, which drafter {name!r} needs; use {lookup.NAME!r} or export the "
            f"bundle with a head"
        )
    return head.HeadDrafter(DraftHead(bundle, executor))
