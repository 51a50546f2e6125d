"""Calls of tools, taken out of an answer's text as it comes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from engram_runtime.openai_api.grammars import ARGUMENTS_END, ARGUMENTS_START, CALL_END, CALL_START, NAME_START


@dataclass(slots=True)
class Call:
    """A call so far; ``arguments`` is the JSON text of an object, whole if the answer wasn't cut off."""

    name: str
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Grown:
    """What is new: text before calls, or more of the arguments of call ``index``, whose beginning has ``name``."""

    text: str = ""
    index: int = -1
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class CallReader:
    """Reads an answer that follows `grammars.answer_grammar`, which says exactly where a call begins and ends.

    Attributes:
        text: what stands before the first call, but for white space between them.
        calls: whose names are known.
    """

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    _unread: str = ""
    _in_arguments: bool = False

    def push(self, piece: str) -> list[Grown]:
        """Add a piece and return what is certain now."""
        self._unread += piece
        return list(self._read())

    def finish(self) -> list[Grown]:
        """Return what was held back and is text or arguments all the same; an unfinished beginning is dropped."""
        rest, self._unread = self._unread, ""
        if self._in_arguments and rest and not _is_json(self.calls[-1].arguments):
            self.calls[-1].arguments += rest
            return [Grown(index=len(self.calls) - 1, arguments=rest)]
        if self.calls or rest.lstrip("\n").startswith(CALL_START):
            return []
        self.text += rest
        return [Grown(text=rest)] if rest else []

    def _read(self) -> Iterator[Grown]:
        while self._unread:
            before = len(self._unread), self._in_arguments
            yield from self._read_arguments() if self._in_arguments else self._read_beginning()
            if before == (len(self._unread), self._in_arguments):
                return

    def _read_beginning(self) -> Iterator[Grown]:
        text, start, rest = self._unread.partition(CALL_START + NAME_START)
        name, quote, arguments = rest.partition(ARGUMENTS_START)
        if start and quote:
            yield from self._pass_on(text.removesuffix("\n"))
            self.calls.append(Call(name))
            self._unread, self._in_arguments = arguments, True
            yield Grown(index=len(self.calls) - 1, name=name)
        elif not start and not self.calls:
            start = CALL_START + NAME_START
            certain = len(text) - max(_beginning_at_end(text, start), _beginning_at_end(text, "\n" + start))
            self._unread = text[certain:]
            yield from self._pass_on(text[:certain])

    def _pass_on(self, text: str) -> Iterator[Grown]:
        text = "" if self.calls else text
        self.text += text
        if text:
            yield Grown(text=text)

    def _read_arguments(self) -> Iterator[Grown]:
        arguments, end, rest = self._unread.partition(ARGUMENTS_END + CALL_END)
        if not end:
            certain = len(arguments) - _beginning_at_end(arguments, ARGUMENTS_END + CALL_END)
            arguments, rest = arguments[:certain], arguments[certain:]
        self._unread, self._in_arguments = rest, not end
        self.calls[-1].arguments += arguments
        if arguments:
            yield Grown(index=len(self.calls) - 1, arguments=arguments)


def _beginning_at_end(text: str, wanted: str) -> int:
    """Return the length of the longest end of a text with which what is wanted may begin."""
    sizes = range(min(len(text), len(wanted) - 1), 0, -1)
    return next((size for size in sizes if wanted.startswith(text[-size:])), 0)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
