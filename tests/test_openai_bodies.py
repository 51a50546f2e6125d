"""Bodies of requests: what is asked of the engine for them, and that nothing out of range gets there."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.scripted_engine import ScriptedEngine
from tests.tiny import CONTEXT, TURN_END, TURN_START, save_tokenizer

from engram_runtime.openai_api.errors import ApiError
from engram_runtime.openai_api.job import Job, prepare
from engram_runtime.openai_api.json_body import parse_body
from engram_runtime.sampling import SamplingOptions
from engram_runtime.serving.request import TextRequest
from engram_runtime.tokenizer import TextTokenizer

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "now", "description": "The time.", "strict": True}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
# least, most, whether whole
BOUNDS: Mapping[str, tuple[float, float, bool]] = {
    "temperature": (0, 2, False),
    "top_p": (0, 1, False),
    "min_p": (0, 1, False),
    "top_k": (0, 1 << 20, True),
    "repetition_penalty": (0.01, 100, False),
    "frequency_penalty": (-2, 2, False),
    "presence_penalty": (-2, 2, False),
    "seed": (-(2**63), 2**63 - 1, True),
    "n": (1, 4, True),
    "max_tokens": (1, CONTEXT, True),
}
CHAT_BOUNDS = {**BOUNDS, "max_completion_tokens": (1, CONTEXT, True), "top_logprobs": (0, 20, True)}
COMPLETION_BOUNDS = {**BOUNDS, "logprobs": (0, 5, True)}
EXTREMES: list[Any] = [
    *(0, 1, 2, 3, 4, 5, 6, 20, 21, -1, -2),
    *(CONTEXT, CONTEXT + 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -0.1, 2.1, 1e-320, 1e308, -1e308, math.inf, -math.inf, math.nan),
    *(True, False, "1", "", [], [1], {}),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ScriptedEngine:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return ScriptedEngine(TextTokenizer.load(folder), lambda request: "")


def prepared(engine: ScriptedEngine, path: str = CHAT, **fields: Any) -> Job:
    given: dict[str, Any] = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
    return prepare({engine.name: engine}, path, {"model": engine.name, **given, **fields})


def request(engine: ScriptedEngine, path: str = CHAT, **fields: Any) -> TextRequest:
    (made,) = prepared(engine, path, **fields).requests
    return made


def refusal(engine: ScriptedEngine, path: str = CHAT, **fields: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        prepared(engine, path, **fields)
    assert caught.value.status == 400
    told: dict[str, Any] = caught.value.body()["error"]
    return told


def prompt(engine: ScriptedEngine, **fields: Any) -> str:
    return engine.tokenizer.decode(request(engine, **fields).prompt_ids, skip_special_tokens=False)


def turns(*turns: tuple[str, str]) -> str:
    said = "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in turns)
    return f"{said}{TURN_START}assistant\n"


@pytest.mark.parametrize(
    ("path", "field"), [(CHAT, field) for field in CHAT_BOUNDS] + [(COMPLETION, field) for field in COMPLETION_BOUNDS]
)
def test_numbers_are_taken_within_their_bounds_and_named_beyond_them(
    engine: ScriptedEngine, path: str, field: str
) -> None:
    least, most, whole = (CHAT_BOUNDS if path == CHAT else COMPLETION_BOUNDS)[field]
    more = {"logprobs": True} if field == "top_logprobs" else {}
    kinds = (int,) if whole else (int, float)
    valid = [value for value in EXTREMES if type(value) in kinds and least <= value <= most]
    assert valid
    for value in EXTREMES:
        if any(value is each for each in valid):
            prepared(engine, path, **{**more, field: value})
        else:
            assert refusal(engine, path, **{**more, field: value})["param"] == field


@pytest.mark.parametrize("value", [-101, 101, math.nan, math.inf, True, "1", None, []])
def test_biases_are_bounded(engine: ScriptedEngine, value: object) -> None:
    assert refusal(engine, logit_bias={"5": value})["param"] == "logit_bias"


@pytest.mark.parametrize("key", ["-1", "a", "", "1.0", "٣", "99999999999999999999", "0" * 10 + "9" * 5000, "300"])
def test_biases_are_of_tokens(engine: ScriptedEngine, key: str) -> None:
    assert refusal(engine, logit_bias={key: 1})["param"] == "logit_bias"


def test_what_is_asked_for_reaches_the_engine(engine: ScriptedEngine) -> None:
    made = request(
        engine,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        seed=9,
        frequency_penalty=1,
        presence_penalty=-1,
        logit_bias={"5": -100, "6": 2.5},
        stop="x",
        max_completion_tokens=12,
        logprobs=True,
        top_logprobs=3,
        engram={"activity": True},
    )
    assert made.sampling == SamplingOptions(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.125, repetition_penalty=1.5, seed=9
    )
    assert (made.frequency_penalty, made.presence_penalty, made.logit_bias) == (1, -1, {5: -100, 6: 2.5})
    assert (made.stop, made.max_tokens, made.top_logprobs, made.activity) == (("x",), 12, 3, True)
    assert made.grammar is None


def test_what_is_not_asked_for_has_openai_s_defaults(engine: ScriptedEngine) -> None:
    chat, completion = request(engine), request(engine, COMPLETION)
    assert chat.sampling == completion.sampling == SamplingOptions(temperature=1.0)
    assert chat.max_tokens == CONTEXT - len(chat.prompt_ids)
    assert completion.max_tokens == 16
    assert (chat.top_logprobs, chat.stop, chat.activity) == (None, (), False)


def test_null_is_not_asked_for(engine: ScriptedEngine) -> None:
    fields: dict[str, Any] = {
        **dict.fromkeys(CHAT_BOUNDS),
        "tools": None,
        "functions": None,
        "stop": None,
        "response_format": None,
    }
    assert request(engine, **fields) == request(engine)


def test_the_makers_defaults_come_before_openai_s(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    engine = ScriptedEngine(TextTokenizer.load(tmp_path), lambda request: "")
    assert request(engine, temperature=0.7).sampling == SamplingOptions(temperature=0.7, top_k=20)


def test_choices_have_seeds_of_their_own(engine: ScriptedEngine) -> None:
    assert [made.sampling.seed for made in prepared(engine, n=3, seed=4).requests] == [4, 5, 6]
    assert [made.sampling.seed for made in prepared(engine, n=2, seed=-1).requests] == [2**64 - 1, 2**64]
    assert [made.sampling.seed for made in prepared(engine, n=2).requests] == [None, None]


def test_several_prompts_are_texts_of_one_job(engine: ScriptedEngine) -> None:
    made = prepared(engine, COMPLETION, prompt=["Hi", "Ho"], n=2).requests
    first, second = engine.tokenizer.encode("Hi"), engine.tokenizer.encode("Ho")
    assert [list(text.prompt_ids) for text in made] == [first, first, second, second]
    assert [text.prompt_ids for text in prepared(engine, COMPLETION, prompt=[[5, 6], [7]]).requests] == [(5, 6), (7,)]
    assert request(engine, COMPLETION, prompt=[5, 6]).prompt_ids == (5, 6)


def test_fields_that_change_nothing_may_hold_anything(engine: ScriptedEngine) -> None:
    ignored: dict[str, Any] = {
        "user": {"a": 1},
        "metadata": [],
        "store": True,
        "service_tier": 3,
        "safety_identifier": "x",
    }
    assert request(engine, **ignored) == request(engine)


@pytest.mark.parametrize(
    ("path", "fields", "message", "param"),
    [
        (CHAT, {"functions": []}, "functions is not supported; use tools", "functions"),
        (CHAT, {"audio": {}}, "audio is not supported; answers are text", "audio"),
        (
            CHAT,
            {"reasoning_effort": "low"},
            "reasoning_effort is not supported; say in a message how to reason",
            "reasoning_effort",
        ),
        (COMPLETION, {"suffix": "x"}, "suffix is not supported; put what follows into the prompt", "suffix"),
        (COMPLETION, {"best_of": 2}, "best_of is not supported; ask for n choices with logprobs and choose", "best_of"),
        (
            COMPLETION,
            {"echo": True, "logprobs": 1},
            "echo with logprobs is not supported: the prompt's tokens have none here",
            None,
        ),
        (COMPLETION, {"prompt": ["a"] * 8, "n": 3}, "prompts times n make 24 texts, wanted at most 16", None),
        (COMPLETION, {"prompt": ""}, "the prompt is empty, wanted at least one token", "prompt"),
        (COMPLETION, {"prompt": [300]}, "prompt has token 300, the vocabulary ends at 299", "prompt"),
        (CHAT, {"temprature": 1}, "temprature is not a field that is known here", "temprature"),
        (CHAT, {"model": 3}, "model is 3, wanted a valid string", "model"),
        (
            CHAT,
            {"messages": []},
            "messages is [], list should have at least 1 item after validation, not 0",
            "messages",
        ),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0] is {'role': 'user'}, wanted content", "messages[0]"),
        (
            CHAT,
            {"messages": [{"role": "robot", "content": ""}]},
            "messages[0].role is 'robot', wanted 'system', 'developer', 'user', 'assistant' or 'tool'",
            "messages[0].role",
        ),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content is [{'type': 'image_url', 'image_url': {'url': 'x'}}], wanted parts of type text, "
            "this model takes no image_url",
            "messages[0].content",
        ),
        (
            CHAT,
            {"stop": ["x"] * 9},
            f"stop is {['x'] * 9}, list should have at most 8 items after validation, not 9",
            "stop",
        ),
        (CHAT, {"stop": ""}, "stop[0] is '', string should have at least 1 character", "stop[0]"),
        (
            CHAT,
            {"stream_options": {"include": True}},
            "stream_options.include is not a field that is known here",
            "stream_options.include",
        ),
        (CHAT, {"top_logprobs": 2}, "top_logprobs needs logprobs to be true", None),
        (CHAT, {"tool_choice": "required"}, "tool_choice needs tools", None),
        (CHAT, {"tools": [TOOL, TOOL]}, "tools have two functions of one name", None),
        (
            CHAT,
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "then"}}},
            "tool_choice names 'then', which is none of the tools",
            None,
        ),
        (
            CHAT,
            {"response_format": {"type": "json_schema"}},
            "response_format is {'type': 'json_schema'}, json_schema belongs to the type json_schema, and only to it",
            "response_format",
        ),
    ],
)
def test_what_can_not_be_done_is_said(
    engine: ScriptedEngine, path: str, fields: dict[str, Any], message: str, param: str | None
) -> None:
    told = refusal(engine, path, **fields)
    assert (told["message"], told["param"], told["type"]) == (message, param, "invalid_request_error")


def test_a_prompt_beyond_the_context_has_openai_s_code(engine: ScriptedEngine) -> None:
    told = refusal(engine, messages=[{"role": "user", "content": "x" * 400}])
    assert told["code"] == "context_length_exceeded"
    assert told["message"].endswith("tokens, of a context of 192 one must be left; shorten it")
    assert refusal(engine, max_tokens=CONTEXT + 1)["code"] == "context_length_exceeded"


def test_a_prompt_that_is_refused_while_it_is_read_has_it_too(engine: ScriptedEngine) -> None:
    text = "é" * 100_000
    for told, param in (
        (refusal(engine, messages=[{"role": "user", "content": text}]), "messages"),
        (refusal(engine, COMPLETION, prompt=text), "prompt"),
    ):
        assert (told["code"], told["param"]) == ("context_length_exceeded", param)
        assert told["message"].endswith(" tokens, wanted at most 192; shorten it")


def test_more_tokens_than_are_left_become_those_that_are(engine: ScriptedEngine) -> None:
    made = request(engine, max_tokens=CONTEXT)
    assert made.max_tokens == CONTEXT - len(made.prompt_ids)


def test_an_unknown_model_is_not_found(engine: ScriptedEngine) -> None:
    with pytest.raises(ApiError) as caught:
        prepared(engine, model="other")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert str(caught.value) == "there is no model 'other', wanted one of scripted"


def test_parts_are_lines_and_developers_are_the_system(engine: ScriptedEngine) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
    ]
    assert prompt(engine, messages=messages) == turns(("system", "Be brief."), ("user", "Hi\nthere"))


def test_a_template_without_tools_gets_them_as_text(engine: ScriptedEngine) -> None:
    messages = [
        *({"role": "system", "content": "Be brief."}, *HI),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    wide = ScriptedEngine(engine.tokenizer, lambda request: "", context_length=2000)
    said = prompt(wide, messages=messages, tools=[TOOL])
    signature = '{"type": "function", "function": {"name": "now", "description": "The time."}}'
    assert f"<tools>\n{signature}\n</tools>" in said
    assert said.startswith(f"{TURN_START}system\nBe brief.\n\n# Tools\n")
    assert said.endswith(
        turns(
            ("user", "Hi"),
            ("assistant", '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'),
            ("user", "<tool_response>\n12:00\n</tool_response>"),
        )
    )


HERMES = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}{% endfor %}"
)


def test_a_template_with_tools_gets_them_as_they_are(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(HERMES)
    engine = ScriptedEngine(TextTokenizer.load(tmp_path), lambda request: "", context_length=2000)
    messages = [
        *HI,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    assert prompt(engine, messages=messages, tools=[TOOL]) == (
        '[{"type": "function", "function": {"name": "now", "description": "The time."}}] <tool_call>'
        '[user] Hi[assistant] now({"zone": "UTC"})[tool] 12:00'
    )
    assert prompt(engine, messages=HI) == "[user] Hi"


def test_arguments_of_a_call_are_an_object(engine: ScriptedEngine) -> None:
    call = {**CALL, "function": {"name": "now", "arguments": "["}}
    told = refusal(engine, messages=[*HI, {"role": "assistant", "tool_calls": [call]}])
    assert told["message"].startswith("the arguments of now is not valid JSON: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "the body holds a JSON list, expected an object; send a JSON object in UTF-8"),
        (b'{"a": NaN}', "the body is not valid JSON: NaN is not a JSON number; send a JSON object in UTF-8"),
        (b'{"a": 1, "a": 2}', "the body is not valid JSON: key 'a' stands twice; send a JSON object in UTF-8"),
        (b'{"a": "\\ud800"}', "the body has half of a surrogate pair, wanted whole characters"),
        (b'{"a": [' + b"[]," * 40_000 + b"1]}", "the body has 40002 objects and lists, wanted at most 32768"),
        (
            json.dumps({f"k{number}": 1 for number in range(5000)}).encode(),
            "the body has an object of 5000 keys, wanted at most 4096",
        ),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "the body is nested more than 64 levels deep; flatten it"),
    ],
)
def test_json_is_read_strictly(text: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(text)
    assert str(caught.value) == message


def test_brackets_in_texts_are_no_lists() -> None:
    body = {"a": "[{" * 40_000 + '"'}
    assert parse_body(json.dumps(body)) == body


@pytest.mark.parametrize("text", [b'{"a": "' + b'\\"' * 400_000 + b"[" * 40_000, b'"' + b'\\"[' * 300_000])
def test_a_text_that_doesn_t_end_is_read_in_linear_time(text: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not valid JSON: "):
        parse_body(text)


@pytest.mark.parametrize("text", [b'{"a":' * 10_000, b"[" * 30_000, b"\xff", b"", b"{"])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(
        ApiError, match=r"the body is not (valid JSON: |UTF-8: byte 0 is wrong; send a JSON object in UTF-8$)"
    ):
        parse_body(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELD_NAMES = [
    *CHAT_BOUNDS,
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "stop",
    "logit_bias",
    "stream_options",
]


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text costs seconds on a busy machine
@given(fields=st.dictionaries(st.sampled_from(FIELD_NAMES), JSON, max_size=4))
def test_any_values_are_served_or_refused(engine: ScriptedEngine, fields: dict[str, Any]) -> None:
    with contextlib.suppress(ApiError):
        assert len(prepared(engine, **fields).requests) == (fields.get("n") or 1)
