"""Drafted text and its logits are, bit for bit, those of plain decoding: every family, drafter, number, and threads."""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.test_draft_head import draft_folder
from tests.test_families import NATIVE, compiled
from tests.tiny import TinyModel, TinySite, save_site_folder
from tests.tiny_draft import BLOCK
from tests.tiny_families import FAMILIES
from tests.tiny_gemma import CONFIGS, save_gemma
from tests.toy_model import Scripted
from tests.workshop import Workshop, random_ids

from engram_runtime.bundle import Bundle
from engram_runtime.drafting.acceptance import by_sampling
from engram_runtime.drafting.drafter import Drafter
from engram_runtime.drafting.opening import open_drafter
from engram_runtime.drafting.schedule import Always
from engram_runtime.drafting.speculate import Speculation, decode_drafted
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.executor import Executor, load_executor
from engram_runtime.generation import decode_tokens
from engram_runtime.sampling import Sampler, SamplingOptions, make_sampler
from engram_runtime.session import Session

PROMPT_TOKENS, TOKENS = 21, 24
COUNTS = (1, 2, 3, 5, 7)
SCRIPTED = ("right", "wrong", "erratic")
GREEDY, WARM = SamplingOptions(), SamplingOptions(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=3)
HEADED = "llama with site and head"


def with_site_and_head(workshop: Workshop) -> Bundle:
    def make(folder: Path) -> None:
        save_site_folder(folder, plain, TinySite())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mtp": BLOCK}))
        (folder / "mtp.safetensors").write_bytes((draft_folder(workshop) / "mtp.safetensors").read_bytes())

    plain = workshop.checkpoint(TinyModel())
    both = workshop._once("site and head", "both", make)
    return workshop.compiled(workshop.bundle(plain, engram=both, quant="int8"), always_parallel=True)


def gemma(workshop: Workshop, name: str) -> Bundle:
    checkpoint = workshop._once(name, name, lambda folder: save_gemma(folder, name))
    bundle = workshop.bundle(checkpoint, quant="int8")
    return workshop.compiled(bundle, NATIVE, decode_tokens=(1,), prefill_tokens=(8,))


BUNDLES: dict[str, Callable[[Workshop], Bundle]] = {
    HEADED: with_site_and_head,
    **{
        name: functools.partial(lambda workshop, family: compiled(workshop, FAMILIES[family][0], "int8"), family=name)
        for name in FAMILIES
    },
    **{name: functools.partial(gemma, name=name) for name in CONFIGS},
}
DEFAULT = (HEADED, "qwen4_exp")  # a window and a head; recurrent states, experts and n-gram rows


@dataclass(slots=True)
class Taken:
    """Tokens and the logits ``[V]`` that each was chosen from."""

    token_ids: list[int]
    rows: list[NDArray[np.float32]]


class Model:
    """A bundle and what plain decoding makes of a prompt."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.executors = {threads: load_executor("tvm", bundle, threads=threads) for threads in (1, 2)}
        self.prompt = random_ids(PROMPT_TOKENS)

    @functools.cache  # noqa: B019
    def plain(self, sampling: SamplingOptions) -> Taken:
        with Session.open(self.bundle, self.executors[2]) as session:
            logits, taken = session.prefill(self.prompt), Taken([], [])
            sample = recording(make_sampler(sampling), taken)
            taken.token_ids = list(decode_tokens(session, logits, sample, max_tokens=TOKENS, end_ids=()))
        return taken

    def drafted(self, drafter: Drafter, drafts: int, sampling: SamplingOptions, threads: int) -> Taken:
        with Session.open(self.bundle, self.executors[threads]) as session:
            logits, taken = session.prefill(self.prompt), Taken([], [])
            choose = by_sampling(recording(make_sampler(sampling), taken))
            speculation = Speculation(drafter, Always(drafts), choose, DraftStatistics(drafter=drafter.name))
            taken.token_ids = list(decode_drafted(session, logits, speculation, max_tokens=TOKENS, end_ids=()))
            assert list(session.token_ids) == [*self.prompt, *taken.token_ids[:-1]]
        return taken

    def drafter(self, name: str, executor: Executor, sampling: SamplingOptions) -> Drafter:
        """Return a drafter; those of `SCRIPTED` know the text."""
        if name not in SCRIPTED:
            return open_drafter(self.bundle, executor, name)
        following = self.plain(sampling).token_ids

        def guess(text: Sequence[int]) -> int:
            place = len(text) - PROMPT_TOKENS
            token_id = following[place] if place < TOKENS else 1
            good = name == "right" or (name == "erratic" and place % 3 != 0)
            return token_id if good else (token_id + 1) % self.bundle.manifest.model.vocab_size

        return Scripted(guess)


def recording(sample: Sampler, taken: Taken) -> Sampler:
    def sample_and_keep(logits: NDArray[np.float32], token_ids: Sequence[int]) -> int:
        taken.rows.append(logits.copy())
        return sample(logits, token_ids)

    return sample_and_keep


@pytest.fixture(scope="module")
def model(workshop: Workshop) -> Callable[[str], Model]:
    return functools.cache(lambda name: Model(BUNDLES[name](workshop)))


def assert_same(found: Taken, expected: Taken) -> None:
    assert found.token_ids == expected.token_ids
    np.testing.assert_array_equal(np.stack(found.rows).view(np.uint32), np.stack(expected.rows).view(np.uint32))


def every_case() -> Iterator[object]:
    for name in BUNDLES:
        marks = [] if name in DEFAULT else [pytest.mark.exhaustive]
        for drafter in (*SCRIPTED, "lookup", *(["mtp"] if name == HEADED else [])):
            yield pytest.param(name, drafter, id=f"{name}-{drafter}", marks=marks)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("drafts", COUNTS)
@pytest.mark.parametrize(("name", "drafter"), [*every_case()])
def test_greedy_text_and_logits_are_those_of_plain_decoding(
    model: Callable[[str], Model], name: str, drafter: str, drafts: int, threads: int
) -> None:
    tried = model(name)
    found = tried.drafted(tried.drafter(drafter, tried.executors[threads], GREEDY), drafts, GREEDY, threads)
    assert_same(found, tried.plain(GREEDY))


@pytest.mark.parametrize("drafts", [2, 7])
@pytest.mark.parametrize("drafter", ["erratic", "lookup", "mtp"])
def test_drawn_text_of_a_seed_is_that_of_plain_decoding(
    model: Callable[[str], Model], drafter: str, drafts: int
) -> None:
    tried = model(HEADED)
    found = tried.drafted(tried.drafter(drafter, tried.executors[2], WARM), drafts, WARM, 2)
    assert_same(found, tried.plain(WARM))
