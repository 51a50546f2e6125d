"""A message of the model as it grows."""

from engram_runtime.openai_api.activity import token_activity
from engram_runtime.openai_api.answer import FINISH_REASONS, Json
from engram_runtime.openai_api.logprobs import chat_logprob
from engram_runtime.openai_api.tool_calls import CallReader, Grown
from engram_runtime.serving.events import Finished, Token
from engram_runtime.tokenizer import TextTokenizer


class ChatChoice:
    """See `engram_runtime.openai_api.answer.Choice`."""

    def __init__(self, tokenizer: TextTokenizer, *, call_id: str, calls: bool, logprobs: bool, activity: bool) -> None:
        """Begin a message.

        Args:
            call_id: beginning of the ids of its calls.
            calls: whether the text may have calls.
            logprobs, activity: whether they are told.
        """
        self._tokenizer = tokenizer
        self._call_id = call_id
        self._reader = CallReader() if calls else None
        self._content: list[str] = []
        self._logprobs: list[Json] | None = [] if logprobs else None
        self._activity: list[Json] | None = [] if activity else None
        self._finish_reason = ""

    def open(self) -> list[Json]:
        return [_entry({"role": "assistant", "content": ""})]

    def push(self, token: Token) -> list[Json]:
        more: Json = {}
        if self._logprobs is not None and token.token_id not in self._tokenizer.eos_token_ids:
            self._logprobs.append(chat_logprob(token, self._tokenizer))
            more["logprobs"] = {"content": self._logprobs[-1:], "refusal": None}
        if self._activity is not None:
            self._activity.append(token_activity(token))
            more["engram"] = {"tokens": self._activity[-1:]}
        entries = self._deltas(token.piece, ended=False)
        if more:
            first, *others = entries or [_entry({})]
            return [{**first, **more}, *others]
        return entries

    def finish(self, end: Finished) -> list[Json]:
        entries = self._deltas(end.piece, ended=True)
        self._finish_reason = FINISH_REASONS[end.generation.finish_reason]
        if self._finish_reason == "stop" and self._reader is not None and self._reader.calls:
            self._finish_reason = "tool_calls"
        return [*entries, {**_entry({}), "finish_reason": self._finish_reason}]

    def whole(self) -> Json:
        content = "".join(self._content)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if self._reader is not None and self._reader.calls:
            calls = enumerate(self._reader.calls)
            message["content"] = content or None
            message["tool_calls"] = [self._call(index, call.name, call.arguments) for index, call in calls]
        logprobs = None if self._logprobs is None else {"content": self._logprobs, "refusal": None}
        engram = {} if self._activity is None else {"engram": {"tokens": self._activity}}
        return {"message": message, "logprobs": logprobs, "finish_reason": self._finish_reason, **engram}

    def _deltas(self, piece: str, *, ended: bool) -> list[Json]:
        if self._reader is None:
            grown = [Grown(text=piece)] if piece else []
        else:
            grown = self._reader.push(piece) + (self._reader.finish() if ended else [])
        self._content += [each.text for each in grown]
        return [_entry(self._delta(each)) for each in grown]

    def _delta(self, grown: Grown) -> Json:
        if grown.text:
            return {"content": grown.text}
        if grown.name is not None:
            return {"tool_calls": [{"index": grown.index, **self._call(grown.index, grown.name, "")}]}
        return {"tool_calls": [{"index": grown.index, "function": {"arguments": grown.arguments}}]}

    def _call(self, index: int, name: str, arguments: str) -> Json:
        return {
            "id": f"{self._call_id}_{index}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def _entry(delta: Json) -> Json:
    return {"delta": delta, "logprobs": None, "finish_reason": None}
