"""Drafted text, its logits and the states after it are, bit for bit, those of plain decoding: in every family."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.drafted import COUNTS, HEAD, LOOKUP, MASK, PAST_THE_END, SCRIPTED, Model, Request, assert_same
from tests.test_draft_head import draft_folder
from tests.test_families import NATIVE
from tests.tiny import TinyModel, TinySite, save_site_folder
from tests.tiny_draft import BLOCK
from tests.tiny_families import FAMILIES
from tests.tiny_gemma import CONFIGS, save_gemma
from tests.workshop import SMALL_PASSES, Workshop, random_ids

from engram_runtime.bundle import Bundle
from engram_runtime.drafting import head
from engram_runtime.sampling import SamplingOptions

TEXT = Request(prompt=tuple(random_ids(21)), max_tokens=24)
WARM = SamplingOptions(temperature=0.8, top_p=0.95, repetition_penalty=1.1, seed=3)
QWEN3 = "qwen3"
# With a window, which steps back to copies; without, where small passes are padded.
HEADED, PADDED = "llama with site and head", "llama with head and a site without a window"


def with_site_and_head(workshop: Workshop, *, window: bool = True) -> Bundle:
    def make(folder: Path) -> None:
        save_site_folder(folder, plain, TinySite(convolution=window))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mtp": BLOCK}))
        (folder / "mtp.safetensors").write_bytes((draft_folder(workshop) / "mtp.safetensors").read_bytes())

    plain = workshop.checkpoint(TinyModel())
    both = workshop._once(f"site and head {window}", "both", make)
    return workshop.compiled(
        workshop.bundle(plain, engram=both, quant="int8"), always_parallel=True, decode_tokens=SMALL_PASSES
    )


def native(workshop: Workshop, checkpoint: Path) -> Bundle:
    bundle = workshop.bundle(checkpoint, quant="int8")
    return workshop.compiled(bundle, NATIVE, decode_tokens=(1, 3), prefill_tokens=(8,))


def gemma(workshop: Workshop, name: str) -> Path:
    return workshop._once(name, name, lambda folder: save_gemma(folder, name))


BUNDLES: dict[str, Callable[[Workshop], Bundle]] = {
    HEADED: with_site_and_head,
    PADDED: functools.partial(with_site_and_head, window=False),
    QWEN3: lambda workshop: native(workshop, workshop.checkpoint(TinyModel(family="qwen3", head_dim=32))),
    **{
        name: functools.partial(lambda workshop, family: native(workshop, workshop.family(family)), family=sizes[0])
        for name, sizes in FAMILIES.items()
    },
    **{
        name: functools.partial(lambda workshop, name: native(workshop, gemma(workshop, name)), name=name)
        for name in CONFIGS
    },
}
DEFAULT = (PADDED, "qwen4_exp")  # the last with recurrent states, experts and n-gram rows


@pytest.fixture(autouse=True)
def never_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the head make as many drafts as it is asked for."""
    monkeypatch.setattr(head, "LEAST_LIKELY", 0.0)


@pytest.fixture(scope="module")
def model(workshop: Workshop) -> Iterator[Callable[[str], Model]]:
    with ExitStack() as opened:
        yield functools.cache(lambda name: opened.enter_context(Model(BUNDLES[name](workshop))))


def every_case() -> Iterator[object]:
    for name in BUNDLES:
        marks = [] if name in DEFAULT else [pytest.mark.exhaustive]
        for drafter in (*SCRIPTED, LOOKUP, MASK, *([HEAD] if name in (HEADED, PADDED) else [])):
            yield pytest.param(name, drafter, id=f"{name}-{drafter}", marks=marks)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("drafts", COUNTS)
@pytest.mark.parametrize(("name", "drafter"), [*every_case()])
def test_greedy_text_logits_and_states_are_those_of_plain_decoding(
    model: Callable[[str], Model], name: str, drafter: str, drafts: int, threads: int
) -> None:
    tried = model(name)
    request = tried.suited(TEXT, drafter)
    assert_same(tried.drafted(request, drafter, drafts=drafts, threads=threads), tried.plain(request))


@pytest.mark.parametrize("drafts", [16, 63])
@pytest.mark.parametrize("drafter", ["right", "wrong", PAST_THE_END, LOOKUP, HEAD])
def test_more_drafts_than_a_compiled_pass_holds_change_nothing(
    model: Callable[[str], Model], drafter: str, drafts: int
) -> None:
    tried = model(HEADED)  # whose largest pass is of 8 tokens
    request = tried.suited(dataclasses.replace(TEXT, max_tokens=100), drafter)
    assert_same(tried.drafted(request, drafter, drafts=drafts, threads=2), tried.plain(request))


@pytest.mark.parametrize("drafts", [2, 7])
@pytest.mark.parametrize("drafter", ["erratic", LOOKUP, HEAD, MASK])
def test_drawn_text_of_a_seed_is_that_of_plain_decoding(
    model: Callable[[str], Model], drafter: str, drafts: int
) -> None:
    tried, request = model(HEADED), dataclasses.replace(TEXT, sampling=WARM)
    assert_same(tried.drafted(request, drafter, drafts=drafts, threads=2), tried.plain(request))
