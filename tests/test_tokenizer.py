"""Bundle tokenizers: special tokens, limits, and the native library's failures turned into ours."""

import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from engram_runtime.chat_limits import MAX_PROMPT_CHARS
from engram_runtime.detokenise import native_errors
from engram_runtime.errors import BundleError, RequestError
from engram_runtime.tokenizer import TextTokenizer

WORDS = ["<unk>", "<s>", "</s>", "hello", "world", "<|user|>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("byte_level")
    save_tokenizer(folder)
    return TextTokenizer.load(folder)


def word_tokenizer() -> Tokenizer:
    """Words are tokens; a BOS is added, as many models want."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def write_bundle(folder: Path, tokenizer: dict[str, Any] | None = None, **files: Any) -> Path:
    """Write the tokenizer files: keyword ``generation_config`` becomes ``generation_config.json``."""
    spec = json.loads(word_tokenizer().to_str()) if tokenizer is None else tokenizer
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def changed_spec(part: str, value: object) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(word_tokenizer().to_str())
    return spec | {part: value}


def test_encode_and_decode_equal_the_library(tmp_path: Path) -> None:
    tokenizer, library = TextTokenizer.load(write_bundle(tmp_path)), word_tokenizer()
    assert tokenizer.encode("hello world what") == library.encode("hello world what").ids == [1, 3, 4, 0]
    assert tokenizer.encode("hello", add_special_tokens=False) == [3]
    assert tokenizer.decode([1, 3, 4, 99]) == "helloworld"
    assert tokenizer.decode([1, 3], skip_special_tokens=False) == "<s>hello"
    assert tokenizer.vocab_size == 6


def test_tokens_are_told_the_bytes_they_add(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bundle(tmp_path))
    token_ids, num_bytes = tokenizer.encode_with_bytes("hello wörld  world")
    assert (token_ids, num_bytes.tolist()) == ([1, 3, 0, 4], [0, 5, 7, 7])
    assert tokenizer.encode_with_bytes("")[1].tolist() == [0]


@given(st.text(max_size=40))
def test_the_bytes_of_all_tokens_are_those_of_the_text(byte_level: TextTokenizer, text: str) -> None:
    token_ids, num_bytes = byte_level.encode_with_bytes(text)
    assert token_ids == byte_level.encode(text)
    assert num_bytes.sum() == len(text.encode())


def test_a_stream_decodes_and_stops(tmp_path: Path) -> None:
    stream = TextTokenizer.load(write_bundle(tmp_path)).stream(["wor"])
    assert [stream.push(token_id) for token_id in [1, 3, 4]] == ["", "hello", ""]
    assert (stream.finish(), stream.stopped) == ("", "wor")


def test_truncation_and_padding_left_from_training_are_off(tmp_path: Path) -> None:
    library = word_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=8)
    tokenizer = TextTokenizer.load(write_bundle(tmp_path, json.loads(library.to_str())))
    assert tokenizer.encode("hello world hello world") == [1, 3, 4, 3, 4]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"generation_config": {"eos_token_id": 2}}, {2}),
        ({"generation_config": {"eos_token_id": [2, 5]}, "tokenizer_config": {"eos_token": "</s>"}}, {2, 5}),
        ({"generation_config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": "</s>"}}, {2}),
        ({"tokenizer_config": {"eos_token": {"content": "<|user|>", "lstrip": False}}}, {5}),
        ({"tokenizer_config": {"eos_token": None}}, set()),
    ],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path: Path, files: dict[str, Any], expected: set[int]
) -> None:
    assert TextTokenizer.load(write_bundle(tmp_path, **files)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [({}, None), ({"generation_config": {"bos_token_id": 5}}, 5), ({"tokenizer_config": {"bos_token": "<s>"}}, 1)],
)
def test_the_start_token_is_known_where_it_is_named(
    tmp_path: Path, files: dict[str, Any], expected: int | None
) -> None:
    assert TextTokenizer.load(write_bundle(tmp_path, **files)).bos_token_id == expected


TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"


def test_a_chat_is_encoded_without_a_second_start_token(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, tokenizer_config={"bos_token": "<s>", "chat_template": "not this one"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = TextTokenizer.load(folder)
    assert tokenizer.chat_template.render([{"role": "<|user|>", "content": "hello"}]) == "<s> <|user|> hello"
    assert tokenizer.encode_chat([{"role": "<|user|>", "content": "hello"}]) == [1, 5, 3]


def test_a_template_in_the_tokenizer_config_is_used_without_a_file(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, tokenizer_config={"bos_token": {"content": "<s>"}, "chat_template": TEMPLATE})
    assert TextTokenizer.load(folder).encode_chat([{"role": "hello", "content": "world"}]) == [1, 3, 4]


def test_a_bundle_without_template_takes_no_messages(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bundle(tmp_path))
    with pytest.raises(RequestError) as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert str(caught.value) == "the bundle has no chat template, so it takes no messages; give a plain prompt"


def test_a_prompt_of_the_largest_size_is_taken_and_one_more_character_is_not(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(write_bundle(tmp_path))
    assert tokenizer.encode(" " * MAX_PROMPT_CHARS) == [1]
    with pytest.raises(RequestError) as caught:
        tokenizer.encode(" " * (MAX_PROMPT_CHARS + 1))
    assert str(caught.value) == "the prompt has 4194305 characters, wanted at most 4194304; shorten it"


def test_half_a_surrogate_pair_in_a_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        TextTokenizer.load(write_bundle(tmp_path)).encode("hello \ud83d")
    assert str(caught.value) == (
        r"character 6 of the prompt is '\ud83d', half of a surrogate pair, "
        "wanted whole characters; decode the input as utf-8"
    )


def test_a_token_id_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the tokenizer can't decode the tokens: "):
        TextTokenizer.load(write_bundle(tmp_path)).decode([-1])


@pytest.mark.parametrize(
    "spec",
    [
        {"version": "1.0"},
        changed_spec("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        changed_spec("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}),
        changed_spec(
            "model",
            {"type": "BPE", "continuing_subword_prefix": "####", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
        ),
    ],
    ids=["no model", "charsmap panics", "merge of unknown token", "prefix panics"],
)
def test_a_tokenizer_file_the_library_fails_on_is_a_bundle_error(tmp_path: Path, spec: dict[str, Any]) -> None:
    folder = write_bundle(tmp_path, spec)
    with pytest.raises(BundleError) as caught:
        TextTokenizer.load(folder)
    assert str(caught.value).startswith(f"{folder / 'tokenizer.json'} is not a tokenizer this runtime can read: ")


def test_a_panic_while_encoding_is_a_request_error(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, changed_spec("pre_tokenizer", {"type": "FixedLength", "length": 0}))
    tokenizer = TextTokenizer.load(folder)
    with pytest.raises(RequestError) as caught:
        tokenizer.encode("hello")
    assert str(caught.value) == "the tokenizer can't take the prompt: chunk size must be non-zero"
    assert not isinstance(caught.value.__cause__, Exception)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupts_pass_through_the_boundary(interrupt: type[BaseException]) -> None:
    with pytest.raises(interrupt), native_errors(RequestError, "not this"):
        raise interrupt


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "{path} can't be read: No such file or directory; export the bundle again"),
        ("tokenizer.json", b"\xff", "{path} is not utf-8 text: byte 0 is invalid; export the bundle again"),
        ("generation_config.json", b"[1]", "{path} holds a JSON list, expected an object"),
        ("chat_template.jinja", b"x" * 262_145, "{path} holds more than 262144 bytes, the most that is allowed"),
        (
            "generation_config.json",
            b'{"eos_token_id": "2"}',
            "eos_token_id of generation_config.json is '2', wanted a token id or a list of them",
        ),
        (
            "generation_config.json",
            b'{"bos_token_id": [true]}',
            "bos_token_id of generation_config.json is [True], wanted a token id or a list of them",
        ),
        (
            "tokenizer_config.json",
            b'{"eos_token": "<eos>"}',
            "eos_token '<eos>' of tokenizer_config.json is not in tokenizer.json; export the bundle again",
        ),
        (
            "tokenizer_config.json",
            b'{"pad_token": 3}',
            "pad_token of tokenizer_config.json is 3, wanted a string; correct the file",
        ),
        (
            "tokenizer_config.json",
            b'{"chat_template": []}',
            "chat_template of tokenizer_config.json is a list, wanted a string; correct the file",
        ),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = write_bundle(tmp_path) / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        TextTokenizer.load(tmp_path)
    assert str(caught.value) == message.format(path=path)


def test_other_threads_run_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = TextTokenizer.load(tmp_path)
    encoding = threading.Thread(target=tokenizer.encode, args=("The tide is high. " * 40_000,))
    turns = [time.perf_counter()]
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        turns.append(time.perf_counter())
    longest = max(later - sooner for sooner, later in pairwise(turns))
    assert longest < (turns[-1] - turns[0]) / 2
