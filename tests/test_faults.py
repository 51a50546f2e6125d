"""What runs the rows of faults: a row that crashes, hangs or raises is a row that wasn't survived."""

import json
from pathlib import Path

import pytest
from tests import bad_rows
from tests.faults.rows import Placed, place, placed_rows
from tests.faults.runner import Result, from_both_ends, run_rows
from tests.faults.table import table, write_json

from tools.security_page import figures_text

LAST_ROWS = {"A": 7, "B": 7, "C": 13, "D": 10}
# What `make faults` must make at least; rows that aren't here make fewer, as each takes long.
LEAST = {
    **dict.fromkeys(("A1", "A2", "A3 safetensors", "A3 onnx", "A3 tokenizer", "A3 overlay", "A3 streams"), 10_000),
    **{"B1": 200, "B1 compile": 50, "C1": 1000, "C3": 10_000, "C4 verify": 10_000, "C4 reads": 10_000},
    **{"C5": 1_000_000, "C12": 50, "D1 bodies": 50_000, "D5 engine": 10_000},
}
LEFT_TO_FULL = {"B3 replace", "B3 compile"}
HANGS_AFTER_S, ORDINARY_LIMIT_S = 3, 100


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    placed = [Placed(row, bad_rows.__name__) for row in bad_rows.ROWS]
    shown: list[Result] = []
    # Ordinary rows may take long to start on a machine that others use.
    hanging = [each for each in placed if each.row.run is bad_rows.hangs]
    ordinary = [each for each in placed if each.row.run is not bad_rows.hangs]
    limits = ((ordinary, ORDINARY_LIMIT_S), (hanging, HANGS_AFTER_S))
    runs = [run_rows(rows, lambda row: row.quick, limit_s, shown.append) for rows, limit_s in limits]
    found = sorted([*runs[0], *runs[1]], key=lambda result: place(result.name))
    assert sorted(shown, key=lambda result: place(result.name)) == found
    return {result.name: result for result in found}


@pytest.mark.parametrize(("count", "order"), [(0, []), (1, [0]), (4, [0, 3, 1, 2]), (5, [0, 4, 1, 3, 2])])
def test_rows_begin_from_both_ends(count: int, order: list[int]) -> None:
    assert from_both_ends(count) == order


def test_what_survived_is_counted(results: dict[str, Result]) -> None:
    assert [(result.tried, result.survived) for result in results.values()] == [
        (3, 3),
        (3, 2),
        (3, 0),
        (3, 0),
        (3, 0),
        (0, 0),
        (0, 0),
    ]
    assert [name for name, result in results.items() if result.passed] == ["A1", "D1", "D2"]


def test_a_bad_end_is_named(results: dict[str, Result]) -> None:
    assert results["A2"].failures == ("seed 7",)
    assert results["A10"].failures[0].startswith("ended by SIGSEGV; its last lines:\n")
    assert "Fatal Python error: Segmentation fault" in results["A10"].failures[0]
    assert results["B1"].failures[0].startswith("ended with exit code 1; its last lines:\n")
    assert results["B1"].failures[0].endswith("KeyError: 'tables'")
    assert results["C1 hang"].failures[0].startswith("hung: killed after 3 s; its last lines:\n")
    assert results["D1"].reason == "needs a disk that lies"
    assert results["D2"].reason == "takes long, so make faults-full has it"


def test_what_a_row_started_ends_with_it(results: dict[str, Result]) -> None:
    assert results["C1 hang"].seconds >= HANGS_AFTER_S
    commands = (each.read_bytes() for each in Path("/proc").glob("[0-9]*/cmdline") if each.exists())
    assert not any(b"4242.25" in command for command in commands)


def test_the_table_has_every_row_and_then_what_was_not_survived(results: dict[str, Result]) -> None:
    text = table(list(results.values()))
    assert text.splitlines()[0].split() == ["row", "fault", "tried", "survived", "figure", "limit", "s", "cpu", "s"]
    assert [line.split()[0] for line in text.splitlines()[1:8]] == ["A1", "A2", "A10", "B1", "C1", "D1", "D2"]
    assert "not run: needs a disk that lies" in text
    assert "A2: 1 not survived\nseed 7\n" in text
    assert "\n5 rows: 5 of 15 faults survived; 2 rows not run; " in text


def test_the_file_repeats_the_results(results: dict[str, Result], tmp_path: Path) -> None:
    write_json(tmp_path / "faults.json", "quick", list(results.values()))
    written = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))
    assert [(row["name"], row["tried"], row["survived"]) for row in written["rows"]] == [
        (result.name, result.tried, result.survived) for result in results.values()
    ]


def test_the_page_has_what_ran_as_a_table_and_names_the_rest(results: dict[str, Result], tmp_path: Path) -> None:
    write_json(tmp_path / "faults.json", "quick", list(results.values()))
    lines = figures_text(json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))).splitlines()
    assert lines[0].startswith("`make faults` on 20")
    assert lines[0].endswith(": 5 of 15 faults survived.")
    assert "| A1 | a fault | 3 | 3 | 0.1 s | nothing |" in lines
    assert "| A2 | a fault | 3 | **2** |  | nothing |" in lines
    assert lines[-2:] == [
        "- D1, a fault: needs a disk that lies",
        "- D2, a fault: takes long, so make faults-full has it",
    ]


def test_every_kind_of_fault_has_a_row() -> None:
    """The table of goals is A1 to A7, B1 to B7, C1 to C13 and D1 to D10."""
    wanted = {(letter, number) for letter, last in LAST_ROWS.items() for number in range(1, last + 1)}
    assert wanted - {place(placed.row.name)[:2] for placed in placed_rows()} == set()


def test_the_quick_tier_makes_as_many_faults_as_is_promised() -> None:
    quick = {placed.row.name: placed.row.quick for placed in placed_rows()}
    assert [(name, quick[name]) for name, least in LEAST.items() if quick[name] < least] == []
    assert {name for name, count in quick.items() if count == 0} == LEFT_TO_FULL


def test_names_of_rows_are_letter_number_word_and_different() -> None:
    names = [placed.row.name for placed in placed_rows()]
    assert len(set(names)) == len(names)
    assert [place(name) for name in names] == sorted(place(name) for name in names)
    assert sorted(["A10", "A9", "A9 b"], key=place) == ["A9", "A9 b", "A10"]
    with pytest.raises(ValueError, match="'E1' is no name of a row"):
        place("E1")
