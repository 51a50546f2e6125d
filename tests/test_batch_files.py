"""Batch files: lines of any length, requests told apart, answers that another run goes on from."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_runtime.batch.input_file import read_input
from engram_runtime.batch.lines import Line, index_lines, key, read_lines
from engram_runtime.batch.output_file import OutputFile
from engram_runtime.batch.request import MAX_ID_CHARS, MAX_LINE_BYTES, BadLine, BatchRequest, parse_request
from engram_runtime.batch.result import Result, answered, result_text
from engram_runtime.batch.results import open_batch
from engram_runtime.errors import EngramError, RequestError

LINE: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
SEND = "send a JSON object in UTF-8"


def spell(**changes: Any) -> str:
    return json.dumps({**LINE, **changes})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def requests(path: Path, *custom_ids: str) -> Path:
    return write(path, *(spell(custom_id=custom_id) for custom_id in custom_ids))


def ids(path: Path) -> list[Any]:
    return [json.loads(line)["custom_id"] for line in path.read_text(encoding="utf-8").splitlines()]


def refusal(error: pytest.ExceptionInfo[EngramError], folder: Path) -> str:
    return str(error.value).replace(f"{folder}{os.sep}", "")


@given(st.lists(st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"")), min_size=1), st.integers(1, 8))
def test_lines_are_those_of_the_file_and_long_ones_are_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: Sequence[bytes], most: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines"
    path.write_bytes(b"\n".join(texts))
    with path.open("rb") as file:
        found = list(read_lines(file, most))
    whole = [text + b"\n" for text in texts[:-1]] + ([texts[-1]] if texts[-1] else [])
    assert [(line.number, line.text) for line in found] == [
        (number, text[: most + 1]) for number, text in enumerate(whole, 1)
    ]
    index = index_lines(path, found, lambda line: key(None, line.number))
    assert list(index.lines(most)) == [line for line in found if not line.text.isspace()]


def test_a_line_is_a_request() -> None:
    assert parse_request(Line(1, 0, spell().encode())) == BatchRequest("a", "/v1/completions", {"prompt": "x"})


@pytest.mark.parametrize(
    ("text", "custom_id", "reason"),
    [
        ("what?", None, f"line 7 is not valid JSON: Expecting value: line 1 column 1 (char 0); {SEND}"),
        ("[]", None, f"line 7 holds a JSON list, expected an object; {SEND}"),
        ('{"body": {}, "body": 1}', None, f"line 7 is not valid JSON: key 'body' stands twice; {SEND}"),
        (
            '{"custom_id": "a", "body": ' + "[" * 64 + "]" * 64 + "}", None,
            "line 7 is nested more than 64 levels deep; flatten it",
        ),
        ('{"method": "POST"}', None, "line 7 has no key 'custom_id'"),
        (spell(custom_id=5), None, "line 7.custom_id is 5, expected a string"),
        (spell(custom_id=""), None, "line 7.custom_id has 0 characters, expected 1 to 512"),
        (spell(custom_id="\0"), None, "line 7.custom_id is '\\x00', expected text without NUL and lone surrogates"),
        (spell(method="GET"), "a", "line 7.method is 'GET', expected 'POST'"),
        (
            spell(url="/v1/embeddings"), "a",
            "line 7.url is '/v1/embeddings', expected one of ['/v1/chat/completions', '/v1/completions']",
        ),
        (spell(body="x"), "a", "line 7.body is 'x', expected an object"),
        (spell(priority=1), "a", "line 7 has unknown keys ['priority']; it may need a newer engram-edge"),
        (spell(body={"x": "y" * MAX_LINE_BYTES}), None, "line 7 has more than 1048576 bytes, the most that is allowed"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_request_says_why(text: str, custom_id: str | None, reason: str) -> None:
    assert parse_request(Line(7, 0, text.encode())) == BadLine(custom_id, reason)


def test_the_longest_id_is_taken() -> None:
    assert parse_request(Line(1, 0, spell(custom_id="i" * MAX_ID_CHARS).encode())).custom_id == "i" * MAX_ID_CHARS


def test_blank_lines_are_passed_over_and_count(tmp_path: Path) -> None:
    index = read_input(write(tmp_path / "in.jsonl", "", spell(), "  ", spell(custom_id="b"), ""))
    assert index.numbers.tolist() == [2, 4]
    assert [line.text.decode() for line in index.lines(MAX_LINE_BYTES)] == [spell() + "\n", spell(custom_id="b") + "\n"]


@pytest.mark.parametrize(
    ("custom_ids", "message"),
    [
        (["a", "b", "a"], "lines 1 and 3 of in.jsonl have the same custom_id 'a'"),
        (
            ["a", "b", "b", "b", "a"],
            "lines 2 and 3 of in.jsonl have the same custom_id 'b', and 2 more lines have one that stands before them",
        ),
    ],
)
def test_an_id_that_stands_twice_is_refused(tmp_path: Path, custom_ids: Sequence[str], message: str) -> None:
    with pytest.raises(RequestError) as error:
        read_input(requests(tmp_path / "in.jsonl", *custom_ids))
    assert refusal(error, tmp_path) == f"{message}; answers are told apart by it, so give each line its own"


def test_an_input_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as error:
        read_input(write(tmp_path / "in.jsonl", ""))
    assert refusal(error, tmp_path) == "input in.jsonl holds no requests; it takes one JSON object a line"
    with pytest.raises(RequestError) as error:
        read_input(tmp_path / "none.jsonl")
    assert refusal(error, tmp_path) == "input none.jsonl can't be read: No such file or directory"


@given(st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), st.integers(1, 10**9))
def test_answers_are_read_as_they_were_written(custom_id: str | None, number: int) -> None:
    text = result_text(number, custom_id, {"body": {"text": "half a pair: \ud800, whole: 日本語\n"}}, None)
    assert answered(Line(1, 0, text)) == (custom_id, 0 if custom_id else number)
    assert json.loads(text)["response"]["body"]["text"] == "half a pair: \ud800, whole: 日本語\n"


def answer(path: Path, *custom_ids: str) -> Path:
    path.write_bytes(b"".join(result_text(1, custom_id, {}, None) for custom_id in custom_ids))
    return path


@settings(deadline=None)  # each is an fsync, of a disk that others may use
@given(st.integers(0, 400))
def test_what_was_answered_is_left_out_and_a_torn_line_is_cut_off(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    source = requests(folder / "in.jsonl", "a", "b", "c", "d")
    output = answer(folder / "out.jsonl", "c", "a", "d", "b")
    whole = output.read_bytes()
    output.write_bytes(whole[:cut])
    with open_batch(source, output, None) as (pending, tally, put):
        lines = list(pending.lines(MAX_LINE_BYTES))
        kept = output.read_bytes()
        for line in lines:
            put(result(line))
    assert kept == whole[: whole[:cut].rfind(b"\n") + 1]
    assert (tally.before, tally.answered) == (kept.count(b"\n"), len(lines))
    assert sorted(ids(output)) == ["a", "b", "c", "d"]


def result(line: Line, *, failed: bool = False) -> Result:
    return Result(text=result_text(line.number, parse_request(line).custom_id, None, None), failed=failed)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("notes", "line 1 is no answer"),
        ("notes\n", "line 1 is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        (spell() + "\n", "line 1 has keys ['body', 'custom_id', 'method', 'url']"),
        (
            '{"id": "x", "custom_id": null, "response": null, "error": null}\n',
            "line 1 has neither a custom_id nor the id of an answer to a line",
        ),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(RequestError) as error:
        OutputFile(path)
    assert refusal(error, tmp_path) == f"out.jsonl is no output of a batch: {reason}; choose another place"
    assert path.read_text() == content


def test_the_output_of_another_input_is_refused(tmp_path: Path) -> None:
    source = requests(tmp_path / "in.jsonl", "a", "b")
    with pytest.raises(RequestError) as error, open_batch(source, answer(tmp_path / "out.jsonl", "a", "z"), None):
        pass
    assert refusal(error, tmp_path) == (
        "line 2 of out.jsonl answers custom_id 'z', which in.jsonl doesn't have: it belongs to another input; "
        "choose another place"
    )


def test_an_output_that_is_being_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with OutputFile(path), pytest.raises(RequestError) as error:
        OutputFile(path)
    assert refusal(error, tmp_path) == "another process writes out.jsonl; let it finish or choose another place"


def test_errors_may_go_to_a_file_of_their_own_and_count_as_answers(tmp_path: Path) -> None:
    source = requests(tmp_path / "in.jsonl", "a", "b", "c")
    output, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    with open_batch(source, output, errors) as (pending, tally, put):
        for line, failed in zip(pending.lines(MAX_LINE_BYTES), [False, True], strict=False):
            put(result(line, failed=failed))
    assert (tally.answered, tally.failed) == (2, 1)
    assert (ids(output), ids(errors)) == (["a"], ["b"])
    with open_batch(source, output, errors) as (pending, _, _):
        assert pending.numbers.tolist() == [3]
    errors.unlink()
    with open_batch(source, output, errors) as (pending, _, _):
        assert pending.numbers.tolist() == [2, 3]


def test_errors_and_output_are_two_files(tmp_path: Path) -> None:
    source, output = requests(tmp_path / "in.jsonl", "a"), tmp_path / "out.jsonl"
    with pytest.raises(RequestError) as error, open_batch(source, output, output):
        pass
    assert refusal(error, tmp_path) == "out.jsonl is the output itself; leave out --errors or choose another file"


def test_a_line_without_an_id_is_told_of_once_and_may_be_mended(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", spell(), "what?"), tmp_path / "out.jsonl"
    with open_batch(source, output, None) as (pending, _, put):
        for line in pending.lines(MAX_LINE_BYTES):
            put(result(line))
    with open_batch(source, output, None) as (pending, _, _):
        assert len(pending) == 0
    requests(source, "a", "b")
    with open_batch(source, output, None) as (pending, _, _):
        assert pending.numbers.tolist() == [2]
