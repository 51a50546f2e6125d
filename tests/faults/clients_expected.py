"""Requests whose texts are known beforehand, as they are when nothing else runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from tests.faults.clients_http import CHAT, chat_body
from tests.faults.requests_toy import Hashing, ToyEngine, toy_bundle
from tests.toy_serving import said_alone

from engram_runtime.openai_api.job import prepare
from engram_runtime.openai_api.json_body import parse_body
from engram_runtime.session import Session


@dataclass(frozen=True, slots=True)
class Known:
    """A request and its text."""

    body: bytes
    text: str
    stream: bool


def known_texts(count: int, random: Random, *, engine: ToyEngine | None = None) -> Sequence[Known]:
    """Make so many requests, with prompts of a few tokens up to most of the context."""
    quiet = engine or ToyEngine()
    with TemporaryDirectory() as folder, quiet.quick().open(Path(folder)) as opened:
        session = Session(toy_bundle(Path(folder), quiet.context), Hashing(), [])
        known = []
        for _ in range(count):
            prompt = "".join(random.choices("abcdefgh ", k=random.choice((3, 30, 150))))
            length = random.choice((1, 8, 40))
            stream = random.random() < 0.8
            body = chat_body(prompt, max_tokens=length, seed=random.randrange(2**32), stream=stream)
            (request,) = prepare({"toy": opened}, CHAT, parse_body(body)).requests
            known.append(Known(body, said_alone(session, opened.tokenizer, request).text, stream))
    return known
