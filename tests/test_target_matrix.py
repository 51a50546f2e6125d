"""The page on targets: what became of each, and that profiles claim no more."""

import dataclasses
import json
from typing import Any

import pytest

from engram_targets import load_profile, profile_names
from tools.target_matrix import (
    MATRIX,
    NATIVELY,
    NOT_RUN,
    ON_POCL,
    SIMULATED,
    UNDER_QEMU,
    Row,
    evidence_of,
    left_out,
    table,
    targets_page,
)

MODELS: dict[str, Any] = json.loads(MATRIX.read_text(encoding="utf-8"))
ROWS = [Row(**row) for facts in MODELS.values() for row in facts["rows"]]
RAN = Row(
    target="box",
    box="this machine",
    compiled=True,
    run=NATIVELY,
    reason="",
    same_tokens=True,
    code_bytes=1_234_567,
    weights_bytes=2_000,
)
LEFT = dataclasses.replace(RAN, run=NOT_RUN, reason="no driver", same_tokens=None)


@pytest.mark.parametrize("name", sorted({row.target for row in ROWS}))
def test_a_profile_claims_what_the_matrix_shows(name: str) -> None:
    assert load_profile(name).evidence == evidence_of(ROWS, name)


def test_the_matrix_is_of_targets_there_are() -> None:
    assert {row.target for row in ROWS} == set(profile_names())


def test_targets_that_were_not_tried_are_named() -> None:
    assert left_out(ROWS[:1]) == sorted(set(profile_names()) - {ROWS[0].target})
    assert all(f"`{name}`" in targets_page() for name in left_out(ROWS))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.target} {row.box}")
def test_what_has_run_says_the_same_tokens_and_what_has_not_says_why(row: Row) -> None:
    assert (row.same_tokens, row.reason == "") == ((None, False) if row.run == NOT_RUN else (True, True))


@pytest.mark.parametrize(
    ("ways", "evidence"),
    [
        ([], "compiled"),
        ([NOT_RUN], "compiled"),
        ([UNDER_QEMU, NOT_RUN], "emulated"),
        ([ON_POCL], "emulated"),
        ([SIMULATED], "simulated"),
        ([UNDER_QEMU, NATIVELY], "hardware"),
    ],
)
def test_evidence_is_the_best_way_in_which_a_target_has_run(ways: list[str], evidence: str) -> None:
    rows = [dataclasses.replace(RAN, run=way) for way in ways]
    assert evidence_of([*rows, dataclasses.replace(RAN, target="other")], "box") == evidence


def test_what_said_other_tokens_is_no_evidence() -> None:
    assert evidence_of([dataclasses.replace(RAN, same_tokens=False)], "box") == "compiled"


def test_a_table_tells_tokens_or_the_reason() -> None:
    assert table([RAN, LEFT]).splitlines() == [
        "| target | box | compiled | run | same tokens | code | weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| `box` | this machine | yes | natively | yes | 1.23 MB | 0.00 MB |",
        "| `box` | this machine | yes | no | no driver | 1.23 MB | 0.00 MB |",
    ]


def test_the_page_has_every_row() -> None:
    page = targets_page()
    assert [row for row in ROWS if table([row]).splitlines()[-1] not in page] == []
