"""The bodies of POST /tokenize and /detokenize, as vLLM has them."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from engram_runtime.openai_api.chat_body import MAX_MESSAGES, Message
from engram_runtime.openai_api.fields import Body, Name, TokenIds


class TokenizeBody(Body):
    """A text, or messages that the chat template makes one of."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("wanted either a prompt or messages")
        return self


class DetokenizeBody(Body):
    """Tokens, special ones included."""

    model: Name | None = None
    tokens: TokenIds
