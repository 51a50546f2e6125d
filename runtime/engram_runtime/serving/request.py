"""What is asked of a serving engine."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from engram_runtime.errors import RequestError
from engram_runtime.sampling import SamplingOptions

DEFAULT_TIME_LIMIT_S = 300.0
MOST_TOP_LOGPROBS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One text to generate.

    Attributes:
        stop: strings before the first of which the text ends.
        frequency_penalty: taken off a token's logit for each time the text so far, without the prompt, has it.
        presence_penalty: taken off once where it has it.
        logit_bias: added to logits, by token id.
        top_logprobs: how many of the likeliest tokens are told of beside each one that is said; None for no
            log-probabilities at all.
        grammar: that the text is to follow, as llguidance takes it; None for any text.
        activity: whether each token is told of with what the tables did before it; such a text is not drafted.
        time_limit_s: seconds after which it ends, the time in the queue included.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingOptions
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    grammar: str | None = None
    activity: bool = False
    time_limit_s: float = DEFAULT_TIME_LIMIT_S

    def __post_init__(self) -> None:
        for name, value in (
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
            *((f"logit_bias of {token_id}", value) for token_id, value in self.logit_bias.items()),
        ):
            if not math.isfinite(value):
                raise RequestError(f"{name} is {value}, wanted a finite number")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs is {self.top_logprobs}, wanted 0 to {MOST_TOP_LOGPROBS}")
        if not self.time_limit_s > 0:
            raise RequestError(f"time_limit_s is {self.time_limit_s}, wanted more than 0")
