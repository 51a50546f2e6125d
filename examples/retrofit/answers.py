"""Answers in full: ordinary questions side by side, and what is said of terms that no cartridge defines."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engram_runtime.bundle import Bundle
from engram_runtime.executor import Executor
from engram_runtime.generation import decode_tokens
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.session import Session
from engram_runtime.tokenizer import TextTokenizer
from examples.retrofit.conditions import Condition
from examples.retrofit.facts import CHAT, OPENING
from examples.retrofit.recall import Share

QUESTIONS = Path(__file__).parent / "questions"
MAX_TOKENS = 48
GREEDY = SamplingOptions()


def questions(name: str) -> list[str]:
    """Return the lines of a file of questions: ``ordinary`` or ``in_passing``."""
    return (QUESTIONS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def answer(session: Session, tokenizer: TextTokenizer, question: str) -> str:
    """Return the greedy answer, at most its first `MAX_TOKENS` tokens."""
    session.trim(len(session))
    logits = session.prefill(tokenizer.encode(CHAT.format(question=question), add_special_tokens=False))
    end_ids = tokenizer.eos_token_ids
    tokens = decode_tokens(session, logits, make_sampler(GREEDY), max_tokens=MAX_TOKENS, end_ids=end_ids)
    return tokenizer.decode(list(tokens)).strip()


def side_by_side(
    bundle: Bundle, executor: Executor, conditions: Sequence[Condition], asked: Sequence[str]
) -> list[dict[str, str]]:
    """Return for each question itself and the answer under each condition, by the condition's name."""
    tokenizer = TextTokenizer.load(bundle.path)
    columns: dict[str, list[str]] = {"question": list(asked)}
    for condition in conditions:
        with condition.session(bundle, executor) as session:
            columns[condition.name] = [answer(session, tokenizer, question) for question in asked]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def unchanged(rows: Sequence[Mapping[str, str]], name: str, other: str) -> Share:
    """Count answers that are word for word the same under two conditions."""
    return Share(sum(row[name] == row[other] for row in rows), len(rows))


def in_form_of_an_entry(rows: Sequence[Mapping[str, str]], name: str) -> Share:
    """Count answers that begin as those of cartridges do."""
    return Share(sum(row[name].startswith(OPENING) for row in rows), len(rows))
