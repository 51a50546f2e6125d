"""The benchmark with fake runners: what is asked in which order, what becomes of the answers, and how errors end."""

import json
import mmap
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engram_runtime.bench import runner as runner_module
from engram_runtime.bench.bandwidth import LEAST_BYTES, MOST_BYTES, Bandwidth, read_bandwidth, working_set
from engram_runtime.bench.bundle_runner import weight_bytes_of_a_token
from engram_runtime.bench.continuations import Continuation, drafted
from engram_runtime.bench.kernel_times import Watcher, by_kind, kernel_times, kind_of, medians, outside_ms
from engram_runtime.bench.markdown import markdown
from engram_runtime.bench.memory import resident_mb
from engram_runtime.bench.process import Worker
from engram_runtime.bench.report import ratios, report
from engram_runtime.bench.rounds import Contestant, Result, Settings, measure
from engram_runtime.drafting.options import NO_DRAFTS, DraftOptions
from engram_runtime.drafting.statistics import DraftStatistics
from engram_runtime.errors import BundleError, RequestError, TargetError

SETTINGS = Settings(prompt_tokens=8, decode_tokens=4, depths=(0, 8), rounds=3, tables_on=True, profile=False)

BANDWIDTH = Bandwidth(gb_s=2.0, read_bytes=64 * 10**6)

# Speaks the protocol of engram_runtime.bench.worker: name, file for a log, seconds of every measurement.
FAKE_WORKER = """
import json, os, signal, sys

name, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
for line in sys.stdin:
    request = json.loads(line)
    with open(log, "a") as file:
        file.write(json.dumps([name, request]) + "\\n")
    what = request["do"]
    if what == "load":
        times = {"import_s": 0.25, "load_s": seconds, "first_token_s": 0.25}
        facts = {"name": name, "build": f"{name} 1.0", "threads": request["threads"] or 2, "weight_bytes": 1000}
        facts["tables"] = [{"site": name}]
        answer = {**facts, **times}
    elif what == "memory":
        answer = {"rss_anon_mb": 10 * seconds, "rss_file_mb": 100.0}
    elif what == "refuse":
        answer = {"error": "BundleError", "message": "it is damaged"}
    elif what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "forbidden":
        os.kill(os.getpid(), signal.SIGILL)
    elif what == "give up":
        sys.exit(3)
    elif what == "break off":
        print('{"seconds": 1', end="", flush=True)
        sys.exit(3)
    elif what == "group":
        answer = {"group": os.getpgrp()}
    elif what == "verify":
        experts = {str(tokens): None for tokens in request["sizes"]}
        answer = {"seconds": {str(tokens): seconds * tokens for tokens in request["sizes"]}, "experts": experts}
    elif what == "drafts":
        answer = {}
        for text in request["prompts"]:
            none = {"drafter": "none", "forwards": 4, "tokens": 4, "drafted": [], "accepted": []}
            plain = {"tokens": 4, "seconds": 4 * seconds, "drafts": none, "experts": 8}
            some = {"drafter": "lookup", "forwards": 2, "tokens": 4, "drafted": [2, 1], "accepted": [1, 1]}
            drafted = {"tokens": 4, "seconds": len(text) * seconds, "drafts": some, "experts": 7}
            answer[text] = {"plain": plain, "drafted": drafted, "same": text != "odd"}
    else:
        answer = {"seconds": seconds * request["tokens"], "expert_bytes": 500.0}
    print(json.dumps(answer), flush=True)
"""

StartWorker = Callable[[str], Worker]


@pytest.fixture
def start_worker(tmp_path: Path) -> StartWorker:
    """Start fakes: ``fast`` takes half a second for each token, the others one."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE_WORKER)
    seconds = {"fast": "0.5", "slow": "1.0", "llama.cpp": "1.0"}
    return lambda name: Worker(name, [sys.executable, str(script), name, str(tmp_path / "log"), seconds[name]])


def measured(start_worker: StartWorker, *names: str, threads: int | None = None) -> list[Result]:
    contestants = [Contestant(runner=name, model=f"{name}.model") for name in names]
    return measure(contestants, SETTINGS, threads=threads, progress=lambda: None, start_worker=start_worker)


def log_of(folder: Path) -> list[tuple[str, dict[str, object]]]:
    return [tuple(json.loads(line)) for line in (folder / "log").read_text().splitlines()]


def test_runners_take_turns_round_by_round(start_worker: StartWorker, tmp_path: Path) -> None:
    measured(start_worker, "fast", "slow")
    asked = [(name, request) for name, request in log_of(tmp_path) if request["do"] not in ("load", "memory")]
    assert [name for name, _ in asked] == ["fast", "slow"] * (len(asked) // 2)
    assert [request for _, request in asked[::2]] == [request for _, request in asked[1::2]]
    rounds = 1 + SETTINGS.rounds
    assert [request for _, request in asked[:: 2 * rounds]] == [
        {"do": "prefill", "depth": 0, "tokens": 8},
        {"do": "decode", "depth": 0, "tokens": 4},
        {"do": "prefill", "depth": 8, "tokens": 8},
        {"do": "decode", "depth": 8, "tokens": 4},
        {"do": "verify", "depth": 8, "sizes": [1, 2, 4, 8, 16]},
    ]


def test_all_get_the_threads_that_the_first_one_chose(start_worker: StartWorker, tmp_path: Path) -> None:
    measured(start_worker, "fast", "slow")
    loads = [(name, request["threads"]) for name, request in log_of(tmp_path) if request["do"] == "load"]
    assert loads == [("fast", None), ("slow", 2), *[("fast", 2), ("slow", 2)] * (1 + SETTINGS.rounds)]


def test_figures_are_those_of_the_answers(start_worker: StartWorker) -> None:
    found = report(measured(start_worker, "fast", threads=1), SETTINGS, BANDWIDTH, (0.5, 0.75))
    assert found == {
        "runner": "fast",
        "build": "fast 1.0",
        "threads": 1,
        "prefill_tok_s": 2.0,
        "decode_tok_s": 0.5,
        "verify_cost": {"2": 2.0, "4": 4.0, "8": 8.0, "16": 16.0},
        "ttft_ms": 4000.0,
        "load_ms": 500.0,
        "start_ms": 1000.0,
        "verify_ms": {"1": 500.0, "2": 1000.0, "4": 2000.0, "8": 4000.0, "16": 8000.0},
        "depths": {depth: {"prefill_tok_s": 2.0, "decode_tok_s": 0.5} for depth in ("0", "8")},
        "rss_anon_mb": 5.0,
        "rss_file_mb": 100.0,
        "bandwidth_share": (1000 + 500) * 0.5 / 2e9,
        "bytes_per_token": 1500,
        "expert_bytes_per_token": 500,
        "verify_experts": None,
        "by_round": {
            "prefill_tok_s": [2.0] * 3,
            "decode_tok_s": [0.5] * 3,
            "verify_cost": {"2": [2.0] * 3, "4": [4.0] * 3, "8": [8.0] * 3, "16": [16.0] * 3},
            "ttft_ms": [4000.0] * 3,
            "load_ms": [500.0] * 3,
            "start_ms": [1000.0] * 3,
            "verify_ms": {size: [500.0 * int(size)] * 3 for size in ("1", "2", "4", "8", "16")},
            "depths": {depth: {"prefill_tok_s": [2.0] * 3, "decode_tok_s": [0.5] * 3} for depth in ("0", "8")},
        },
        "bandwidth_gb_s": 2.0,
        "bandwidth_mb": 64.0,
        "prompt_tokens": 8,
        "decode_tokens": 4,
        "rounds": 3,
        "draft_options": {"drafter": "none", "drafts": None, "mask_id": None, "confidence": None},
        "tables": [{"site": "fast"}],
        "load_average": 0.5,
        "load_average_after": 0.75,
    }


def test_ratios_are_the_bundles_figures_over_the_peers(start_worker: StartWorker) -> None:
    results = measured(start_worker, "fast", "slow")
    against = report(results, SETTINGS, BANDWIDTH, (0.5, 0.75))["against"]
    assert against["decode_tok_s"] == 0.25
    assert against["ratios"] == {
        "prefill_tok_s": 2.0,
        "decode_tok_s": 2.0,
        "verify_cost": {"2": 1.0, "4": 1.0, "8": 1.0, "16": 1.0},
        "ttft_ms": 0.5,
        "load_ms": 0.5,
        "start_ms": 0.6667,
        "verify_ms": {"1": 0.5, "2": 0.5, "4": 0.5, "8": 0.5, "16": 0.5},
        "depths": {depth: {"prefill_tok_s": 2.0, "decode_tok_s": 2.0} for depth in ("0", "8")},
        "rss_anon_mb": 0.5,
        "rss_file_mb": 1.0,
        "bandwidth_share": 2.0,
    }


DRAFTED = replace(SETTINGS, drafts=DraftOptions(drafter="lookup", drafts=2), prompts={"ab": "A B", "c": "C"})


def measured_drafts(start_worker: StartWorker, settings: Settings, *, peer_drafts: bool = True) -> list[Result]:
    contestants = [
        Contestant(runner="fast", model="fast.model"),
        Contestant(runner="slow", model="slow.model", drafts=peer_drafts),
    ]
    return measure(contestants, settings, threads=1, progress=lambda: None, start_worker=start_worker)


def test_drafts_are_measured_first_in_turn_with_a_peers(start_worker: StartWorker, tmp_path: Path) -> None:
    results = measured_drafts(start_worker, DRAFTED)
    asked = [(name, request) for name, request in log_of(tmp_path) if request["do"] != "load"][:8]
    options = {"drafter": "lookup", "drafts": 2, "mask_id": None, "confidence": None}
    request = {"do": "drafts", "prompts": DRAFTED.prompts, "prompt_tokens": 8, "tokens": 4, "drafts": options}
    assert asked == [("fast", request), ("slow", request)] * 4
    found = report(results, DRAFTED, BANDWIDTH, (0.5, 0.75))
    assert found["prompts"] == {"ab": "A B", "c": "C"}
    assert found["drafts"] == {
        "plain_tok_s": 2.0,
        "tok_s": 5.333,  # 8 tokens in 1.5 s
        "over_plain": 2.667,
        "texts": {
            "ab": {"plain_tok_s": 2.0, "tok_s": 4.0, "over_plain": 2.0},
            "c": {"plain_tok_s": 2.0, "tok_s": 8.0, "over_plain": 4.0},
        },
        "draft": "lookup",
        "forwards": 12,
        "tokens_per_forward": 2.0,
        "drafted": 18,
        "accepted": 12,
        "acceptance": [0.5, 1.0],
        "same_text": True,
        "experts_per_forward": {"plain": 2.0, "drafted": 3.5},
    }
    assert found["against"]["ratios"]["drafts"]["tok_s"] == 2.0
    assert found["against"]["ratios"]["drafts"]["texts"]["c"] == {"plain_tok_s": 2.0, "tok_s": 2.0, "over_plain": 1.0}


def test_drafts_stand_beside_plain_decoding_in_the_table(start_worker: StartWorker) -> None:
    results = measured_drafts(start_worker, DRAFTED, peer_drafts=False)
    found = report(results, DRAFTED, BANDWIDTH, (0.5, 0.75))
    assert found["against"]["drafts"] is None
    lines = markdown(found, DRAFTED, ratios(results[0], results[1], DRAFTED)).splitlines()
    assert lines[4:6] == [
        "fast, drafts by lookup, 2 a pass, after up to 8 tokens of ab, c: 2.00 tokens a forward pass; right one by "
        "one: 50%, 100%; 3.5 experts a forward pass, plain 2.0; the same text as without",
        "",
    ]
    start = lines.index("| decode 4 after ab, tok/s | 2 |  |  |")
    assert lines[start + 1 : start + 9] == [
        "| the same with drafts by lookup, tok/s | 4 |  |  |",
        "| drafts over plain, ab | 2 |  |  |",
        "| decode 4 after c, tok/s | 2 |  |  |",
        "| the same with drafts by lookup, tok/s | 8 |  |  |",
        "| drafts over plain, c | 4 |  |  |",
        "| decode 4 after all texts, tok/s | 2 |  |  |",
        "| the same with drafts by lookup, tok/s | 5.333 |  |  |",
        "| drafts over plain, all texts | 2.667 |  |  |",
    ]


def test_drafts_that_change_the_text_are_told(start_worker: StartWorker) -> None:
    settings = replace(DRAFTED, drafts=DraftOptions(drafter="lookup"), prompts={"odd": "?"})
    found = report(measured_drafts(start_worker, settings), settings, BANDWIDTH, (0.5, 0.75))
    lines = markdown(found, settings, None).splitlines()
    assert lines[4].startswith("fast, drafts by lookup, as many as pay, after up to 8 tokens of odd: ")
    assert lines[4].endswith("; another text as without")
    assert sum(line.startswith("| drafts over plain, ") for line in lines) == 1


def test_steps_are_announced_with_drafts(start_worker: StartWorker) -> None:
    steps: list[None] = []
    contestant = Contestant(runner="fast", model="")
    measure([contestant], DRAFTED, threads=1, progress=lambda: steps.append(None), start_worker=start_worker)
    assert len(steps) == DRAFTED.steps


class Parrot:
    """Says a text's own characters again, with drafts five or as many as ``short`` says; keeps the order of ways."""

    def __init__(self, short: int = 5) -> None:
        self.asked: list[tuple[str, str]] = []
        self._short = short

    def go_on(self, prompt: str, *, prompt_tokens: int, tokens: int, drafts: DraftOptions) -> Continuation:
        self.asked.append((prompt, drafts.drafter))
        said = tuple(map(ord, prompt[:prompt_tokens]))[: tokens if drafts == NO_DRAFTS else self._short]
        return Continuation(token_ids=said, seconds=2.0, drafts=DraftStatistics(drafter="x"), experts=None)


def test_ways_take_turns_in_being_the_first(start_worker: StartWorker) -> None:
    parrot, prompts = Parrot(), {"one": "abcdefg", "two": "bcd", "three": "cdefgh"}
    found = drafted(parrot, prompts=prompts, prompt_tokens=6, tokens=6, drafts={"drafter": "lookup"})
    ways = ["none", "lookup", "lookup", "none", "none", "lookup"]
    assert parrot.asked == list(zip([each for each in prompts.values() for _ in range(2)], ways, strict=True))
    assert [(found[name]["plain"]["tokens"], found[name]["same"]) for name in prompts] == [
        (5, False),
        (2, True),
        (5, False),
    ]


def test_a_text_that_is_at_its_end_is_named() -> None:
    with pytest.raises(RequestError) as caught:
        drafted(Parrot(1), prompts={"one": "abc"}, prompt_tokens=6, tokens=6, drafts={"drafter": "lookup"})
    assert str(caught.value) == "the model ends text one with its first token; give another by --prompt-file"


def test_a_ratio_is_taken_within_each_round() -> None:
    own, peer = (Result(Contestant(runner=name, model=""), {}) for name in ("own", "peer"))
    for result, factor in ((own, 1.0), (peer, 2.0)):
        for name in [*SETTINGS.measurements(), "start"]:
            answers = [
                {"seconds": factor * busy, "import_s": 0.0, "load_s": 1.0, "first_token_s": 0.0} for busy in (1, 9, 3)
            ]
            result.samples[name] = answers
        result.samples["verify"] = [
            {"seconds": dict.fromkeys(("1", "2", "4", "8", "16"), factor * busy)} for busy in (1, 9, 3)
        ]
    found = ratios(own, peer, SETTINGS)
    assert found["decode_tok_s"] == [2.0, 2.0, 2.0]
    assert found["verify_cost"] == {tokens: [1.0, 1.0, 1.0] for tokens in ("2", "4", "8", "16")}


def test_what_the_caller_knows_of_weights_comes_before_what_the_runner_says(start_worker: StartWorker) -> None:
    contestant = Contestant(runner="fast", model="fast.gguf", weight_bytes=7)
    results = measure([contestant], SETTINGS, threads=1, progress=lambda: None, start_worker=start_worker)
    assert report(results, SETTINGS, BANDWIDTH, (0, 0))["bytes_per_token"] == 507


def test_progress_is_told_as_often_as_announced(start_worker: StartWorker) -> None:
    steps: list[None] = []
    measure(
        [Contestant(runner="fast", model="")],
        SETTINGS,
        threads=1,
        progress=lambda: steps.append(None),
        start_worker=start_worker,
    )
    assert len(steps) == SETTINGS.steps


def test_the_table_has_a_line_for_every_figure(start_worker: StartWorker) -> None:
    results = measured(start_worker, "fast", "slow", threads=1)
    found = report(results, SETTINGS, BANDWIDTH, (0.5, 0.75))
    lines = markdown(found, SETTINGS, ratios(results[0], results[1], SETTINGS)).splitlines()
    assert lines[:8] == [
        "load average 0.50 before, 0.75 after; medians of 3 rounds",
        "fast, 1 threads: fast 1.0",
        "slow, 1 threads: slow 1.0",
        "memory bandwidth 2.0 GB/s (numpy.max over 64 MB of float32, each thread's part touched by it first; median of "
        "40 passes)",
        "",
        "|  | fast | slow | ratio (least to largest) |",
        "|---|---:|---:|---:|",
        "| prefill 8 after 0, tok/s | 2 | 1 | 2.00 (2.00 to 2.00) |",
    ]
    assert "| first token of a prompt of 8 after 0, ms | 4,000 | 8,000 | 0.50 (0.50 to 0.50) |" in lines
    assert "| forward of 16 tokens over 1 | 16 | 16 | 1.00 (1.00 to 1.00) |" in lines
    assert "| forward of 16 tokens, ms | 8,000 | 16,000 | 0.50 (0.50 to 0.50) |" in lines
    assert "| resident memory of its own, MB | 5 | 10 | 0.50 |" in lines


def test_a_profile_is_shown_with_the_shares_of_a_step(start_worker: StartWorker) -> None:
    found = report(measured(start_worker, "fast"), SETTINGS, BANDWIDTH, (0.5, 0.75))
    step = {"step_ms": 4.0, "outside_ms": 1.0, "kernels": {"linear_int8": {"calls": 6, "ms": 3.0}}}
    assert markdown({**found, "profile": {"decode": step}}, SETTINGS, None).splitlines()[-5:] == [
        "",
        "| decode, 4.00 ms | calls | ms | share |",
        "|---|---:|---:|---:|",
        "| linear_int8 | 6 | 3.000 | 75.0% |",
        "| outside kernels |  | 1.000 | 25.0% |",
    ]


def test_the_build_of_a_peer_tells_the_types_it_was_given(start_worker: StartWorker) -> None:
    contestant = Contestant(runner="fast", model="fast.gguf", types="Q4_0 x 14, F32 x 5")
    results = measure([contestant], SETTINGS, threads=1, progress=lambda: None, start_worker=start_worker)
    assert report(results, SETTINGS, BANDWIDTH, (0, 0))["build"] == "fast 1.0, Q4_0 x 14, F32 x 5"


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("refuse", BundleError, "it is damaged"),
        ("crash", TargetError, "fast was ended by SIGKILL during crash; what it printed stands above"),
        ("give up", TargetError, "fast ended with exit code 3 during give up; what it printed stands above"),
        ("break off", TargetError, "fast ended with exit code 3 during break off; what it printed stands above"),
    ],
)
def test_what_becomes_of_a_worker_is_said(
    start_worker: StartWorker, what: str, error: type[Exception], message: str
) -> None:
    with start_worker("fast") as worker, pytest.raises(error) as caught:
        worker.ask(what)
    assert str(caught.value) == message


def test_llama_cpp_that_meets_a_forbidden_instruction_is_to_be_built_anew(start_worker: StartWorker) -> None:
    with start_worker("llama.cpp") as worker, pytest.raises(TargetError) as caught:
        worker.ask("forbidden")
    assert str(caught.value) == (
        "llama.cpp was ended by SIGILL during forbidden; gcc 12 miscompiles it for CPUs with AMX: build it by another "
        "compiler, with clang: CC=clang CXX=clang++ pip install --force-reinstall --no-deps --no-cache-dir "
        "llama-cpp-python"
    )


def test_what_interrupts_this_process_does_not_reach_a_worker(start_worker: StartWorker) -> None:
    with start_worker("fast") as worker:
        assert worker.ask("group")["group"] != os.getpgrp()


def test_a_profile_needs_room_for_a_prompt_after_a_prompt() -> None:
    settings = replace(SETTINGS, prompt_tokens=40)
    assert (settings.positions, replace(settings, profile=True).positions) == (56, 80)


def test_measurements_beyond_the_context_are_refused() -> None:
    SETTINGS.check_context(24)  # a prompt of 8, then 16 to verify
    with pytest.raises(RequestError) as caught:
        SETTINGS.check_context(23)
    assert str(caught.value) == (
        "these measurements need 24 tokens, the context holds 23; give a smaller --prompt-tokens, --decode-tokens or "
        "--depth"
    )


class FakeRunner:
    """Keeps its tokens, and how many had been added before each call."""

    name, build, threads, vocab_size = "fake", "fake 1.0", 1, 1000
    weight_bytes: int | None = None
    tables: Sequence[Mapping[str, object]] = ()

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.calls: list[tuple[int, int]] = []  # tokens held, tokens added
        self.expert_bytes_read = 0
        self.experts_read: int | None = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def prefill(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        last: NDArray[np.float32] = self.decode(token_ids)[-1]
        return last

    def decode(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self.calls.append((len(self.token_ids), len(token_ids)))
        self.token_ids += token_ids
        self.expert_bytes_read += 10 * len(token_ids)
        self.experts_read = 4 * len(token_ids) + (self.experts_read or 0)
        return np.zeros((len(token_ids), self.vocab_size), dtype=np.float32)

    def trim(self, count: int) -> None:
        del self.token_ids[len(self.token_ids) - count :]

    def profile(self, prepare: Callable[[], None], step: Callable[[], object], passes: int) -> dict[str, int]:
        prepare()
        before = len(self.token_ids)
        step()
        return {"before": before, "added": len(self.token_ids) - before}


def test_every_measurement_stands_where_it_says() -> None:
    fake = FakeRunner()
    runner_module.prefill(fake, depth=0, tokens=6)
    decoded = runner_module.decode(fake, depth=4, tokens=3)
    verified = runner_module.verify(fake, depth=10, sizes=(2, 3))
    assert fake.calls == [(0, 6), *[(4 + i, 1) for i in range(4)], (8, 2), *[(10, 2)] * 6, *[(10, 3)] * 6]
    assert decoded["expert_bytes"] == 10
    assert list(verified["seconds"]) == ["2", "3"]
    assert verified["experts"] == {"2": 8, "3": 12}
    assert fake.token_ids == runner_module.text(fake, 0, 13)
    assert runner_module.profile(fake, depth=3, tokens=5) == {
        "decode": {"before": 3, "added": 1},
        "prefill": {"before": 3, "added": 5},
    }


class WatchableExecutor:
    """Runs two kernels and a builtin for each step."""

    name = "watchable"

    def __init__(self) -> None:
        self.watcher: Watcher | None = None

    def watch(self, watcher: Watcher | None) -> None:
        self.watcher = watcher

    def step(self) -> None:
        for name in ("vm.builtin.reshape", "linear_int8_1_8_8", "linear_int8_1_16_8"):
            for about_to_run in (True, False):
                if self.watcher is not None:
                    self.watcher(None, name, about_to_run, None)


def test_kernels_are_counted_by_kind_and_watched_no_longer_than_a_step() -> None:
    executor = WatchableExecutor()
    found = kernel_times(executor, lambda: None, executor.step, 2)  # type: ignore[arg-type]
    assert {kind: times["calls"] for kind, times in found["kernels"].items()} == {"linear_int8": 2}
    assert executor.watcher is None


def test_times_of_kernels_are_summed_without_what_watching_takes() -> None:
    calls = [("vm.builtin.null_value", 0.001), ("add_1_8", 0.003), ("linear_int4_1_8_8", 0.011), ("add_1_16", 0.003)]
    assert medians([by_kind(calls)]) == {"linear_int4": {"calls": 1, "ms": 10.0}, "add": {"calls": 2, "ms": 4.0}}


def taken(*passes: tuple[float, float, float]) -> list[tuple[float, dict[str, dict[str, float]]]]:
    """Return passes of so many ms, and what two kinds of kernels took of each."""
    return [(step, {"add": {"calls": 2, "ms": add}, "sum": {"calls": 1, "ms": sum_}}) for step, add, sum_ in passes]


def test_what_no_kernel_took_is_told_of_each_pass_by_itself() -> None:
    passes = taken((10.0, 3.0, 5.0), (30.0, 12.0, 8.0), (9.0, 4.0, 4.5))
    assert outside_ms(passes) == 2.0
    assert outside_ms(taken((10.0, 9.0, 4.0))) == 0.0
    assert list(medians([kernels for _, kernels in passes]).items()) == [
        ("sum", {"calls": 1, "ms": 5.0}),
        ("add", {"calls": 2, "ms": 4.0}),
    ]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("linear_int8_1_960_576", "linear_int8"),
        ("rms_norm_1_576_9_999999747378752e-06", "rms_norm"),
        ("attend_1_9_3_64_8192_0_125_None", "attend"),
        ("fused_multiply6_tir_sqrt1", "fused_multiply_tir_sqrt"),
        ("sum5", "sum"),
    ],
)
def test_a_kernels_kind_is_its_name_without_sizes(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_tokens_read_no_whole_embedding_rotation_or_experts() -> None:
    tied = {"embedding.codes:packed:weight": 1000, "rotations.full.cos:plain": 100, "layers.0.mixer.qkv.codes": 10}
    assert weight_bytes_of_a_token(tied) == 1010
    assert weight_bytes_of_a_token({**tied, "lm_head.codes": 2000}) == 2010
    assert weight_bytes_of_a_token({**tied, "layers.0.feed_forward.experts.down.codes": 5}) == 1010


def test_memory_that_is_taken_is_seen() -> None:
    before = resident_mb()["rss_anon_mb"]
    taken = np.ones(50_000_000, dtype=np.uint8)
    assert resident_mb()["rss_anon_mb"] - before == pytest.approx(taken.nbytes / 1e6, abs=5)


def test_shared_memory_counts_as_files() -> None:
    before = resident_mb()["rss_file_mb"]
    with mmap.mmap(-1, 50_000_000) as shared:
        shared.write(b"1" * len(shared))
        assert resident_mb()["rss_file_mb"] - before == pytest.approx(50, abs=5)


@pytest.mark.parametrize(
    ("read", "expected"), [(None, MOST_BYTES), (1, LEAST_BYTES), (10**8, 10**8), (10**10, MOST_BYTES)]
)
def test_the_bandwidth_is_that_of_what_a_token_reads_within_limits(read: int | None, expected: int) -> None:
    assert working_set(read) == expected


def test_every_thread_reads_a_part_of_its_own() -> None:
    found = read_bandwidth(2, 1_000_004)
    assert found.read_bytes == 1_000_000
    assert found.gb_s > 0
