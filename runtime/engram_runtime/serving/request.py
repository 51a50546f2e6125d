"""What is asked of a serving engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from engram_runtime.sampling import SamplingOptions

DEFAULT_TIME_LIMIT_S = 300.0


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
