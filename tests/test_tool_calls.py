"""Calls of tools are read from a text the same way however it is cut into pieces, and follow their schemas."""

import json
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.test_token_bytes import tokenizer as tokenizer

from engram_runtime.openai_api.chat_body import ChatBody
from engram_runtime.openai_api.errors import ApiError
from engram_runtime.openai_api.grammars import answer_grammar
from engram_runtime.openai_api.tool_calls import Call, CallReader, Grown

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now-utc"}},
]
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "}\\n</tool_call>"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now-utc", "arguments": {}}\n</tool_call>'
CALLS = [Call("weather", '{"city": "}\\n</tool_call>"}'), Call("now-utc", "{}")]


def body(**fields: Any) -> ChatBody:
    return ChatBody.parse({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields})


def follows(text: str, **fields: Any) -> bool:
    """Whether a text is one that the grammar of a request accepts as a whole."""
    grammar = answer_grammar(body(**fields))
    tokens = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokens, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokens.tokenize_str(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@given(data=st.data())
def test_calls_are_read_alike_from_any_pieces(data: st.DataObject) -> None:
    said = data.draw(st.sampled_from(["", "Let me see.\n", "a <b>\n<tool\n\n"]))
    text = f"{said}{WEATHER}\n{NOW}"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    reader = CallReader()
    grown = [
        each for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) for each in reader.push(text[start:end])
    ]
    grown += reader.finish()
    assert (reader.text, reader.calls) == (said.removesuffix("\n"), CALLS)
    assert "".join(each.text for each in grown) == reader.text
    for index, call in enumerate(CALLS):
        assert [each.name for each in grown if each.index == index and each.name] == [call.name]
        assert "".join(each.arguments for each in grown if each.index == index) == call.arguments


@pytest.mark.parametrize("text", ["plain", "a <tool_call", "<tool_call", "x\n", "<tool_call>x"])
def test_text_that_only_looks_like_a_call_is_text(text: str) -> None:
    reader = CallReader()
    pieces = [each.text for letter in text for each in reader.push(letter)]
    pieces += [each.text for each in reader.finish()]
    assert ("".join(pieces), reader.text, reader.calls) == (text, text, [])


@pytest.mark.parametrize(("cut", "arguments_cut"), [(13, 0), (14, 0), (15, 1), (30, 16)])
def test_a_call_that_is_cut_off_keeps_what_came_of_its_arguments(cut: int, arguments_cut: int) -> None:
    reader = CallReader()
    reader.push(WEATHER[:-cut])
    reader.finish()
    whole = CALLS[0].arguments
    assert reader.calls == [Call("weather", whole[: len(whole) - arguments_cut])]


def test_the_beginning_of_a_call_that_is_cut_off_says_nothing() -> None:
    reader = CallReader()
    assert reader.push("Hm.\n<tool_call>\n{") + reader.finish() == [Grown(text="Hm.")]


@pytest.mark.parametrize("text", ["", "Hello <b>\nthere", "a <tool_call", WEATHER, f"Hm.\n{WEATHER}", f"{NOW}\n{NOW}"])
def test_with_auto_an_answer_is_text_or_calls(text: str) -> None:
    assert follows(text, tools=TOOLS)


@pytest.mark.parametrize(
    "text",
    [NOW.replace("now", "then"), NOW.replace("{}", '{"a": 1}'), f"{NOW} and so on", WEATHER.replace("city", "town")],
)
def test_with_auto_a_call_is_of_a_tool_with_its_arguments(text: str) -> None:
    assert not follows(text, tools=TOOLS)


def test_required_calls_come_at_once_and_only_one_where_parallel_ones_are_off() -> None:
    assert follows(f"{NOW}\n{WEATHER}", tools=TOOLS, tool_choice="required")
    assert not follows("Hello", tools=TOOLS, tool_choice="required")
    assert follows(NOW, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert not follows(f"{NOW}\n{WEATHER}", tools=TOOLS, tool_choice="required", parallel_tool_calls=False)


def test_a_named_tool_is_the_only_one_and_called_once() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    assert follows(WEATHER, tools=TOOLS, tool_choice=named)
    assert not follows(NOW, tools=TOOLS, tool_choice=named)
    assert not follows(f"{WEATHER}\n{WEATHER}", tools=TOOLS, tool_choice=named)


def test_a_schema_holds_beside_tools() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY}}
    assert follows('{"city": "Kiel"}', response_format=form)
    assert not follows('{"town": "Kiel"}', response_format=form)
    assert follows('{"city": "Kiel"}', response_format=form, tools=TOOLS)
    assert follows(NOW, response_format=form, tools=TOOLS)
    assert not follows("Kiel", response_format=form, tools=TOOLS)


def test_json_object_takes_any_object_and_nothing_else() -> None:
    assert follows('{"a": [1, {"b": null}]}', response_format={"type": "json_object"})
    assert not follows("[1]", response_format={"type": "json_object"})


def test_text_needs_no_grammar() -> None:
    assert answer_grammar(body()) is None
    assert answer_grammar(body(tools=TOOLS, tool_choice="none")) is None


def test_parameters_are_those_of_an_object() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]
    with pytest.raises(ApiError) as caught:
        answer_grammar(body(tools=tools))
    assert str(caught.value) == ('the parameters of f have type "string", wanted a JSON Schema of type "object"')
    assert json.loads(json.dumps(caught.value.body()))["error"]["param"] == "tools[0].function.parameters"


def answer_of(schema: dict[str, Any]) -> str | None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    return answer_grammar(body(response_format=form))


def test_a_schema_has_few_patterns_that_one_string_may_have_to_match() -> None:
    many = {f"p{i}": {"type": "string", "pattern": f".*{i}.*"} for i in range(6)}
    assert answer_of({"type": "object", "properties": {**many, "x": {"pattern": "x"}}})
    assert answer_of({"type": "object", "properties": many, "anyOf": [{"allOf": [{}]}]})
    with pytest.raises(ApiError) as caught:
        answer_of({"type": "object", "properties": many, "anyOf": [{"allOf": [{"format": "date"}]}]})
    assert str(caught.value) == (
        "a schema has 7 different patterns and formats, and allOf, anyOf, by which one string may have to match all "
        "of them; wanted at most 6 of them then"
    )


@pytest.mark.parametrize("multiples", [[65521], [101, 0.00103], [5000, 5000, 1], [10**4000, 10**4000 + 1]])
def test_multiples_in_a_schema_are_small(multiples: list[float]) -> None:
    def numbers(of: list[float]) -> dict[str, Any]:
        return {"type": "array", "prefixItems": [{"type": "number", "multipleOf": each} for each in of]}

    assert answer_of(numbers([10, 0.01, 25, 1000.0]))
    with pytest.raises(ApiError) as caught:
        answer_of(numbers(multiples))
    assert str(caught.value) == (
        "the values of multipleOf in a schema, without decimal points, have a sum or a common multiple above 10000; "
        "choose smaller ones"
    )
