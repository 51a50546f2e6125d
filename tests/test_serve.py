"""OpenAI's own client against a server of a tiny compiled bundle, and the command around it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam
from tests.conftest import Command
from tests.served import served
from tests.tiny import TinyModel, TinySite, edit_config
from tests.workshop import THREADS, Workshop, copy_folder

from engram_runtime import LLM, SamplingOptions
from engram_runtime.bundle import Bundle
from engram_runtime.serving.worker.process import WorkerProcess
from engram_runtime.serving.worker.remote import RemoteEngine
from engram_runtime.serving.worker.settings import WorkerSettings
from engram_runtime.tokenizer import TextTokenizer

MODEL = "tiny"
CONTEXT = 1024
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "The tide"}]
PLACE = {
    "type": "object",
    "properties": {"tide": {"enum": ["in", "out"]}, "high": {"type": "boolean"}},
    "required": ["tide", "high"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": PLACE}} for name in ("look", "ask")]


@pytest.fixture(scope="module")
def bundle(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle whose context holds the description of tools, under the name of its model."""
    folder = tmp_path_factory.mktemp("serve")
    checkpoint = copy_folder(workshop.checkpoint(TinyModel(), TinySite(convolution=False)), folder / "checkpoint")
    edit_config(checkpoint, max_position_embeddings=CONTEXT)
    compiled: Bundle = workshop.compiled(workshop.bundle(checkpoint, quant="int8"))
    return copy_folder(compiled.path, folder / f"{MODEL}.engram")


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    settings = WorkerSettings(path=bundle, executor="tvm", slots=4, queue=16, threads=THREADS)
    opened, tokenizer = Bundle.open(bundle), TextTokenizer.load(bundle)
    with RemoteEngine(opened, tokenizer, settings, WorkerProcess) as engine, served(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def asked(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    answer = client.chat.completions.create(**{"model": MODEL, "messages": HI, "max_tokens": 24, "seed": 1, **fields})
    assert isinstance(answer, ChatCompletion)
    return answer


def streamed(client: openai.OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    given = {"model": MODEL, "messages": HI, "max_tokens": 24, "seed": 1, **fields}
    return list(client.chat.completions.create(**given, stream=True))


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_an_answer_is_what_the_model_generates(client: openai.OpenAI, bundle: Path) -> None:
    with LLM(bundle, threads=THREADS) as llm:
        prompt_ids = llm.tokenizer.encode_chat([{"role": "user", "content": "The tide"}])
        made = llm.generate(prompt_ids, max_tokens=24, sampling=SamplingOptions(temperature=1.0, seed=1))
    answer = asked(client)
    assert answer.choices[0].message.content == made.text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt_ids), len(made.token_ids))
    assert (answer.model, answer.object) == (MODEL, "chat.completion")
    assert re.fullmatch("[0-9a-f]{12}", answer.system_fingerprint or "")


def test_a_stream_has_the_same_text_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    whole = asked(client)
    chunks = streamed(client, stream_options={"include_usage": True})
    assert text_of(chunks) == whole.choices[0].message.content
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    last, usage = chunks[-1].usage, whole.usage
    assert last is not None
    assert usage is not None
    assert (last.prompt_tokens, last.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert last.prompt_tokens_details is not None
    assert last.prompt_tokens_details.cached_tokens == last.prompt_tokens - 1


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    first, second = (asked(client, n=2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts[0] != texts[1]
    chunks = streamed(client, n=2)
    assert [text_of(chunks, index) for index in range(2)] == texts
    assert asked(client, seed=2).choices[0].message.content == texts[1]


def test_a_text_ends_before_a_stop_string(client: openai.OpenAI) -> None:
    whole = asked(client).choices[0].message.content or ""
    stop = whole[4:6]
    answer = asked(client, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert text_of(streamed(client, stop=stop)) == whole[: whole.index(stop)]


def test_biases_decide(client: openai.OpenAI, bundle: Path) -> None:
    answer = asked(client, logit_bias={"40": 100}, max_tokens=3)
    with LLM(bundle, threads=THREADS) as llm:
        assert answer.choices[0].message.content == llm.tokenizer.decode([40] * 3)


def test_logprobs_are_of_the_tokens_that_were_said(client: openai.OpenAI) -> None:
    answer = asked(client, logprobs=True, top_logprobs=3, temperature=0)
    said = answer.choices[0].logprobs
    assert said is not None
    assert said.content is not None
    spelled = b"".join(bytes(token.bytes or []) for token in said.content)
    assert spelled.decode(errors="replace") == answer.choices[0].message.content
    for token in said.content:
        assert len(token.top_logprobs) == 3
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
    chunks = streamed(client, logprobs=True, top_logprobs=3, temperature=0)
    entries = [choice.logprobs.content for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert [entry for content in entries for entry in content or []] == said.content


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
    answer = asked(client, response_format=form, max_tokens=100)
    found = json.loads(answer.choices[0].message.content or "")
    assert found.keys() == {"tide", "high"}
    assert answer.choices[0].finish_reason == "stop"
    chunks = streamed(client, response_format=form, max_tokens=100)
    assert text_of(chunks) == answer.choices[0].message.content


def test_a_required_tool_is_called_and_its_result_goes_into_the_next_request(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 300,
    }
    choice = asked(client, **fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in ("look", "ask")
    assert json.loads(call.function.arguments).keys() == {"tide", "high"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "high water"}
    again = asked(client, messages=[*HI, choice.message, result], tools=TOOLS, tool_choice="auto")
    assert again.usage is not None
    assert again.usage.prompt_tokens > 200


def test_the_calls_of_a_stream_are_those_of_the_whole(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "ask"}},
        "max_tokens": 300,
    }
    (expected,) = asked(client, **fields).choices[0].message.tool_calls or []
    chunks = streamed(client, **fields)
    deltas = [delta for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls or []]
    assert [delta.function.name for delta in deltas if delta.function and delta.function.name] == ["ask"]
    assert [delta.id for delta in deltas if delta.id]
    arguments = "".join(delta.function.arguments or "" for delta in deltas if delta.function)
    assert expected.type == "function"
    assert arguments == expected.function.arguments
    assert {delta.index for delta in deltas} == {0}


def test_completions_go_on_with_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["The tide", "rows"], max_tokens=5, seed=3, echo=True)
    alone = client.completions.create(model=MODEL, prompt="The tide", max_tokens=5, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text == f"The tide{alone.choices[0].text}"
    pieces = client.completions.create(model=MODEL, prompt="The tide", max_tokens=5, seed=3, stream=True)
    assert "".join(choice.text for chunk in pieces for choice in chunk.choices) == alone.choices[0].text


def test_completions_tell_logprobs_in_columns(client: openai.OpenAI) -> None:
    choice = client.completions.create(model=MODEL, prompt="The", max_tokens=6, logprobs=2, temperature=0).choices[0]
    columns = choice.logprobs
    assert columns is not None
    assert {len(columns.tokens or []), len(columns.token_logprobs or []), len(columns.text_offset or [])} == {6}
    assert [max(top.values()) for top in columns.top_logprobs or []] == columns.token_logprobs


def test_what_tables_did_is_told_where_it_is_asked_for(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 6, "extra_body": {"engram": {"usage": True, "activity": True}}}
    answer = asked(client, **fields)
    assert answer.usage is not None
    sites = answer.usage.model_extra["engram"]["sites"]  # type: ignore[index]
    (site,) = sites
    assert sites[site].keys() == {"rows", "unique", "bytes", "cold", "wait_ms"}
    tokens = answer.choices[0].model_extra["engram"]["tokens"]  # type: ignore[index]
    assert len(tokens) == answer.usage.completion_tokens
    assert all(len(token["sites"][site]["rows"]) == 4 for token in tokens)
    chunks = streamed(client, **fields)
    told = [
        choice.model_extra["engram"]["tokens"] for chunk in chunks for choice in chunk.choices if choice.model_extra
    ]
    assert [token for each in told for token in each] == tokens


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "engram-edge"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_tokens_go_there_and_back(url: str) -> None:
    told = httpx2.post(f"{url}/tokenize", json={"prompt": "The tide"}).json()
    assert told["count"] == len(told["tokens"])
    assert httpx2.post(f"{url}/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "The tide"}
    chat = httpx2.post(f"{url}/tokenize", json={"model": MODEL, "messages": HI}).json()
    assert chat["max_model_len"] == CONTEXT
    assert chat["count"] > told["count"]


def test_a_grammar_that_can_not_be_is_the_request_s_fault(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="the grammar has an error: "):
        asked(client, response_format=form)


def test_metrics_count(client: openai.OpenAI, url: str) -> None:
    def generated() -> float:
        text = httpx2.get(f"{url}/metrics").text
        (value,) = re.findall(r'^engram_tokens_total\{kind="generated",model="tiny"\} (\S+)$', text, re.MULTILINE)
        return float(value)

    asked(client, max_tokens=2)
    before = generated()
    asked(client, max_tokens=7)
    assert generated() == before + 7


KEY = "0123456789abcdef"
COMMAND = "from engram_runtime.cli import main; main()"


def worker_of(pid: int) -> int:
    """Return the only process that a process has started."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def asked_until_it_answers(client: openai.OpenAI) -> ChatCompletion:
    deadline = time.monotonic() + 60
    while True:
        try:
            return asked(client)
        except openai.InternalServerError as error:  # of any status from 500 on
            if error.status_code not in (502, 503) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_the_command_says_where_it_listens_outlives_its_worker_and_ends_at_sigterm(bundle: Path) -> None:
    options = ["--port", "0", "--parallel", "2", "--threads", "1", "--temperature", "0", "--verbose"]
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", str(bundle), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ENGRAM_API_KEY": KEY},
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        url = lines[0].split()[2].rstrip(";")
        assert lines[1].startswith(f"curl {url}/v1/chat/completions -H 'content-type: application/json' -H \"author")
        assert lines[2] == "ready: tiny\n"
        assert httpx2.get(f"{url}/health").json() == {"status": "ok"}
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            whole = asked(client, seed=1).choices
            assert asked(client, seed=2).choices == whole
            os.kill(worker_of(process.pid), signal.SIGKILL)
            assert asked_until_it_answers(client).choices == whole
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
        assert process.returncode == 0
    (line,) = (json.loads(line) for line in log.splitlines() if "/health" in line)
    assert (line["method"], line["route"], line["status"]) == ("GET", "/health", 200)


def test_the_command_refuses_what_it_can_not_serve(command: Command, bundle: Path, tmp_path: Path) -> None:
    assert command("engram", "serve", bundle, "--host", "0.0.0.0").err == (
        "engram: --host 0.0.0.0 can be reached by others, which needs a key; give --api-key-file or set "
        "ENGRAM_API_KEY\n"
    )
    assert "would both be model 'tiny'; rename a folder" in command("engram", "serve", bundle, bundle).err
    assert command("engram", "serve", bundle, "--temperature", "-1").err == (
        "engram: temperature is -1.0, wanted between 0 and 100\n"
    )
    missing = command("engram", "serve", tmp_path / "none.engram", "--port", "0")
    assert (missing.code, missing.out) == (3, "")
    assert "none.engram" in missing.err
    shutil.copytree(bundle, tmp_path / "raw.engram", ignore=shutil.ignore_patterns("lib"))
    raw = command("engram", "serve", tmp_path / "raw.engram", "--port", "0")
    assert (raw.code, raw.out) == (4, "")  # before it says where it listens
    assert "has no compiled library; run: engram compile" in raw.err


@pytest.mark.parametrize("lacking", ["uvicorn", "pydantic"])
def test_the_command_says_what_it_lacks(
    command: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    if lacking == "pydantic":
        monkeypatch.setattr("engram_runtime.commands.serve.WorkerProcess", pytest.fail)
    monkeypatch.delitem(sys.modules, "engram_runtime.server.run")
    monkeypatch.setitem(sys.modules, lacking, None)
    outcome = command("engram", "serve", bundle)
    assert (outcome.code, outcome.err) == (
        4,
        f"engram: engram serve needs {lacking}: pip install 'engram-edge[serve]'\n",
    )
