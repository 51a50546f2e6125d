"""An answer as its events come: the chunks of a stream, and the whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engram_runtime.generation import Generation
from engram_runtime.openai_api.errors import as_api_error
from engram_runtime.openai_api.usage import engram_usage, usage
from engram_runtime.serving.events import Event, Failed, Finished, Token

Json = dict[str, Any]
FINISH_REASONS = {"stop": "stop", "stop_string": "stop", "length": "length", "context": "length", "time": "length"}


class Choice(Protocol):
    """One of the texts of an answer."""

    def open(self) -> list[Json]:
        """Return what a stream begins with: entries of a chunk's ``choices``, but for the index."""
        ...

    def push(self, token: Token) -> list[Json]:
        """Take a token and return what a stream tells of it."""
        ...

    def finish(self, end: Finished) -> list[Json]:
        """Take the end and return what a stream tells of it, the reason last."""
        ...

    def whole(self) -> Json:
        """Return the entry of ``choices`` in an answer that isn't streamed, but for the index."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What every chunk of an answer says; ``created`` is in seconds since 1970."""

    id: str
    created: int
    model: str
    fingerprint: str


class Answer:
    """Takes the events of a request's texts.

    Attributes:
        unfinished: how many texts have not ended.
    """

    def __init__(
        self,
        heading: Heading,
        *,
        kind: str,
        chunk_kind: str,
        choices: Sequence[Choice],
        per_prompt: int,
        include_usage: bool,
        tell_engram: bool,
    ) -> None:
        """Begin an answer.

        Args:
            kind, chunk_kind: ``object`` of the whole and of a chunk.
            per_prompt: choices for each prompt.
            include_usage: whether a stream ends with a chunk that has ``usage``.
            tell_engram: whether that has ``usage.engram``.
        """
        self._heading = {"id": heading.id, "created": heading.created, "model": heading.model}
        self._fingerprint = {"system_fingerprint": heading.fingerprint}
        self._kind = {"object": kind}
        self._chunk_kind = {"object": chunk_kind}
        self._choices = choices
        self._per_prompt = per_prompt
        self._no_usage = {"usage": None} if include_usage else {}
        self._tell_engram = tell_engram
        self._generations: list[Generation | None] = [None] * len(choices)
        self.unfinished = len(choices)

    def open(self) -> list[Json]:
        """Return the chunks that a stream begins with."""
        return [self._chunk(index, entry) for index, choice in enumerate(self._choices) for entry in choice.open()]

    def tell(self, index: int, event: Event) -> list[Json]:
        """Take an event of a text and return the chunks it makes.

        Raises:
            ApiError: the text failed.
        """
        choice = self._choices[index]
        match event:
            case Token():
                entries = choice.push(event)
            case Finished():
                self.unfinished -= 1
                self._generations[index] = event.generation
                entries = choice.finish(event)
            case Failed():
                raise as_api_error(event.error)
        return [self._chunk(index, entry) for entry in entries]

    def close(self) -> list[Json]:
        """Return the chunks that a stream ends with."""
        if not self._no_usage:
            return []
        return [{**self._heading, **self._chunk_kind, **self._fingerprint, "choices": [], "usage": self._usage()}]

    def whole(self) -> Json:
        """Return the answer that isn't streamed."""
        choices = [{"index": index, **choice.whole()} for index, choice in enumerate(self._choices)]
        return {
            **self._heading,
            **self._kind,
            **self._fingerprint,
            "choices": choices,
            "usage": self._usage(),
        }

    def _chunk(self, index: int, entry: Json) -> Json:
        choices = [{"index": index, **entry}]
        return {**self._heading, **self._chunk_kind, **self._fingerprint, "choices": choices, **self._no_usage}

    def _usage(self) -> Json:
        generations = [made for made in self._generations if made is not None]
        engram = {"engram": engram_usage(generations)} if self._tell_engram else {}
        return {**usage(generations, self._per_prompt), **engram}
