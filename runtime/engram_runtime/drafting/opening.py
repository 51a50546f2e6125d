"""Ways to generate, made ready for a loaded bundle: one token a forward pass, or several by a drafter or by masks."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engram_runtime.bundle import Bundle
from engram_runtime.draft_head import DraftHead
from engram_runtime.drafting import head, lookup, mask
from engram_runtime.drafting.acceptance import by_sampling
from engram_runtime.drafting.costs import forward_costs
from engram_runtime.drafting.drafter import Drafter
from engram_runtime.drafting.mask import MaskOptions
from engram_runtime.drafting.options import (
    DEFAULT_MASK_DRAFTS,
    MASK,
    MASKS,
    NONE,
    DraftOptions,
)
from engram_runtime.drafting.schedule import Always, Measured, Schedule
from engram_runtime.drafting.speculate import Speculation, decode_drafted
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import RequestError
from engram_runtime.executor import Executor
from engram_runtime.generation import Tokens, decode_tokens
from engram_runtime.manifest import DRAFT_HEAD
from engram_runtime.sampling import Sampler
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer
from engram_runtime.tracing.recorder import Recorder

CountDrafts = Callable[..., DraftStatistics]
Generated = tuple[Tokens, DraftStatistics | None]  # token ids, and where their drafts are counted while they come


class Decoding(Protocol):
    """Generates after what a session holds; the arguments are those of `engram_runtime.generation.decode_tokens`."""

    def __call__(
        self,
        session: Session,
        logits: NDArray[np.float32],
        sample: Sampler,
        *,
        max_tokens: int,
        end_ids: Collection[int],
    ) -> Generated: ...


def plainly(
    session: Session, logits: NDArray[np.float32], sample: Sampler, *, max_tokens: int, end_ids: Collection[int]
) -> Generated:
    """Generate one token a forward pass."""
    return decode_tokens(session, logits, sample, max_tokens=max_tokens, end_ids=end_ids), None


@dataclass(frozen=True, slots=True)
class Drafting:
    """Generates the same text with a drafter, which knows what was drafted for before, as its schedule does.

    ``count_drafts`` makes what counts them.
    """

    drafter: Drafter
    schedule: Schedule
    count_drafts: CountDrafts = DraftStatistics

    def __call__(
        self,
        session: Session,
        logits: NDArray[np.float32],
        sample: Sampler,
        *,
        max_tokens: int,
        end_ids: Collection[int],
    ) -> Generated:
        """See `Decoding`."""
        statistics = self.count_drafts(drafter=self.drafter.name)
        speculation = Speculation(self.drafter, self.schedule, by_sampling(sample), statistics)
        return decode_drafted(session, logits, speculation, max_tokens=max_tokens, end_ids=end_ids), statistics


@dataclass(frozen=True, slots=True)
class Masking:
    """Generates with masks; ``decode`` says whether their guesses are verified, and ``name`` as well.

    ``count_drafts`` makes what counts them.
    """

    decode: Callable[..., Tokens]
    name: str
    options: MaskOptions
    count_drafts: CountDrafts = DraftStatistics

    def __call__(
        self,
        session: Session,
        logits: NDArray[np.float32],
        sample: Sampler,
        *,
        max_tokens: int,
        end_ids: Collection[int],
    ) -> Generated:
        """See `Decoding`."""
        statistics = self.count_drafts(drafter=self.name)
        ends = {"max_tokens": max_tokens, "end_ids": end_ids}
        return self.decode(session, logits, sample, self.options, statistics=statistics, **ends), statistics


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Generates by another way, whose choices of tokens are recorded."""

    decoding: Decoding
    recorder: Recorder

    def __call__(
        self,
        session: Session,
        logits: NDArray[np.float32],
        sample: Sampler,
        *,
        max_tokens: int,
        end_ids: Collection[int],
    ) -> Generated:
        """See `Decoding`."""
        return self.decoding(session, logits, self.recorder.sampler(sample), max_tokens=max_tokens, end_ids=end_ids)


def recorded(decoding: Decoding, recorder: Recorder) -> Decoding:
    """Return a way to generate that does the same and has it recorded."""
    if isinstance(decoding, Drafting):
        drafter = recorder.drafter(decoding.drafter)
        decoding = replace(decoding, drafter=drafter, count_drafts=recorder.statistics)
    elif isinstance(decoding, Masking):
        decoding = replace(decoding, count_drafts=recorder.statistics)
    return _Recorded(decoding, recorder)


def open_decoding(bundle: Bundle, executor: Executor, options: DraftOptions) -> Decoding:
    """Return what the options call for.

    For a drafter without a fixed number of drafts this measures what forward passes cost, unless that was done before.

    Raises:
        RequestError: the bundle has no draft head for ``mtp``, or its tokenizer no mask.
    """
    if options.drafter == NONE:
        return plainly
    if options.drafter in MASKS:
        return _open_masking(bundle, options)
    drafter = open_drafter(bundle, executor, options.drafter)
    if options.drafts is not None:
        return Drafting(drafter, Always(options.drafts))
    costs = forward_costs(bundle, executor)
    return Drafting(drafter, Measured(costs.forward_s, costs.draft_s if options.drafter == head.NAME else 0.0))


def open_drafter(bundle: Bundle, executor: Executor, name: str) -> Drafter:
    """Return the drafter of that name, which knows no tokens yet; raises RequestError as `open_decoding` does."""
    if name == lookup.NAME:
        return lookup.LookupDrafter()
    if DRAFT_HEAD not in bundle.manifest.graphs:
        raise RequestError(
            f"bundle {bundle.path} has no draft head, which drafter {name!r} needs; use {lookup.NAME!r} or export the "
            f"bundle with a head"
        )
    return head.HeadDrafter(DraftHead(bundle, executor))


def _open_masking(bundle: Bundle, options: DraftOptions) -> Masking:
    mask_id = options.mask_id
    if mask_id is None:
        mask_id = mask.find_mask_id(TextTokenizer.load(bundle.path))
    if not 0 <= mask_id < (vocab_size := bundle.manifest.model.vocab_size):
        raise RequestError(f"mask {mask_id} is outside the vocabulary of {vocab_size}")
    drafts = DEFAULT_MASK_DRAFTS if options.drafts is None else options.drafts
    confidence = mask.DEFAULT_CONFIDENCE if options.confidence is None else options.confidence
    masks = MaskOptions(mask_id=mask_id, most=1 + drafts, confidence=confidence)
    if options.drafter == MASK:
        return Masking(mask.decode_by_verified_masks, mask.VERIFIED, masks)
    return Masking(mask.decode_by_masks, mask.APPROXIMATE, masks)
