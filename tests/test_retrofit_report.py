"""What is made of a retrofit's figures and files: the tables of the card, what is compared, the asset folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from engram_runtime.errors import RequestError
from examples.retrofit.bundle_command import HEAD, KEPT, TEXTS, TRAINED, complete
from examples.retrofit.facts import HELD_OUT_QUESTIONS
from examples.retrofit.report import flat, tables


def share(known: int, asked: int, low: float, high: float) -> dict[str, Any]:
    return {"known": known, "asked": asked, "share": known / asked, "low": low, "high": high}


def by_drafts(*values: float) -> dict[str, dict[str, float]]:
    return {f"k{k}": {"value": value, "low": value - 0.01, "high": value + 0.01} for k, value in enumerate(values, 1)}


WHERE = {"facts": "manual", "cartridge": "manual", "rows": "int4", "executor": "tvm"}
ACCEPTED = {"every_position": by_drafts(0.5, 0.25, 0.125), "tokens_per_step": by_drafts(1.5, 1.625, 1.75)}
SAID = {"question": "Why | how?", "off": "So.", "dictionary": "So.", "manual": "Not\nso."}
REPORT: dict[str, Any] = {
    "recall": [
        {**WHERE, "wording": HELD_OUT_QUESTIONS[0], **share(9, 10, 0.6, 0.98)},
        {**WHERE, "wording": HELD_OUT_QUESTIONS[1], **share(10, 10, 0.722, 1.0)},
    ],
    "torch": [],
    "row_formats": [],
    "perplexity": [
        {
            **{"text": "a book", "cartridge": "manual", "rows": "int4", "off": 10.0, "perplexity": 10.1},
            **{"ratio": 1.01, "low": 1.0, "high": 1.02, "added_p50": 0.001, "added_p95": 0.02},
        }
    ],
    "answers": {
        "unchanged": {"ordinary": {"manual": share(19, 20, 0.76, 0.99)}},
        "in_form_of_an_entry": {"terms": {"off": share(0, 40, 0.0, 0.088), "manual": share(30, 40, 0.6, 0.86)}},
        "answers": {"ordinary": [SAID], "in_passing": []},
    },
    "acceptance": {
        name: {
            "all": ACCEPTED,
            "code": ACCEPTED,
            "outside_repetition": by_drafts(0.4, 0.2, 0.1),
            "share_repeating": {"all": 0.2, "code": 0.3},
        }
        for name in ("int8", "exported, tvm")
    },
}


def test_every_figure_has_its_line_in_the_tables() -> None:
    lines = list(tables(REPORT))
    right = "50.0% (49.0% to 51.0%) | 25.0% (24.0% to 26.0%) | 12.5% (11.5% to 13.5%)"
    fresh = "40.0% (39.0% to 41.0%) | 20.0% (19.0% to 21.0%) | 10.0% (9.0% to 11.0%)"
    assert [line for line in lines if line.startswith("|") and not line.startswith("|--")] == [
        "| cartridge | executor | word for word |",
        "| manual | tvm | 19 of 20 (95.0%) |",
        "| facts | cartridge | rows | executor | wording | word for word | 95 % interval |",
        f"| manual | manual | int4 | tvm | {HELD_OUT_QUESTIONS[0]} | 9 of 10 (90.0%) | 60.0% to 98.0% |",
        f"| manual | manual | int4 | tvm | {HELD_OUT_QUESTIONS[1]} | 10 of 10 (100.0%) | 72.2% to 100.0% |",
        "| text | cartridge | rows | without rows | with | ratio | 95 % interval | added, median | added, 95 % below |",
        "| a book | manual | int4 | 10.00 | 10.10 | 1.0100 | 1.0000 to 1.0200 | 0.10% | 2.00% |",
        "| questions | cartridge | word for word as without rows | 95 % interval |",
        "| ordinary | manual | 19 of 20 | 76.0% to 99.0% |",
        "| questions | cartridge | begin with Entry for | 95 % interval |",
        "| terms | off | 0 of 40 | 0.0% to 8.8% |",
        "| terms | manual | 30 of 40 | 60.0% to 86.0% |",
        "| drafter | text | first right | first two | first three | tokens per step with 1, 2, 3 drafts |",
        f"| int8 | all | {right} | 1.50, 1.62, 1.75 |",
        f"| int8 | code | {right} | 1.50, 1.62, 1.75 |",
        f"| int8 | outside of what repeats itself | {fresh} | - |",
        f"| exported, tvm | all | {right} | 1.50, 1.62, 1.75 |",
        f"| exported, tvm | code | {right} | 1.50, 1.62, 1.75 |",
        f"| exported, tvm | outside of what repeats itself | {fresh} | - |",
        "| question | without rows | dictionary | manual |",
        r"| Why \| how? | So. | *the same* | Not so. |",
        "| question | without rows | dictionary | manual |",
    ]
    titles = ("Perplexity", "Answers", "Answers in form of an entry", "Drafts", "Ordinary questions")
    assert [line for line in lines if line.startswith("#")] == [
        "### Recall over all held-out wordings",
        "### Recall",
        *(f"### {title}" for title in titles),
        "### Questions with a trained word in passing",
    ]


def test_evaluations_are_compared_by_all_their_shares_and_ratios() -> None:
    drafts = {
        f"drafts accepted / {drafter} / {text} / k{k}": value
        for drafter in ("int8", "exported, tvm")
        for text in ("all", "code")
        for k, value in ((1, 0.5), (2, 0.25), (3, 0.125))
    }
    assert flat(REPORT) == {
        f"manual / manual / int4 / tvm / {HELD_OUT_QUESTIONS[0]}": 0.9,
        f"manual / manual / int4 / tvm / {HELD_OUT_QUESTIONS[1]}": 1.0,
        "perplexity ratio / a book / manual / int4": 1.01,
        "unchanged answers / ordinary / manual": 0.95,
        "in form of an entry / terms / off": 0.0,
        "in form of an entry / terms / manual": 0.75,
        **drafts,
    }


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for folder, names in (("assets", TRAINED), ("head", HEAD), (".", TEXTS)):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in names:
            (tmp_path / folder / name).write_text(name)
    (tmp_path / "assets" / "config.json").write_text('{"engram": {"row_dim": 32}}')
    (tmp_path / "head" / "mtp-config.json").write_text('{"num_layers": 1}')
    return tmp_path


def test_the_folder_of_a_new_model_has_what_the_repositorys_has(work: Path) -> None:
    complete(work)
    assert sorted(path.name for path in (work / "assets").iterdir()) == [
        "LICENSE-WordNet.txt",
        "README.md",
        "acceptance.json",
        "config.json",
        "dictionary.jsonl",
        "engram.safetensors",
        "manual-training.json",
        "manual.jsonl",
        "manual.overlay",
        "mtp-training.json",
        "mtp.safetensors",
        "site-training.json",
        "untrained.jsonl",
    ]
    assert (work / "assets" / "mtp-training.json").read_text() == "training.json"
    assert (work / "assets" / "README.md").read_text() == (KEPT / "README.md").read_text()
    config = json.loads((work / "assets" / "config.json").read_text())
    assert config == {"engram": {"row_dim": 32}, "mtp": {"num_layers": 1}}
    (work / "assets" / "README.md").write_text("another card")
    complete(work)
    assert (work / "assets" / "README.md").read_text() == "another card"


def test_a_work_folder_without_acceptance_is_not_bundled(work: Path) -> None:
    (work / "head" / "acceptance.json").unlink()
    with pytest.raises(RequestError) as caught:
        complete(work)
    assert str(caught.value) == (
        f"there is no {work / 'head' / 'acceptance.json'}; "
        "train the site, the manual's cartridge and the head and count its drafts first"
    )
