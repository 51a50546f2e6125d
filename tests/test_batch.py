"""``engram batch``: each line answered as the server would, whatever becomes of the others, and none twice."""

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command, Outcome
from tests.scripted_engine import ScriptedEngine
from tests.workshop import THREADS, Workshop

from engram_runtime import LLM
from engram_runtime.batch.answering import answer_lines
from engram_runtime.batch.lines import Line
from engram_runtime.batch.result import Result
from engram_runtime.batch.serving import responder
from engram_runtime.errors import TableError, TargetError
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.serving.engine_protocol import EngineError
from engram_runtime.tokenizer import TextTokenizer

PROMPTS = ["The tide", "A table of rows", "Über den Wolken", "twice a day", "the stream", "The hash"]
USAGE = {"prompt_tokens": 3, "completion_tokens": 5}


def line(number: int, **body: Any) -> Line:
    request = {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body}
    return Line(number, 0, json.dumps(request).encode())


def answers(lines: Sequence[Line], respond: Any, at_once: int = 2) -> list[Any]:
    """Return what lines are answered, as JSON values, in that order."""
    results: list[Result] = []
    asyncio.run(answer_lines(lines, respond, results.append, at_once=at_once))
    return [json.loads(result.text) for result in results]


async def echo(url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"url": url, **body, "usage": USAGE}


def test_an_answer_has_the_response_of_the_server() -> None:
    (found,) = answers([line(4, prompt="x")], echo)
    request_id = found["response"].pop("request_id")
    assert request_id.startswith("req_")
    assert found == {
        "id": "batch_req_4",
        "custom_id": "c4",
        "response": {"status_code": 200, "body": {"url": "/v1/completions", "prompt": "x", "usage": USAGE}},
        "error": None,
    }


def test_what_the_server_refuses_is_an_answer() -> None:
    async def refuse(url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        raise ApiError("n is 0, wanted 1 to 8", param="n", code=body["code"])

    coded, plain = answers([line(1, code="invalid_value"), line(2, code=None)], refuse, at_once=1)
    assert coded["error"] == {"code": "invalid_value", "message": "n is 0, wanted 1 to 8"}
    assert coded["response"]["status_code"] == 400
    assert coded["response"]["body"]["error"]["param"] == "n"
    assert plain["error"] == {"code": "invalid_request_error", "message": "n is 0, wanted 1 to 8"}


def test_a_line_that_is_no_request_is_answered_without_asking() -> None:
    first, second = answers([Line(1, 0, b"what?\n"), line(2, prompt="x")], echo, at_once=1)
    assert first == {
        "id": "batch_req_1",
        "custom_id": None,
        "response": None,
        "error": {
            "code": "invalid_line",
            "message": "line 1 is not valid JSON: Expecting value: line 1 column 1 (char 0); "
            "send a JSON object in UTF-8",
        },
    }
    assert second["error"] is None


def test_so_many_lines_are_under_way_as_asked_and_none_waits_for_a_slow_one() -> None:
    running = most = 0
    slow = asyncio.Event()

    async def respond(url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await (slow.wait() if body["n"] == 1 else asyncio.sleep(0))
        if body["n"] == 9:
            slow.set()
        running -= 1
        return await echo(url, body)

    found = answers([line(number, n=number) for number in range(1, 10)], respond, at_once=3)
    assert most == 3
    assert {each["custom_id"] for each in found} == {f"c{number}" for number in range(1, 10)}
    assert found.index(next(each for each in found if each["custom_id"] == "c1")) >= 7


def test_what_is_no_fault_of_a_request_ends_the_run() -> None:
    async def die(url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        raise TargetError("the engine has died")

    with pytest.raises(TargetError, match="the engine has died"):
        answers([line(1), line(2)], die)


def engine(workshop: Workshop) -> ScriptedEngine:
    return ScriptedEngine(TextTokenizer.load(workshop.uncompiled().path), lambda request: "a tide")


def ask(engine: ScriptedEngine) -> Any:
    (found,) = answers([line(1, model=engine.name, prompt="x", max_tokens=20)], responder(engine, 7.0))
    return found


def test_a_request_to_an_engine_has_the_time_of_a_batch(workshop: Workshop) -> None:
    asked = engine(workshop)
    assert ask(asked)["response"]["body"]["choices"][0]["text"] == "a tide"
    assert [request.time_limit_s for request in asked.requests] == [7.0]


def test_a_table_that_cant_be_read_is_an_answer(workshop: Workshop) -> None:
    asked = engine(workshop)
    asked.error = TableError("table layer_1 is gone")
    assert ask(asked)["error"] == {"code": "TableError", "message": "table layer_1 is gone"}


def test_a_full_queue_and_an_engine_that_has_died_end_the_run(workshop: Workshop) -> None:
    asked = engine(workshop)
    asked.slots = 0
    with pytest.raises(EngineError, match="0 texts are running"):
        ask(asked)
    asked.slots, asked.failure = 1, EngineError("a defect has ended the engine")
    with pytest.raises(EngineError, match="a defect has ended the engine"):
        ask(asked)


@pytest.fixture
def bundle(workshop: Workshop) -> Path:
    return workshop.ready().path


def write_requests(path: Path, *custom_ids: str, **body: Any) -> Path:
    """Write greedy requests, prompts in turn."""
    requests = [
        {
            "custom_id": custom_id,
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "compiled", "prompt": prompt, "max_tokens": 8, "temperature": 0, **body},
        }
        for custom_id, prompt in zip(custom_ids, [*PROMPTS, *PROMPTS], strict=False)
    ]
    path.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    return path


def texts(path: Path) -> dict[str, Any]:
    """Return the first text of each answer by its request."""
    found = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return {each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in found}


def run(command: Command, bundle: Path, *arguments: object) -> Outcome:
    return command("engram", "batch", bundle, *arguments, "--threads", THREADS)


IDS = [f"c{number}" for number in range(len(PROMPTS))]


def test_answers_are_the_texts_of_the_model(bundle: Path, command: Command, tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", *IDS)
    outcome = run(command, bundle, source, tmp_path / "out.jsonl", "--json")
    with LLM(bundle, threads=THREADS) as llm:
        made = {each: llm.generate(prompt, max_tokens=8) for each, prompt in zip(IDS, PROMPTS, strict=True)}
    assert outcome.code == 0
    assert texts(tmp_path / "out.jsonl") == {each: text.text for each, text in made.items()}
    found = outcome.json
    assert found.pop("seconds") > 0
    assert found.pop("completion_tok_s") > 0
    assert found == {
        "lines": 6,
        "before": 0,
        "answered": 6,
        "failed": 0,
        "prompt_tokens": sum(text.prompt_tokens for text in made.values()),
        "completion_tokens": sum(len(text.token_ids) for text in made.values()),
        "interrupted": False,
        "executor": "tvm",
        "tables_on": True,
        "parallel": 4,
    }


def test_a_run_goes_on_where_the_last_one_was_torn(bundle: Path, command: Command, tmp_path: Path) -> None:
    source, output, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    write_requests(source, *IDS)
    run(command, bundle, source, whole)
    kept = b"".join(whole.read_bytes().splitlines(keepends=True)[:4])
    output.write_bytes(whole.read_bytes()[: len(kept) + 30])
    outcome = run(command, bundle, source, output)
    assert outcome.out.startswith(f"{output}: 2 of 6 lines answered, 4 were before, 0 with an error; ")
    assert output.read_bytes().startswith(kept)
    assert texts(output) == texts(whole)
    assert run(command, bundle, source, output, "--json").json["answered"] == 0


def test_bad_lines_and_bodies_end_nothing(bundle: Path, command: Command, tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", "a", "b", "c")
    lines = source.read_text(encoding="utf-8").splitlines()
    bad = [lines[0].replace('"max_tokens": 8', '"max_tokens": -1'), "what?", lines[1].replace("compiled", "other")]
    source.write_text("\n".join([*bad, lines[2]]), encoding="utf-8")
    outcome = run(command, bundle, source, tmp_path / "out.jsonl", "--errors", tmp_path / "errors.jsonl", "--json")
    assert (outcome.code, outcome.json["answered"], outcome.json["failed"]) == (0, 4, 3)
    assert texts(tmp_path / "out.jsonl").keys() == {"c"}
    errors = [json.loads(text) for text in (tmp_path / "errors.jsonl").read_text().splitlines()]
    found = {each["custom_id"]: each["error"]["code"] for each in errors}
    assert found == {"a": "invalid_value", None: "invalid_line", "b": "model_not_found"}


def test_a_chat_is_answered(bundle: Path, command: Command, tmp_path: Path) -> None:
    body = {"model": "compiled", "messages": [{"role": "user", "content": "the tide"}], "max_tokens": 5, "n": 2}
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(request))
    assert run(command, bundle, tmp_path / "in.jsonl", tmp_path / "out.jsonl").code == 0
    (found,) = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [each["message"]["role"] for each in json.loads(found)["response"]["body"]["choices"]] == ["assistant"] * 2


INTERRUPTED = """
import sys
from engram_runtime.cli import main
sys.argv = ["engram", *sys.argv[1:]]
main()
"""


def test_ctrl_c_keeps_what_is_done(bundle: Path, command: Command, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_requests(source, *(f"c{number}" for number in range(12)), max_tokens=150, n=4)
    line = [sys.executable, "-c", INTERRUPTED, "batch", str(bundle), str(source), str(output), "--parallel", "1"]
    with subprocess.Popen([*line, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not output.exists() or not output.stat().st_size:
            assert process.poll() is None
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    found = json.loads(out)
    assert found["interrupted"]
    assert 0 < found["answered"] < 12
    assert len(texts(output)) == found["answered"]


def test_workers_without_ray_are_refused(bundle: Path, command: Command, tmp_path: Path) -> None:
    outcome = run(command, bundle, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--workers", 2)
    assert (outcome.code, outcome.err) == (2, "engram: --workers share the lines with --ray; give both or neither\n")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_batch_on_ray_has_the_answers_of_one_machine(bundle: Path, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source = write_requests(tmp_path / "in.jsonl", *(f"c{number}" for number in range(12)))
    output, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    run(command, bundle, source, alone)
    kept = b"".join(alone.read_bytes().splitlines(keepends=True)[:2])
    output.write_bytes(kept)
    line = ("engram", "batch", bundle, source, output, "--parallel", 1, "--workers", 2, "--json", "--ray")
    outcome = command(*line)
    assert (outcome.code, outcome.json["answered"]) == (0, 10), outcome.err
    assert output.read_bytes().startswith(kept)
    assert texts(output) == texts(alone)


def test_a_cluster_that_isnt_there_is_refused(bundle: Path, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source = write_requests(tmp_path / "in.jsonl", *IDS)
    outcome = run(command, bundle, source, tmp_path / "out.jsonl", "--ray", "auto")
    assert outcome.code == 4
    assert "engram: the batch on Ray can't go on: Could not find any running Ray instance." in outcome.err


def test_an_address_that_is_none_is_refused(bundle: Path, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    source = write_requests(tmp_path / "in.jsonl", *IDS)
    outcome = run(command, bundle, source, tmp_path / "out.jsonl", "--ray", "nowhere")
    assert outcome.code == 4
    assert "engram: the batch on Ray can't begin: Invalid address format: nowhere\n" in outcome.err
