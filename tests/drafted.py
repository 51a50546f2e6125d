"""What compiled bundles say with drafts and without them, with all that must not differ between the two."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from tests.toy_model import Scripted

from engram_runtime.bundle import Bundle
from engram_runtime.drafting.drafter import Drafter
from engram_runtime.drafting.mask import VERIFIED, MaskOptions, decode_by_verified_masks
from engram_runtime.drafting.opening import Decoding, Drafting, Masking, open_drafter, plainly
from engram_runtime.drafting.schedule import Always
from engram_runtime.executor import load_executor
from engram_runtime.sampling import Sampler, SamplingOptions, make_sampler
from engram_runtime.session import Session

COUNTS = (1, 2, 3, 5, 7)
GREEDY = SamplingOptions()
LOOKUP, HEAD, MASK, PAST_THE_END, END = "lookup", "mtp", "mask", "past the end", "end"
# They know the text and say all of it, none, two of three tokens, or any; more than was asked for; only the end.
SCRIPTED = ("right", "wrong", "erratic", "random", PAST_THE_END, END)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for."""

    prompt: tuple[int, ...]
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    sampling: SamplingOptions = GREEDY


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A text and what it leaves behind.

    Attributes:
        rows: ``[T, V]`` float32, the logits that each token was chosen from.
        held: the tokens that the session holds.
        states: by name, the bytes of what states hold of these.
    """

    token_ids: Sequence[int]
    rows: NDArray[np.float32]
    held: Sequence[int]
    states: Mapping[str, bytes]


class Model:
    """A bundle with a session of 1 and one of 2 threads, each of which goes on from text to text."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.vocab_size = bundle.manifest.model.vocab_size
        self._sessions = {
            threads: Session.open(bundle, load_executor("tvm", bundle, threads=threads)) for threads in (1, 2)
        }
        self._opened: dict[tuple[str, int], Drafter] = {}
        self._plain: dict[Request, Said] = {}

    def plain(self, request: Request) -> Said:
        """Say a text one token a pass."""
        if request not in self._plain:
            self._plain[request] = said(self._sessions[2], request, plainly)
        return self._plain[request]

    def suited(self, request: Request, drafter: str) -> Request:
        """Return what a drafter is tried with: that request, or with the end that it drafts or goes beyond."""
        if drafter == END:
            return self.ending(request)
        return self.filling(request) if drafter == PAST_THE_END else request

    def ending(self, request: Request) -> Request:
        """Return a request whose text ends where all tokens that occur in it have occurred."""
        text = list(self.plain(request).token_ids)
        return replace(request, end_ids=frozenset([max(text, key=text.index)]))

    def filling(self, request: Request) -> Request:
        """Return a request for as many tokens, the last of which has no room in the context."""
        length = self._bundle.manifest.model.context_length + 1 - request.max_tokens
        prompt = np.random.default_rng(9).integers(self.vocab_size, size=length - len(request.prompt))
        return replace(request, prompt=(*request.prompt, *prompt.tolist()), max_tokens=length + request.max_tokens)

    def drafted(self, request: Request, drafter: str, *, drafts: int, threads: int) -> Said:
        """Say a text with up to so many drafts a pass."""
        if drafter == MASK:
            options = MaskOptions(mask_id=self.vocab_size - 1, most=1 + drafts, confidence=0.0)
            decoding: Decoding = Masking(decode_by_verified_masks, VERIFIED, options)
        else:
            decoding = Drafting(self._drafter(drafter, request, threads), Always(drafts))
        return said(self._sessions[threads], request, decoding)

    def _drafter(self, name: str, request: Request, threads: int) -> Drafter:
        if name in SCRIPTED:
            return Scripted(self._guess(name, request), group=16 if name == PAST_THE_END else 1)
        if (name, threads) not in self._opened:
            executor = self._sessions[threads].executor
            self._opened[name, threads] = open_drafter(self._bundle, executor, name)
        return self._opened[name, threads]

    def _guess(self, name: str, request: Request) -> Callable[[Sequence[int]], int]:
        following, start = self.plain(request).token_ids, len(request.prompt)
        chances: list[int] = (
            np.random.default_rng(len(following)).integers(self.vocab_size, size=len(following) + 99).tolist()
        )

        def guess(text: Sequence[int]) -> int:
            place = len(text) - start
            right = following[place] if place < len(following) else 1
            if name == END:
                return min(request.end_ids)
            if name == "random" or (name == "erratic" and chances[place] % 3 == 0):
                return chances[place]
            return (right + (name == "wrong")) % self.vocab_size

        return guess

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for session in self._sessions.values():
            session.close()


def said(session: Session, request: Request, decoding: Decoding) -> Said:
    """Say a text, with a session that forgets what it holds."""
    rows: list[NDArray[np.float32]] = []
    session.trim(len(session))
    logits, sample = session.prefill(request.prompt), recording(make_sampler(request.sampling), rows)
    tokens, _ = decoding(session, logits, sample, max_tokens=request.max_tokens, end_ids=request.end_ids)
    return Said(token_ids=list(tokens), rows=np.stack(rows), held=list(session.token_ids), states=held_states(session))


def recording(sample: Sampler, rows: list[NDArray[np.float32]]) -> Sampler:
    """Sample, and keep the logits."""

    def sample_and_keep(logits: NDArray[np.float32], token_ids: Sequence[int]) -> int:
        rows.append(logits.copy())
        return sample(logits, token_ids)

    return sample_and_keep


def held_states(session: Session) -> dict[str, bytes]:
    """Return the bytes of what states hold of a session's tokens; behind these, caches may hold what was rejected."""
    states, length = session.states, len(session)
    return {
        spec.name: (states[spec.name][..., :length, :] if spec.rolls_back else states[spec.name]).tobytes()
        for spec in session.state_specs
    }


def assert_same(found: Said, expected: Said) -> None:
    """Hold texts against one another, bit for bit."""
    assert found.token_ids == expected.token_ids
    np.testing.assert_array_equal(found.rows.view(np.uint32), expected.rows.view(np.uint32))
    assert found.held == expected.held
    assert [name for name in expected.states if found.states[name] != expected.states[name]] == []
