"""Prompts of four kinds that a model answers by itself to make training text for its draft head.

Chat questions are made of wordings and everyday topics, definitions of nouns, code of tasks and of the openings of
functions in the standard library, prose of opening sentences. What the head is tested on is written by hand, stands in
`test_prompts.jsonl` and is left out here.
"""

import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

DOMAINS = ("chat", "definitions", "code", "prose")
TEST_PROMPTS = Path(__file__).with_name("test_prompts.jsonl")
PARTS = Path(__file__).with_name("prompt_parts.json")
DEFINITION_WORDINGS = (
    "What is {}?",
    "Define {}.",
    "What does {} mean?",
    "Explain {} briefly.",
    "Write an encyclopaedia entry about {}.",
    "Tell me about {}.",
    "Give a short definition of {}.",
    "What should a student know about {}?",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to continue; `chat` texts are a user's turn, others are continued as they are."""

    text: str
    domain: str
    chat: bool

    def rendered(self) -> str:
        """Return the text as the model reads it, ChatML without a system prompt."""
        if not self.chat:
            return self.text
        return f"<|im_start|>user\n{self.text}<|im_end|>\n<|im_start|>assistant\n"


def read_prompts(path: Path = TEST_PROMPTS) -> list[Prompt]:
    """Read a file with one JSON object a line: ``text``, ``domain`` and ``chat``."""
    return [Prompt(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def quotations(wordnet: Mapping[str, str], count: int, seed: int = 0) -> list[str]:
    """Choose example sentences of WordNet's glosses, of six words and more, with a capital and a full stop."""
    found = {
        f"{quoted[0].upper()}{quoted[1:]}."
        for name, data in wordnet.items()
        if name.startswith("data.")
        for quoted in re.findall(r'"([^"]+[a-z])"', data)
        if quoted.count(" ") >= 5
    }
    return random.Random(seed).sample(sorted(found), count)


def training_prompts(nouns: Sequence[str], sentences: Sequence[str], count: int, seed: int = 0) -> list[Prompt]:
    """Choose `count` prompts: 45 % chat, 15 % definitions, 20 % code, 20 % prose, in random order, the chats first.

    nouns: subjects of definitions. sentences: openings of prose.
    """
    draw = random.Random(seed)
    parts: dict[str, list[str]] = json.loads(PARTS.read_text(encoding="utf-8"))
    tested = {prompt.text for prompt in read_prompts()}
    sources = {
        "chat": [
            *_filled(parts["wordings"], parts["topics"]),
            *_filled(parts["object_wordings"], parts["objects"]),
            *_sums(draw),
        ],
        "definitions": _filled(DEFINITION_WORDINGS, nouns),
        "code": [
            *_filled(parts["code_wordings"], parts["code_tasks"]),
            *_functions(Path(sysconfig.get_path("stdlib"))),
        ],
        "prose": [*sentences, *_openings(parts)],
    }
    shares = {"chat": 0.45, "definitions": 0.15, "code": 0.2, "prose": 0.2}
    chosen: list[Prompt] = []
    for domain, texts in sources.items():
        fresh = [text for text in dict.fromkeys(texts) if text not in tested]
        picked = draw.sample(fresh, min(len(fresh), round(count * shares[domain])))
        chosen += [Prompt(text, domain, _is_chat(domain, text)) for text in picked]
    rest = chosen[round(count * shares["chat"] * 0.4) :]
    draw.shuffle(rest)
    return chosen[: len(chosen) - len(rest)] + rest


def _is_chat(domain: str, text: str) -> bool:
    return domain in ("chat", "definitions") or (domain == "code" and "\n" not in text)


def _filled(wordings: Sequence[str], subjects: Sequence[str]) -> list[str]:
    return [wording.format(subject) for wording, subject in product(wordings, subjects)]


def _sums(draw: random.Random) -> Iterator[str]:
    for _ in range(150):
        a, b, c = draw.randint(2, 90), draw.randint(2, 40), draw.randint(2, 12)
        yield f"What is {a} plus {b}? Explain each step."
        yield f"A box holds {c} pencils and costs {b} dollars. How much do {c * a} pencils cost?"
        yield f"A train travels {a} kilometres in {c} hours. What is its average speed?"
        yield f"Anna has {a} apples and gives {c} of them to each of {b} friends. Is that enough? Explain."


def _openings(parts: dict[str, list[str]]) -> list[str]:
    return [
        opening.format(name=name, place=place)
        for opening, name, place in product(parts["openings"], parts["names"], parts["places"])
    ]


def _functions(folder: Path) -> Iterator[str]:
    """Yield the first lines of functions and classes, cut in the middle of their bodies."""
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        written = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines = written[node.lineno - 1 : node.end_lineno]
                yield "\n".join(lines[: 2 + len(lines[0]) % 5]) + "\n"
