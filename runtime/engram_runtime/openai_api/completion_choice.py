"""A completion as it grows."""

from engram_runtime.openai_api.activity import token_activity
from engram_runtime.openai_api.answer import FINISH_REASONS, Json
from engram_runtime.openai_api.logprobs import CompletionLogprobs
from engram_runtime.serving.events import Finished, Token
from engram_runtime.tokenizer import TextTokenizer


class CompletionChoice:
    """See `engram_runtime.openai_api.answer.Choice`."""

    def __init__(self, tokenizer: TextTokenizer, *, echoed: str, logprobs: bool, activity: bool) -> None:
        """Begin a text.

        Args:
            echoed: what it begins with that the model didn't say.
            logprobs, activity: whether they are told.
        """
        self._end_ids = tokenizer.eos_token_ids
        self._text = [echoed]
        self._spell = CompletionLogprobs(tokenizer, len(echoed)) if logprobs else None
        self._logprobs: Json | None = None
        self._activity: list[Json] | None = [] if activity else None
        self._finish_reason = ""

    def open(self) -> list[Json]:
        return [_entry(text) for text in self._text if text]

    def push(self, token: Token) -> list[Json]:
        self._text.append(token.piece)
        entry = _entry(token.piece)
        if self._spell is not None and token.token_id not in self._end_ids:
            entry["logprobs"] = self._spell.entry(token)
            self._logprobs = _joined(self._logprobs, entry["logprobs"])
        if self._activity is not None:
            self._activity.append(token_activity(token))
            entry["engram"] = {"tokens": self._activity[-1:]}
        return [entry] if token.piece or entry["logprobs"] or self._activity is not None else []

    def finish(self, end: Finished) -> list[Json]:
        self._text.append(end.piece)
        self._finish_reason = FINISH_REASONS[end.generation.finish_reason]
        return [{**_entry(end.piece), "finish_reason": self._finish_reason}]

    def whole(self) -> Json:
        engram = {} if self._activity is None else {"engram": {"tokens": self._activity}}
        text = "".join(self._text)
        return {"text": text, "logprobs": self._logprobs, "finish_reason": self._finish_reason, **engram}


def _joined(columns: Json | None, more: Json) -> Json:
    if columns is None:
        return {name: list(column) for name, column in more.items()}
    for name, column in columns.items():
        column += more[name]
    return columns


def _entry(text: str) -> Json:
    return {"text": text, "logprobs": None, "finish_reason": None}
