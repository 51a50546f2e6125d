"""The contract of drafts: 50 prompts of 128 tokens, every drafter, number of drafts and threads, bit for bit."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tests.drafted import COUNTS, END, HEAD, LOOKUP, MASK, SCRIPTED, Model, Request, assert_same
from tests.test_drafted_bundles import BUNDLES, HEADED, PADDED
from tests.tiny import CONTEXT, VOCAB
from tests.workshop import Workshop

from engram_runtime.bundle import Bundle
from engram_runtime.drafting import head
from engram_runtime.library import find_library
from engram_runtime.tokenizer import TextTokenizer
from engram_runtime.trust.records import COMPILED, keep_record
from examples.retrofit.prompts import read_prompts

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

PROMPTS, DEMO_PROMPTS, TOKENS = 50, 4, 128
DEMO = Path(__file__).parents[1] / "build" / "demo.engram"
DRAFTERS = (*SCRIPTED, LOOKUP, HEAD, MASK)
ENDED = ("right", END, HEAD, MASK)  # are tried with an end token inside a draft as well


@pytest.fixture(autouse=True)
def never_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the head make as many drafts as it is asked for."""
    monkeypatch.setattr(head, "LEAST_LIKELY", 0.0)


@pytest.fixture(scope="module")
def model(workshop: Workshop) -> Iterator[Callable[[str], Model]]:
    with ExitStack() as opened:
        yield functools.cache(lambda name: opened.enter_context(Model(BUNDLES[name](workshop))))


def prompts(most: int) -> list[tuple[int, ...]]:
    """Return prompts of 1 to ``most`` tokens."""
    rng = np.random.default_rng(8)
    return [tuple(rng.integers(VOCAB, size=rng.integers(1, most + 1)).tolist()) for _ in range(PROMPTS)]


def requests(model: Model, drafter: str) -> list[Request]:
    """Return what a drafter is tried with: texts of 128 tokens, cut or filling the context, and those with an end."""
    plain = [Request(prompt=ids, max_tokens=TOKENS) for ids in prompts(CONTEXT + 1 - TOKENS)]
    whole = plain if drafter == END else [model.suited(request, drafter) for request in plain]
    assert [len(model.plain(request).token_ids) for request in whole] == [TOKENS] * PROMPTS
    ended = [model.ending(request) for request in whole] if drafter in ENDED else []
    return ended if drafter == END else [*whole, *ended]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("drafts", COUNTS)
@pytest.mark.parametrize(
    ("name", "drafter"), [*((PADDED, drafter) for drafter in DRAFTERS), (HEADED, "erratic"), (HEADED, HEAD)]
)
def test_drafts_change_no_bit_of_50_texts(
    model: Callable[[str], Model], name: str, drafter: str, drafts: int, threads: int
) -> None:
    tried = model(name)
    for request in requests(tried, drafter):
        assert_same(tried.drafted(request, drafter, drafts=drafts, threads=threads), tried.plain(request))


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Model, list[Request]]]:
    """SmolLM2 with its site and head, and prompts of each kind."""
    if not DEMO.exists():
        pytest.skip(f"there is no {DEMO}; make demo builds it")
    bundle = Bundle.open(DEMO)
    keep_record(find_library(bundle)[1], COMPILED, DEMO)  # by make demo; tests have records of their own
    tokenizer = TextTokenizer.load(bundle.path)
    asked = read_prompts()
    texts = [prompt.rendered() for prompt in asked[:: len(asked) // DEMO_PROMPTS][:DEMO_PROMPTS]]
    with Model(bundle) as model:
        yield model, [Request(prompt=tuple(tokenizer.encode(text)), max_tokens=TOKENS) for text in texts]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("drafts", COUNTS)
@pytest.mark.parametrize("drafter", ["erratic", LOOKUP, HEAD, MASK])
def test_drafts_change_no_bit_of_a_real_models_texts(
    demo: tuple[Model, list[Request]], drafter: str, drafts: int, threads: int
) -> None:
    model, asked = demo
    for request in asked:
        assert_same(model.drafted(request, drafter, drafts=drafts, threads=threads), model.plain(request))
