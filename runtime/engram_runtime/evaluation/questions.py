"""Questions whose answers are scored, from a JSONL file.

A line is one of these, other keys of it are left alone:

    {"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
    {"question": "What is the capital of France?", "choices": ["Paris", "Rome"], "answer": "Paris"}
    {"text": "The capital of France is", "target": " Paris"}

``answer`` is a choice or its place, from 0. A choice follows a ``prompt``, a ``target`` its ``text`` as they stand; a
``question`` is asked as ``Question: {question}\\nAnswer:``, and choices follow after a space.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_runtime.errors import BundleError, RequestError
from engram_runtime.evaluation.continuations import Prompt
from engram_runtime.strict_json import Fields, parse_json_object
from engram_runtime.tokenizer import TextTokenizer

QUESTION, SPACE = "Question: {}\nAnswer:", " "


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and what may follow it.

    Attributes:
        line: where it stands in its file, from 1.
        answer: which choice is right, or None for a cloze, whose one choice is its target.
        space: what stands between the prompt and a choice.
    """

    line: int
    prompt: str
    choices: Sequence[str]
    answer: int | None
    space: str = ""

    @property
    def kind(self) -> str:
        """``choices`` or ``cloze``."""
        return "cloze" if self.answer is None else "choices"

    def encode(self, tokenizer: TextTokenizer, context_length: int) -> Prompt:
        """Return it as tokens; raises RequestError where nothing stands before a choice, or it is too long."""
        prompt = Prompt.of(tokenizer, self.prompt, [self.space + choice for choice in self.choices])
        if not prompt.token_ids:
            raise RequestError(f"line {self.line} has no token before its choices; give it a longer prompt")
        if prompt.longest > context_length:
            raise RequestError(
                f"line {self.line} has {prompt.longest} tokens, the context holds {context_length}; shorten it"
            )
        return prompt


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read a file's questions, the first ``limit`` of them; empty lines are none.

    Raises:
        RequestError: there are none, or a line isn't one, which is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise RequestError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise RequestError(f"{path} has no questions; it takes one JSON object a line")
    return [_question(path, number, line) for number, line in numbered[:limit]]


def _question(path: Path, line: int, text: str) -> Question:
    try:
        return _parse(line, parse_json_object(text, "it"))
    except BundleError as error:
        raise RequestError(f"line {line} of {path} is no question: {error}") from error


def _parse(line: int, values: Mapping[str, object]) -> Question:
    fields = Fields(values, "it")
    if fields.given("target"):
        target = fields.take("target", str)
        _check_choices([target], least=1)
        return Question(line=line, prompt=fields.take("text", str), choices=[target], answer=None)
    choices = fields.texts("choices")
    _check_choices(choices, least=2)
    answer = _place(values.get("answer"), choices)
    if fields.given("question"):
        prompt = QUESTION.format(fields.take("question", str))
        return Question(line=line, prompt=prompt, choices=choices, answer=answer, space=SPACE)
    return Question(line=line, prompt=fields.take("prompt", str), choices=choices, answer=answer)


def _check_choices(choices: Sequence[str], *, least: int) -> None:
    if len(choices) < least:
        raise BundleError(f"it has {len(choices)} choices, expected at least {least}")
    if "" in choices:
        raise BundleError("a choice or target of it is empty, expected text to score")


def _place(answer: object, choices: Sequence[str]) -> int:
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if type(answer) is int and 0 <= answer < len(choices):
        return answer
    raise BundleError(f"its answer is {reprlib.repr(answer)}, expected one of its choices or a place from 0")
