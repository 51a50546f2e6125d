"""``--draft``: the same text, with figures of what drafts came to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests.conftest import Command
from tests.toy_model import Scripted
from tests.workshop import THREADS, Workshop, copy_folder

from engram_runtime import LLM, Generation, SamplingOptions
from engram_runtime.commands.run import summary
from engram_runtime.drafting.opening import Drafting
from engram_runtime.drafting.options import DraftOptions
from engram_runtime.drafting.schedule import Always
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.tables.counters import TableCounters

PROMPT = "The tide comes in"
LOOKUP = ("--draft", "lookup", "--draft-k", 3)
SAMPLING: dict[str, tuple[tuple[object, ...], SamplingOptions]] = {
    "greedy": ((), SamplingOptions()),
    "drawn": (("--temperature", 0.8, "--seed", 4), SamplingOptions(temperature=0.8, seed=4)),
}


@pytest.fixture(scope="module")
def bundle(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: costs are stored beside its library."""
    return copy_folder(workshop.ready().path, tmp_path_factory.mktemp("drafts") / "bundle")


@pytest.mark.parametrize("number", [("--draft-k", 3), ("--draft-k", "auto"), ("--draft-k", 0), ()])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_run_says_the_same_with_drafts(
    bundle: Path, command: Command, number: tuple[object, ...], sampling: str
) -> None:
    line = ("engram", "run", bundle, PROMPT, "--max-tokens", 100, *SAMPLING[sampling][0], "--json")
    plain, drafted = command(*line).json, command(*line, "--draft", "lookup", *number).json
    assert drafted["token_ids"] == plain["token_ids"]
    assert (drafted["text"], drafted["finish_reason"]) == (plain["text"], plain["finish_reason"])
    assert "drafts" not in plain
    assert drafted["drafts"]["draft"] == "lookup"
    assert drafted["drafts"]["forwards"] == 99 - drafted["drafts"]["accepted"]


def test_figures_are_those_of_the_api(bundle: Path, command: Command) -> None:
    found = command("engram", "run", bundle, PROMPT, "--max-tokens", 100, *LOOKUP, "--json").json["drafts"]
    with LLM(bundle, threads=THREADS, drafts=DraftOptions(drafter="lookup", drafts=3)) as llm:
        made = llm.generate(PROMPT, max_tokens=100)
    assert made.drafts is not None
    assert found == made.drafts.figures()
    assert found["drafted"] > 0


def test_the_summary_and_stats_tell_of_drafts(bundle: Path, command: Command) -> None:
    shown = command("engram", "run", bundle, PROMPT, "--max-tokens", 40, *LOOKUP).err.splitlines()[-1]
    assert " tokens a forward pass, " in shown
    lines = command(
        "engram", "chat", bundle, "--max-tokens", 100, *LOOKUP, stdin="the tide\n/stats\n/exit\n"
    ).out.splitlines()
    assert lines[-2].startswith("lookup drafts right, one by one: ")


def generation(drafts: DraftStatistics | None, tables: Mapping[str, TableCounters]) -> Generation:
    return Generation(
        text="ab",
        token_ids=(1, 2),
        finish_reason="length",
        prompt_tokens=4,
        prefilled_tokens=4,
        prefill_s=0.5,
        ttft_s=0.5,
        decode_s=0.1,
        tables=tables,
        drafts=drafts,
    )


def test_the_summary_in_full() -> None:
    drafts = DraftStatistics(drafter="mtp", forwards=20, tokens=34, drafted=[18, 18], accepted=[10, 4])
    tables = {"a": TableCounters(early=30, early_used=24, early_ready=20), "b": TableCounters(early_used=1)}
    assert summary(generation(drafts, tables)) == (
        "[2 tokens, 10.0 tok/s; prompt 4 tokens, 8.0 tok/s; first token after 500 ms; 1.70 tokens a forward pass, "
        "14 of 36 drafts right; 20 of 25 rows of drafts ready in time; length]"
    )


def test_the_summary_tells_of_experts() -> None:
    made = replace(generation(DraftStatistics(drafter="mtp", forwards=4), {}), experts=50)
    assert "; 12.5 experts a forward pass; " in summary(made)
    assert replace(made, drafts=None).experts_per_forward == 50
    assert replace(made, drafts=DraftStatistics(drafter="mtp")).experts_per_forward is None
    assert generation(None, {}).experts_per_forward is None


def test_chat_says_the_same_with_drafts(bundle: Path, command: Command) -> None:
    line = ("engram", "chat", bundle, "--max-tokens", 12)
    talk = "the tide the tide\nand then?\n/reset\nthe tide the tide\n/exit\n"
    assert command(*line, *LOOKUP, stdin=talk).out == command(*line, stdin=talk).out


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[LLM]:
    with LLM(bundle, threads=THREADS) as llm:
        yield llm


@pytest.fixture
def drafting(bundle: Path, plain: LLM) -> Iterator[LLM]:
    """Drafts seven tokens, two of three right."""
    following = plain.generate(PROMPT, max_tokens=64).token_ids
    start = len(plain.tokenizer.encode(PROMPT))

    def guess(text: Sequence[int]) -> int:
        place = len(text) - start
        return following[place] + (place % 3 == 0) if place < len(following) else 1

    with LLM(bundle, threads=THREADS) as llm:
        llm._decoding = Drafting(Scripted(guess), Always(7))
        yield llm


def test_a_stop_string_over_several_accepted_tokens_ends_the_text(plain: LLM, drafting: LLM) -> None:
    whole = plain.generate(PROMPT, max_tokens=40).text
    for start in range(0, len(whole) - 6, 5):
        stop = [whole[start : start + 6]]
        expected, found = (llm.generate(PROMPT, max_tokens=40, stop=stop) for llm in (plain, drafting))
        assert (found.text, found.token_ids, found.finish_reason) == (
            expected.text,
            expected.token_ids,
            expected.finish_reason,
        )
        assert list(drafting.session.token_ids) == list(plain.session.token_ids)
    assert drafting.last is not None
    assert drafting.last.drafts is not None
    assert sum(drafting.last.drafts.accepted) > 0


def test_a_stream_that_is_left_early_does_not_disturb_the_next(plain: LLM, drafting: LLM) -> None:
    expected = plain.generate(PROMPT, max_tokens=24)
    for count in range(1, 8):
        stream = drafting.stream(PROMPT, max_tokens=24)
        for _ in range(count):
            next(stream)
        del stream
        assert drafting.generate(PROMPT, max_tokens=24).token_ids == expected.token_ids


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "no-head": (
        ("--draft", "mtp"),
        "bundle {bundle} has no draft head, which drafter 'mtp' needs; use 'lookup' or export the bundle with a head",
    ),
    "number-alone": (
        ("--draft-k", 3),
        "a number of drafts was given, but no drafter; choose one or leave out the number",
    ),
    "too-many": (("--draft", "lookup", "--draft-k", 64), "drafts are 64, drafter 'lookup' makes 0 to 63"),
    "no-mask": (
        ("--draft", "mask"),
        "the tokenizer has no <|mtp_special_token_0|>, with which mask drafting marks unknown tokens; name the mask's "
        "id, or choose another drafter",
    ),
    "other-mask": (("--draft", "mask", "--mask-id", 300), "mask 300 is outside the vocabulary of 300"),
    "mask-alone": (
        ("--draft", "lookup", "--mask-id", 3),
        "a mask or the confidence in masks was given, which drafter 'lookup' has no use for; leave it out or choose "
        "'mask'",
    ),
    "confidence-alone": (
        ("--mask-confidence", 0.9),
        "a mask or the confidence in masks was given, which drafter 'none' has no use for; leave it out or choose "
        "'mask'",
    ),
    "too-many-masks": (
        ("--draft", "mask", "--mask-id", 3, "--draft-k", 16),
        "drafts are 16, drafter 'mask' makes 0 to 15",
    ),
    "too-sure": (
        ("--draft", "mask", "--mask-id", 3, "--mask-confidence", 1.5),
        "confidence is 1.5, expected 0 to 1",
    ),
    "below-none": (("--draft", "lookup", "--draft-k", -1), "drafts are -1, drafter 'lookup' makes 0 to 63"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("verb", [("run", PROMPT), ("chat",)])
def test_what_cant_be_drafted_is_said(bundle: Path, command: Command, name: str, verb: tuple[str, ...]) -> None:
    arguments, sentence = REFUSED[name]
    outcome = command("engram", verb[0], bundle, *verb[1:], *arguments)
    assert outcome.err.splitlines()[-1] == f"engram: {sentence.format(bundle=bundle)}"
    assert (outcome.code, outcome.out) == (2, "")


def test_samples_are_drawn_without_drafts(bundle: Path, command: Command) -> None:
    outcome = command("engram", "run", bundle, PROMPT, "--n", 2, *LOOKUP)
    sentence = "samples drawn together share their forward passes already; leave out --draft or --n"
    assert (outcome.code, outcome.err.splitlines()[-1]) == (2, f"engram: {sentence}")


def test_masks_say_whether_they_are_verified(bundle: Path, command: Command) -> None:
    line = ("engram", "run", bundle, PROMPT, "--max-tokens", 24, "--json")
    masks = ("--mask-id", 7, "--mask-confidence", 0, "--draft-k", 2)
    plain, verified, approximate = (
        command(*line, *options).json
        for options in ((), ("--draft", "mask", *masks), ("--draft", "mask-approximate", *masks))
    )
    assert verified["token_ids"] == plain["token_ids"] != approximate["token_ids"]
    assert (verified["drafts"]["draft"], approximate["drafts"]["draft"]) == ("mask (verified)", "mask (approximate)")
    assert max(len(verified["drafts"]["acceptance"]), len(approximate["drafts"]["acceptance"])) == 2


def test_a_number_that_is_none_is_refused(bundle: Path, command: Command) -> None:
    outcome = command("engram", "run", bundle, PROMPT, "--draft", "lookup", "--draft-k", "few")
    assert outcome.err.splitlines()[-1].endswith("'few' is neither a number nor auto")
    assert outcome.code == 2
