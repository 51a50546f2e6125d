"""Traces: valid files, spans that don't overlap within a lane, and sums that are a generation's figures."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.conftest import Command
from tests.toy_model import Scripted, ToyModel, ToySession
from tests.workshop import THREADS, Workshop, copy_folder

from engram_runtime import LLM, Generation, SamplingOptions
from engram_runtime.commands.loading import Loading
from engram_runtime.drafting.opening import Drafting
from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.drafting.schedule import Always
from engram_runtime.errors import RequestError
from engram_runtime.executor import Step, StepInputs
from engram_runtime.generation import decode_tokens
from engram_runtime.manifest import DECODER
from engram_runtime.sampling import make_sampler
from engram_runtime.tables.opening import AUTO_OPTIONS
from engram_runtime.tracing.recorder import ACCEPTED, EXPERTS, READY, TOKENS, Recorder
from engram_runtime.tracing.timeline import DRAFT, GRAPH, HASH, LANES, READ, SAMPLE, VERIFY, WAIT, Timeline
from engram_runtime.trust.levels import LOCALLY

PROMPT = "The tide comes in"
Event = dict[str, Any]


class Traced:
    """The events of a file by lane, and the values of counts."""

    def __init__(self, content: bytes) -> None:
        self.events: list[Event] = json.loads(content)["traceEvents"]
        names = {event["tid"]: event["args"]["name"] for event in self.events if event["name"] == "thread_name"}
        self.lanes: dict[str, list[Event]] = {lane: [] for lane in names.values()}
        self.counts: dict[str, list[float]] = defaultdict(list)
        for event in self.events:
            if event["ph"] == "X":
                self.lanes[names[event["tid"]]].append(event)
            elif event["ph"] == "C":
                self.counts[event["name"]].append(event["args"][event["name"]])

    def check(self) -> None:
        """Spans of a lane follow one another, and all of them are of one process and after the beginning."""
        assert tuple(self.lanes) == LANES
        assert {event["ph"] for event in self.events} <= {"M", "X", "C"}
        assert len({event["pid"] for event in self.events}) == 1
        for spans in self.lanes.values():
            ends = [0.0, *(span["ts"] + span["dur"] for span in spans)]
            assert min((span["dur"] for span in spans), default=0) >= 0
            assert all(span["ts"] >= end - 1e-3 for span, end in zip(spans, ends, strict=False))

    def within(self, inner: str, outer: str) -> bool:
        """Say whether each span of a lane lies in one of another lane."""
        return all(
            any(
                o["ts"] - 1e-3 <= i["ts"] and i["ts"] + i["dur"] <= o["ts"] + o["dur"] + 1e-3 for o in self.lanes[outer]
            )
            for i in self.lanes[inner]
        )


@pytest.fixture(scope="module")
def bundle(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: costs are stored beside its library."""
    return copy_folder(workshop.ready().path, tmp_path_factory.mktemp("traces") / "bundle")


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[Generation]:
    with LLM(bundle, threads=THREADS) as llm:
        yield llm.generate(PROMPT, max_tokens=40)


def traced(llm: LLM, **request: Any) -> tuple[Generation, Traced]:
    llm.record(recorder := Recorder())
    made = llm.generate(PROMPT, **request)
    found = Traced(recorder.timeline.to_json())
    found.check()
    return made, found


def test_sums_of_a_plain_trace_are_the_figures_of_the_generation(bundle: Path, plain: Generation) -> None:
    with LLM(bundle, threads=THREADS) as llm:
        made, found = traced(llm, max_tokens=40)
    assert made.token_ids == plain.token_ids
    assert sum(span["args"]["tokens"] for span in found.lanes[GRAPH]) == made.prompt_tokens + made.forwards
    assert len(found.lanes[SAMPLE]) == len(made.token_ids) == made.forwards + 1
    assert sum(span["args"]["rows"] for span in found.lanes[READ]) == sum(each.rows for each in made.tables.values())
    assert sum(span["args"]["tokens"] for span in found.lanes[HASH]) == made.prompt_tokens + made.forwards
    assert found.within(WAIT, GRAPH)
    assert (found.lanes[DRAFT], found.lanes[VERIFY], dict(found.counts)) == ([], [], {})


def test_sums_of_a_drafted_trace_are_the_figures_of_the_generation(bundle: Path, plain: Generation) -> None:
    """Seven drafts take more than one pass of the compiled sizes."""
    with LLM(bundle, threads=THREADS) as llm:
        start = len(llm.tokenizer.encode(PROMPT))

        def guess(text: Sequence[int]) -> int:
            place = len(text) - start
            return plain.token_ids[place] + (place % 5 == 0) if place < len(plain.token_ids) else 1

        llm._decoding = Drafting(Scripted(guess), Always(7))
        made, found = traced(llm, max_tokens=40)
    drafts = made.drafts
    assert drafts is not None
    assert made.token_ids == plain.token_ids
    assert (len(found.counts[TOKENS]), sum(found.counts[TOKENS])) == (drafts.forwards, drafts.tokens)
    assert sum(found.counts[ACCEPTED]) == sum(drafts.accepted) > 0
    assert sum(found.counts[READY]) == sum(each.early_ready for each in made.tables.values())
    assert [span["args"]["drafted"] for span in found.lanes[VERIFY]].count(7) == drafts.drafted[6] > 0
    assert sum(span["args"]["accepted"] for span in found.lanes[VERIFY]) == sum(drafts.accepted)
    assert sum(span["args"].get("drafts", 0) for span in found.lanes[DRAFT]) == sum(drafts.drafted)
    assert len(found.lanes[SAMPLE]) == len(made.token_ids)
    assert found.within(WAIT, GRAPH)
    assert {span["ts"] for span in found.lanes[VERIFY]} < {span["ts"] for span in found.lanes[GRAPH]}
    for span in found.lanes[VERIFY]:
        passes = [each["args"]["tokens"] for each in found.lanes[GRAPH] if 0 <= each["ts"] - span["ts"] < span["dur"]]
        assert sum(passes) > span["args"]["drafted"]


def test_of_masks_the_passes_that_verify_are_traced(bundle: Path, plain: Generation) -> None:
    options = DraftOptions(drafter="mask", mask_id=7, confidence=0, drafts=2)
    with LLM(bundle, threads=THREADS, drafts=options) as llm:
        made, found = traced(llm, max_tokens=40)
    assert made.drafts is not None
    assert made.token_ids == plain.token_ids
    assert sum(found.counts[TOKENS]) == made.drafts.tokens
    assert len(found.lanes[VERIFY]) == made.drafts.drafted[0] > 0


class RoutedModel(ToyModel):
    """Reads three experts for each token."""

    experts_read = 0

    def bind(self, states: Any, graph: str = DECODER) -> Step:
        return RoutedStep(self, super().bind(states, graph))


class RoutedStep:
    """See `RoutedModel`."""

    def __init__(self, model: RoutedModel, step: Step) -> None:
        self._model, self._step = model, step
        self.told = step.told

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        self._model.experts_read += 3 * len(inputs.token_ids)
        return self._step(inputs)


def test_experts_are_counted_pass_by_pass() -> None:
    session = ToySession(RoutedModel(), [1, 2])
    session.record(recorder := Recorder())
    sample = make_sampler(SamplingOptions())
    assert len(list(decode_tokens(session, session.first_logits, sample, max_tokens=5, end_ids=()))) == 5
    session.decode([1, 2, 3, 4])
    assert Traced(recorder.timeline.to_json()).counts[EXPERTS] == [3, 3, 3, 3, 12]


def test_a_timeline_in_full() -> None:
    times = iter([10.0, 10.5, 11.25, 12.0])
    timeline = Timeline(lambda: next(times))
    assert timeline.span(GRAPH, "2 tokens", 10.25, tokens=2) == 10.5
    timeline.count(TOKENS, 2)
    pid = json.loads(timeline.to_json())["traceEvents"][0]["pid"]
    assert json.loads(timeline.to_json()) == {
        "displayTimeUnit": "ms",
        "traceEvents": [
            *(
                {"ph": "M", "name": f"thread_{kind}", "pid": pid, "tid": tid, "args": args}
                for tid, lane in enumerate(LANES, start=1)
                for kind, args in (("name", {"name": lane}), ("sort_index", {"sort_index": tid - 1}))
            ),
            {"ph": "X", "name": "2 tokens", "ts": 250000, "dur": 250000, "pid": pid, "tid": 4, "args": {"tokens": 2}},
            {"ph": "C", "name": TOKENS, "ts": 1250000, "pid": pid, "args": {TOKENS: 2}},
        ],
    }


DRAFTED = ("--draft", "lookup", "--draft-k", 3)


def test_run_writes_a_trace_and_says_the_same(bundle: Path, command: Command, tmp_path: Path) -> None:
    line = ("engram", "run", bundle, PROMPT, "--max-tokens", 100, *DRAFTED, "--json")
    (path := tmp_path / "trace.json").write_text("an older one")
    plain, found = command(*line).json, command(*line, "--trace", path).json
    assert (found["token_ids"], found["drafts"]) == (plain["token_ids"], plain["drafts"])
    (written := Traced(path.read_bytes())).check()
    assert sum(written.counts[TOKENS]) == 99
    assert sum(written.counts[ACCEPTED]) == found["drafts"]["accepted"]
    assert sum(span["args"]["drafted"] for span in written.lanes[VERIFY]) == found["drafts"]["drafted"] > 0
    assert sum(written.counts[READY]) == sum(table["early_ready"] for table in found["tables"])


def say_and_fail(llm: LLM) -> None:
    llm.generate(PROMPT, max_tokens=6)
    llm.generate([])


def test_a_run_that_fails_leaves_its_trace(bundle: Path, tmp_path: Path) -> None:
    loading = Loading(
        executor="tvm",
        threads=THREADS,
        target=None,
        tables_on=True,
        tables=AUTO_OPTIONS,
        drafts=NO_DRAFTS,
        trust=LOCALLY,
    )
    path = tmp_path / "trace.json"
    with pytest.raises(RequestError), click.Context(click.Command("run")), loading.load(bundle, path) as llm:
        say_and_fail(llm)
    assert len(Traced(path.read_bytes()).lanes[SAMPLE]) == 6


def test_chat_writes_a_trace_of_all_answers(bundle: Path, command: Command, tmp_path: Path) -> None:
    line = ("engram", "chat", bundle, "--max-tokens", 6)
    talk = "the tide\nand then?\n/exit\n"
    path = tmp_path / "trace.json"
    assert command(*line, "--trace", path, stdin=talk).out == command(*line, stdin=talk).out
    (written := Traced(path.read_bytes())).check()
    assert len(written.lanes[SAMPLE]) == 12


def test_traces_that_cant_be_written_are_refused(bundle: Path, command: Command, tmp_path: Path) -> None:
    for arguments, sentence in (
        (("--trace", tmp_path), f"{tmp_path} is a folder; give the name of a file"),
        (
            ("--trace", tmp_path / "trace.json", "--n", 2, "--temperature", 1),
            "samples drawn together are not traced; leave out --trace or --n",
        ),
    ):
        outcome = command("engram", "run", bundle, PROMPT, *arguments)
        assert (outcome.code, outcome.out, outcome.err) == (2, "", f"engram: {sentence}\n")
