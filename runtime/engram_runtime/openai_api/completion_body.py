"""The body of POST /v1/completions."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from engram_runtime.openai_api.fields import TokenIds
from engram_runtime.openai_api.generation_body import GenerationBody

MAX_PROMPTS = 16
MAX_TEXTS = 16
DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_LOGPROBS = 5  # OpenAI's

Prompt = str | Annotated[TokenIds, Field(min_length=1)]
Prompts = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]


def _prompts(value: object) -> object:
    """Make a list of prompts of one: a text, or token ids."""
    single = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
    return [value] if single else value


class CompletionBody(GenerationBody):
    """A request to go on with a text, or with each of several."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "suffix": "put what follows into the prompt",
        "best_of": "ask for n choices with logprobs and choose",
    }

    prompt: Annotated[Prompts, BeforeValidator(_prompts, json_schema_input_type=Prompt | Prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: the prompt's tokens have none here")
        if len(self.prompt) * self.n > MAX_TEXTS:
            raise ValueError(f"prompts times n make {len(self.prompt) * self.n} texts, wanted at most {MAX_TEXTS}")
        return self
