"""``engram bench compare``: ratios with intervals, what else differs, and files that are no reports."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command, Outcome

ADVICE = "; make one with: engram bench BUNDLE --json > FILE"


def report(factor: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Return what a comparison reads of a report whose speeds are ``factor`` times 1, 2, 4 and 8."""
    rounds = [factor * value for value in (1.0, 2.0, 4.0, 8.0)]
    by_round = {"decode_tok_s": rounds, "depths": {"0": {"decode_tok_s": rounds}}, "load_ms": [3.0]}
    return {
        "bundle": {"path": "demo", "quantisation": "int8", "weights_sha256": "ab" * 32},
        "machine": {"cpu": "Tide 2", "cores": 2},
        "runner": "tvm",
        "build": "engram-edge 0.1.0",
        "threads": 2,
        "tables": [{"site": "layer_1", "io": "mmap", "reason": "as asked for"}],
        "load_average": 0.5,
        "load_average_after": 0.5,
        "bandwidth_gb_s": 10.0,
        "prompt_tokens": 8,
        "decode_tokens": 4,
        "draft_options": {"drafter": "none", "drafts": None, "mask_id": None, "confidence": None},
        "by_round": by_round,
        **changes,
    }


@pytest.fixture
def compared(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compare two reports, or what stands for them."""
    monkeypatch.chdir(tmp_path)

    def run(first: object, second: object, *options: str) -> Outcome:
        for name, content in (("a.json", first), ("b.json", second)):
            Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
        return command("engram", "bench", "compare", "a.json", "b.json", *options)

    return run


def test_a_report_and_itself_are_alike(compared: Any) -> None:
    found = compared(report(), report(), "--json").json
    assert (found["a"], found["b"], found["differences"], found["against"]) == ("a.json", "b.json", {}, {})
    assert found["figures"] == {
        "depths.0.decode_tok_s": {"first": 3.0, "second": 3.0, "ratio": {"value": 1.0, "low": 0.125, "high": 8.0}},
        "load_ms": {"first": 3.0, "second": 3.0, "ratio": {"value": 1.0, "low": None, "high": None}},
    }


def test_the_table_tells_what_differs_before_the_ratios(compared: Any) -> None:
    peer = {"runner": "onnxruntime", "build": "1.31", "by_round": {"load_ms": [5.0]}}
    second = report(
        2.0, threads=1, tables=[], machine={"cpu": "Tide 3", "cores": 2}, load_average_after=1.5, against=peer
    )
    assert compared(report(against=peer), second).out.splitlines() == [
        "A: a.json",
        "B: b.json",
        "differs: threads: 2 | 1",
        "differs: tables: layer_1 mmap | none read",
        "differs: CPU: Tide 2 | Tide 3",
        "differs: load average after: 0.5 | 1.5",
        "95 % intervals are of the rounds; what changes from one start to the next isn't in them",
        "",
        "| figure | A | B | B over A |",
        "|---|---:|---:|---:|",
        "| depths.0.decode_tok_s | 3 | 6 | 2.000 (0.250 to 16.000) |",
        "| load_ms | 3 | 3 | 1.000 (too little for an interval) |",
        "| against.load_ms | 5 | 5 | 1.000 (too little for an interval) |",
    ]


def test_what_was_drafted_from_which_texts_and_after_how_many_tokens_is_told(compared: Any) -> None:
    drafting = {"drafter": "lookup", "drafts": 2, "mask_id": None, "confidence": None}
    rounds = [1.0, 2.0, 3.0, 4.0]
    depths = {depth: {"decode_tok_s": rounds} for depth in ("512", "0")}
    first = report(prompts={"prose": "The harbour"}, draft_options={**drafting, "drafter": "mtp", "drafts": None})
    second = report(prompts={"prose": "A harbour"}, draft_options=drafting, by_round={"depths": depths})
    assert compared(first, second, "--json").json["differences"] == {
        "drafts": ["mtp", "lookup, drafts 2"],
        "texts": ["prose 67f2e9c2", "prose 1369bd84"],
        "tokens before": ["0", "512, 0"],
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("tok/s", "a.json is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "a.json holds a JSON list, expected an object"),
        ({}, f"a.json is no report of this engram bench: it has no key 'bundle'{ADVICE}"),
        (
            report(threads="2"),
            f"a.json is no report of this engram bench: it.threads is '2', expected an integer{ADVICE}",
        ),
        (
            report(by_round={"depths": {"0": {"decode_tok_s": [1.0, 0.0]}}}),
            "a.json is no report of this engram bench: by_round.depths.0.decode_tok_s is [1.0, 0.0], expected positive "
            f"numbers{ADVICE}",
        ),
        (
            report(by_round={"load_ms": [1.0] * 201}),
            f"a.json is no report of this engram bench: by_round.load_ms has 201 rounds, expected at most 200{ADVICE}",
        ),
        (
            report(by_round={"load_ms": "fast"}),
            f"a.json is no report of this engram bench: by_round.load_ms is 'fast', expected a list{ADVICE}",
        ),
    ],
)
def test_what_is_no_report_is_refused(compared: Any, content: object, said: str) -> None:
    outcome = compared(content, report())
    assert (outcome.code, outcome.out, outcome.err) == (3, "", f"engram: {said}\n")


def test_a_report_that_is_not_there_is_named(command: Command, tmp_path: Path) -> None:
    outcome = command("engram", "bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert (outcome.code, outcome.err) == (
        3,
        f"engram: {tmp_path / 'a.json'} can't be read: No such file or directory\n",
    )
