"""Log-probabilities as OpenAI spells them."""

from typing import Any

from engram_runtime.serving.events import Token
from engram_runtime.tokenizer import TextTokenizer

LEAST = -9999.0  # OpenAI's for what can't be


def chat_logprob(token: Token, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return an entry of ``choices[].logprobs.content``."""
    assert token.logprob is not None
    top = [_entry(token_id, logprob, tokenizer) for token_id, logprob in token.top]
    return {**_entry(token.token_id, token.logprob, tokenizer), "top_logprobs": top}


def _entry(token_id: int, logprob: float, tokenizer: TextTokenizer) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token_id)
    return {"token": spelled.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(spelled)}


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion, in the columns that OpenAI has for it."""

    def __init__(self, tokenizer: TextTokenizer, offset: int) -> None:
        """Begin with no token; ``offset`` is where the first one stands in the choice's text, in characters."""
        self._tokenizer = tokenizer
        self._offset = offset

    def entry(self, token: Token) -> dict[str, list[Any]]:
        """Return the columns of the next token."""
        assert token.logprob is not None
        offset, self._offset = self._offset, self._offset + len(token.piece)
        top = {self._text(token_id): max(logprob, LEAST) for token_id, logprob in token.top}
        return {
            "tokens": [self._text(token.token_id)],
            "token_logprobs": [max(token.logprob, LEAST)],
            "top_logprobs": [top],
            "text_offset": [offset],
        }

    def _text(self, token_id: int) -> str:
        """Return a token's text; parts of characters as OpenAI writes them, ``bytes:\\xe2\\x82``."""
        spelled = self._tokenizer.token_bytes(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
