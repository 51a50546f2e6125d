"""What requests for a chat and for a completion have in common."""

import sys
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from engram_runtime.openai_api.errors import ApiError
from engram_runtime.openai_api.fields import MAX_TOKEN_ID, Body, Fields, Name, StopStrings
from engram_runtime.sampling import MAX_PENALTY, MIN_PENALTY, SamplingOptions
from engram_runtime.serving.engine_protocol import Engine

MAX_CHOICES = 4
MAX_BIASES = 256
MAX_ID_DIGITS = len(str(MAX_TOKEN_ID))
MAX_TOP_K = 1 << 20
OPENAI_TEMPERATURE = 1.0

TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Fields):
    """``include_obfuscation`` is taken and ignored: it pads chunks."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Extras(Fields):
    """The field ``engram``: what is told beyond what OpenAI tells.

    Attributes:
        usage: what tables, drafts and experts did for the answer, as ``usage.engram``.
        activity: what tables did for each token, as ``choices[].engram``.
    """

    usage: bool = False
    activity: bool = False


class GenerationBody(Body):
    """Fields of chats and completions alike; unset ones are None or have OpenAI's default."""

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            *("user", "metadata", "store", "service_tier", "safety_identifier"),
            *("prompt_cache_key", "prompt_cache_retention"),
        }
    )

    model: Name
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_PENALTY, le=MAX_PENALTY)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES, default_factory=dict)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[StopStrings, Field(default_factory=list)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    engram: Extras = Extras()

    @field_validator("logit_bias")
    @classmethod
    def _biases_are_of_tokens(cls, biases: dict[str, float]) -> dict[str, float]:
        for key in biases:
            # The length first: Python refuses to read thousands of digits.
            if len(key) > MAX_ID_DIGITS or not (key.isascii() and key.isdecimal() and int(key) <= MAX_TOKEN_ID):
                raise ValueError(f"wanted token ids as keys, not {key[:20]!r}")
        return biases

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def biases(self, engine: Engine) -> dict[int, float]:
        """Return ``logit_bias`` by token id; raises ApiError where one is outside the vocabulary."""
        by_id = {int(key): value for key, value in self.logit_bias.items()}
        check_token_ids(list(by_id), engine, "logit_bias")
        return by_id

    def sampling(self, engine: Engine, choice: int) -> SamplingOptions:
        """Return how a choice is drawn: as asked, else as the model's makers recommend, else by OpenAI's defaults."""
        given = {
            "temperature": self.temperature,
            "top_p": None if self.top_p is None else max(self.top_p, sys.float_info.min),  # 0 keeps the likeliest
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        asked = {name: value for name, value in given.items() if value is not None}
        defaults = {"temperature": OPENAI_TEMPERATURE, **engine.tokenizer.sampling_defaults}
        seed = None if self.seed is None else self.seed % 2**64 + choice  # those of `SamplingOptions` are from 0
        return SamplingOptions(**{**defaults, **asked}, seed=seed)  # type: ignore[arg-type]


def check_token_ids(token_ids: list[int], engine: Engine, param: str) -> None:
    """Raise ApiError where an id is outside the vocabulary."""
    if (largest := max(token_ids, default=0)) >= engine.vocab_size:
        raise ApiError(
            f"{param} has token {largest}, the vocabulary ends at {engine.vocab_size - 1}",
            param=param,
            code="invalid_value",
        )


def token_limit(prompt_tokens: int, asked: int | None, engine: Engine, *, prompt_param: str, param: str) -> int:
    """Return how many tokens may come after a prompt: as many as asked for and as the context has room for.

    Raises:
        ApiError: the prompt fills the context, or more is asked for than the whole context holds.
    """
    context = engine.context_length
    if prompt_tokens >= context:
        raise ApiError(
            f"the prompt has {prompt_tokens} tokens, of a context of {context} one must be left; shorten it",
            param=prompt_param,
            code="context_length_exceeded",
        )
    if asked is not None and asked > context:
        raise ApiError(
            f"{param} is {asked}, the context holds {context} tokens", param=param, code="context_length_exceeded"
        )
    room = context - prompt_tokens
    return room if asked is None else min(asked, room)
