"""Continuations of texts with drafts and without, timed in the runner's own process."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What followed a text.

    Attributes:
        token_ids: that were chosen.
        seconds: from the first of them to the last.
        drafts: what they came to; each forward pass without any says a token.
        experts: that these passes read, None where that isn't counted or there are none.
    """

    token_ids: tuple[int, ...]
    seconds: float
    drafts: DraftStatistics
    experts: int | None


class Continuing(Protocol):
    """A runner that generates."""

    def go_on(self, prompt: str, *, prompt_tokens: int, tokens: int, drafts: DraftOptions) -> Continuation:
        """Choose up to ``1 + tokens`` likeliest tokens after the first ``prompt_tokens`` of a text, to its end.

        Raises:
            RequestError: what the drafts need isn't there.
        """
        ...


def drafted(
    runner: Continuing, *, prompts: Mapping[str, str], prompt_tokens: int, tokens: int, drafts: Mapping[str, Any]
) -> dict[str, Any]:
    """Go on from each text plainly and with drafts, one right after the other and in turn the first.

    Args:
        prompts: by name.
        drafts: fields of `DraftOptions`.

    Returns:
        By name, ``plain`` and ``drafted``, of each ``tokens``, the ``seconds`` they took, ``experts`` and ``drafts``;
        and whether they are the ``same``.

    Raises:
        RequestError: a text is at its end with the first token; and as `Continuing.go_on`.
    """
    options = DraftOptions(**drafts)
    found = {}
    for place, (name, prompt) in enumerate(prompts.items()):
        ways = [("plain", NO_DRAFTS), ("drafted", options)]
        made = {
            way: runner.go_on(prompt, prompt_tokens=prompt_tokens, tokens=tokens, drafts=each)
            for way, each in (ways if place % 2 == 0 else reversed(ways))
        }
        if any(len(each.token_ids) < 2 for each in made.values()):
            raise RequestError(f"the model ends text {name} with its first token; give another by --prompt-file")
        same = made["plain"].token_ids == made["drafted"].token_ids
        found[name] = {**{way: _figures(each) for way, each in made.items()}, "same": same}
    return found


def _figures(made: Continuation) -> dict[str, Any]:
    return {
        "tokens": len(made.token_ids) - 1,
        "seconds": made.seconds,
        "drafts": asdict(made.drafts),
        "experts": made.experts,
    }
