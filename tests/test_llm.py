"""The Python API generates what its parts say, whichever way it is asked, and refuses what the model can't take."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import CONTEXT, VOCAB, TinyModel, TinySite
from tests.workshop import THREADS, Workshop, copy_folder, random_ids, stepwise_logits

from engram_runtime import LLM, EngramError, Generation, SamplingOptions, TableOptions
from engram_runtime.errors import RequestError, TableError
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.options import MMAP, PREAD

PROMPT = "The tide comes in"
WARM = SamplingOptions(temperature=1.0, seed=5)
EXECUTORS = ["tvm", "onnxruntime"]
# The same sums in other shapes differ in onnxruntime, and a value between two codes may fall either way; tvm's don't.
LOGIT_TOLERANCE = {"tvm": 0.0, "onnxruntime": 0.1}


@pytest.fixture(scope="module", params=EXECUTORS)
def shared(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[LLM]:
    with LLM(workshop.ready().path, request.param, threads=THREADS) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> LLM:
    """Return an LLM that holds no tokens."""
    shared.session.trim(len(shared.session))
    shared.last = None
    return shared


def same(first: Generation, second: Generation) -> bool:
    """Whether two generations made the same, however long they took."""
    return (first.text, first.token_ids, first.finish_reason) == (second.text, second.token_ids, second.finish_reason)


def test_the_pieces_of_a_stream_add_up_to_the_text(llm: LLM) -> None:
    pieces = list(llm.stream(PROMPT, max_tokens=40, sampling=WARM))
    assert len(pieces) > 10
    assert "".join(pieces) == llm.generate(PROMPT, max_tokens=40, sampling=WARM).text


def test_the_text_is_that_of_the_token_ids(llm: LLM) -> None:
    made = llm.generate(PROMPT, max_tokens=40, sampling=WARM)
    assert made.text == llm.tokenizer.decode(made.token_ids)


def test_greedy_tokens_are_the_likeliest_of_the_sessions_logits(llm: LLM) -> None:
    made = llm.generate(PROMPT, max_tokens=8).token_ids
    llm.session.trim(len(llm.session))
    logits = llm.session.prefill(llm.tokenizer.encode(PROMPT))
    expected = []
    for _ in range(8):
        expected.append(int(logits.argmax()))
        logits = llm.session.decode(expected[-1:])[-1]
    assert list(made) == expected


def test_a_seed_repeats_the_draws(llm: LLM) -> None:
    first, second = (llm.generate(PROMPT, max_tokens=24, sampling=WARM) for _ in range(2))
    assert same(first, second)


def test_another_seed_draws_otherwise(llm: LLM) -> None:
    other = SamplingOptions(temperature=1.0, seed=6)
    first, second = (llm.generate(PROMPT, max_tokens=24, sampling=sampling) for sampling in (WARM, other))
    assert first.token_ids != second.token_ids


def test_a_prompt_can_be_token_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    assert same(llm.generate(ids, max_tokens=12), llm.generate(PROMPT, max_tokens=12))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_prompt_that_begins_like_the_last_one_gives_what_a_fresh_model_gives(
    workshop: Workshop, executor: str
) -> None:
    with LLM(workshop.ready().path, executor, threads=THREADS) as used:
        used.generate(f"{PROMPT} twice a day", max_tokens=12)
        found = used.generate(f"{PROMPT} and the rows", max_tokens=12)
    with LLM(workshop.ready().path, executor, threads=THREADS) as fresh:
        expected = fresh.generate(f"{PROMPT} and the rows", max_tokens=12)
    assert found.prompt_tokens == expected.prompt_tokens
    assert same(found, expected)


@pytest.mark.parametrize("window", [False, True])
def test_of_a_repeated_prompt_only_the_last_token_is_computed_unless_a_window_is_to_go_back(
    workshop: Workshop, window: bool
) -> None:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel(), TinySite(convolution=window)), quant="int8")
    with LLM(bundle.path, "onnxruntime", threads=THREADS) as llm:
        first, second = (llm.generate(PROMPT, max_tokens=3) for _ in range(2))
        length = len(llm.tokenizer.encode(PROMPT))
    assert (first.prompt_tokens, first.prefilled_tokens) == (length, length)
    assert (second.prompt_tokens, second.prefilled_tokens) == (length, length if window else 1)


def test_a_stream_that_is_left_early_does_not_disturb_the_next(llm: LLM) -> None:
    expected = llm.generate(PROMPT, max_tokens=12)
    llm.generate("other", max_tokens=2)
    next(llm.stream(PROMPT, max_tokens=12))
    assert same(llm.generate(PROMPT, max_tokens=12), expected)


def test_a_second_stream_of_a_prompt_ends_the_first_and_is_not_disturbed(llm: LLM) -> None:
    expected = llm.generate(PROMPT, max_tokens=12)
    first, second = (llm.stream(PROMPT, max_tokens=12) for _ in range(2))
    pieces = [next(stream) for stream in (first, second)]
    with pytest.raises(RequestError, match="another text was begun in this session"):
        next(first)
    assert pieces[1] + "".join(second) == expected.text
    assert llm.last is not None
    assert same(llm.last, expected)


def test_logits_are_those_of_decoding_one_token_at_a_time(workshop: Workshop, llm: LLM) -> None:
    token_ids = random_ids(21)
    expected = stepwise_logits(workshop.ready(), token_ids, llm.executor.name)
    found = llm.logits(token_ids)
    assert found.shape == (21, VOCAB)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=LOGIT_TOLERANCE[llm.executor.name], rtol=0)


def test_logits_begin_a_sequence_of_their_own(llm: LLM) -> None:
    before = llm.logits(random_ids(9))
    llm.generate(PROMPT, max_tokens=3)
    np.testing.assert_array_equal(llm.logits(random_ids(9)), before)


def test_a_stop_string_ends_the_text_before_itself(llm: LLM) -> None:
    whole = llm.generate(PROMPT, max_tokens=40, sampling=WARM).text
    stop = whole[12:15]
    made = llm.generate(PROMPT, max_tokens=40, sampling=WARM, stop=[stop])
    assert (made.text, made.finish_reason) == (whole[: whole.index(stop)], "stop_string")


def test_a_stop_string_ends_a_stream_before_itself(llm: LLM) -> None:
    whole = llm.generate(PROMPT, max_tokens=40, sampling=WARM).text
    pieces = llm.stream(PROMPT, max_tokens=40, sampling=WARM, stop=[whole[12:15]])
    assert "".join(pieces) == whole[: whole.index(whole[12:15])]


def test_an_end_token_ends_the_text_and_is_the_last_id(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llm.generate(PROMPT, max_tokens=8, sampling=WARM)
    end = whole.token_ids[5]
    monkeypatch.setattr(llm.tokenizer, "eos_token_ids", frozenset({end}))
    made = llm.generate(PROMPT, max_tokens=8, sampling=WARM)
    length = whole.token_ids.index(end) + 1
    assert (made.token_ids, made.finish_reason) == (whole.token_ids[:length], "stop")
    assert made.text == llm.tokenizer.decode(made.token_ids[:-1])


def test_max_tokens_ends_the_text(llm: LLM) -> None:
    made = llm.generate(PROMPT, max_tokens=5, sampling=WARM)
    assert (len(made.token_ids), made.finish_reason) == (5, "length")


@pytest.mark.parametrize(("room", "tokens"), [(0, 1), (3, 4)])
def test_the_context_ends_the_text(llm: LLM, room: int, tokens: int) -> None:
    """One more token than there is room for: the last one need not be computed further."""
    made = llm.generate(random_ids(CONTEXT - room), max_tokens=20, sampling=WARM)
    assert (len(made.token_ids), made.finish_reason) == (tokens, "context")


def test_a_chat_answers_what_the_templates_prompt_is_continued_with(llm: LLM) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When does the tide come in?"},
    ]
    answer = "".join(llm.chat(messages, max_tokens=12, sampling=WARM))
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhen does the tide come in?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer == llm.generate(prompt, max_tokens=12, sampling=WARM).text


def test_figures_count_tokens_and_seconds(llm: LLM) -> None:
    made = llm.generate(PROMPT, max_tokens=6)
    assert 0 < made.prefill_s <= made.ttft_s
    assert made.prefill_tok_s == made.prefilled_tokens / made.prefill_s
    assert made.decode_tok_s == 5 / made.decode_s


def test_figures_count_the_rows_of_this_request_alone(llm: LLM) -> None:
    (site,) = llm.bundle.manifest.tables
    for prompt, max_tokens in ((random_ids(11), 6), (random_ids(9, seed=1), 3)):
        made = llm.generate(prompt, max_tokens=max_tokens, sampling=WARM)
        counters = made.tables[site.site]
        computed = made.prefilled_tokens + len(made.token_ids) - 1
        assert counters.rows == computed * site.keyer.columns
        assert 0 < counters.unique <= counters.rows
        assert counters.bytes == counters.unique * site.record.record_bytes


def test_figures_of_tables_are_zeros_with_tables_off(workshop: Workshop) -> None:
    with LLM(workshop.ready().path, threads=1, tables_on=False) as llm:
        assert llm.generate(PROMPT, max_tokens=3).tables == {"layer_1": TableCounters()}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_without_tables_another_text_comes_out(workshop: Workshop, executor: str) -> None:
    texts = []
    for tables_on in (True, False):
        with LLM(workshop.ready().path, executor, threads=THREADS, tables_on=tables_on) as llm:
            texts.append(llm.generate(PROMPT, max_tokens=12).text)
    assert texts[0] != texts[1]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_number_of_threads_is_the_one_asked_for(workshop: Workshop, executor: str) -> None:
    with LLM(workshop.ready().path, executor, threads=1) as llm:
        assert llm.executor.threads == 1


REFUSED: dict[str, tuple[list[int] | str, int, str]] = {
    "id-too-large": ([5, VOCAB], 6, f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
    "id-negative": ([-1, 5], 6, f"token id -1 is outside the vocabulary of {VOCAB}"),
    "too-long": (
        [7] * (CONTEXT + 1),
        6,
        f"{CONTEXT + 1} tokens exceed the context of {CONTEXT}; shorten the prompt",
    ),
    "no-ids": ([], 6, "no tokens were given; the model needs at least one"),
    "no-text": ("", 6, "no tokens were given; the model needs at least one"),
    "no-tokens-wanted": (PROMPT, 0, "max_tokens is 0, expected at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_the_model_cant_take_is_refused_and_the_next_one_is_not(llm: LLM, name: str) -> None:
    prompt, max_tokens, sentence = REFUSED[name]
    expected = llm.generate(PROMPT, max_tokens=6)
    with pytest.raises(RequestError) as caught:
        llm.generate(prompt, max_tokens=max_tokens)
    assert str(caught.value) == sentence
    assert same(llm.generate(PROMPT, max_tokens=6), expected)


@pytest.mark.parametrize("io", [MMAP, PREAD])
def test_a_table_cut_short_is_an_error_of_the_requests_that_need_it(
    workshop: Workshop, tmp_path: Path, io: str
) -> None:
    folder = copy_folder(workshop.ready().path, tmp_path / "bundle")
    (path,) = (folder / "tables").glob("*.safetensors")
    with path.open("r+b", buffering=0) as file, LLM(folder, threads=THREADS, tables=TableOptions(io=io)) as llm:
        whole, expected = path.read_bytes(), llm.generate(PROMPT, max_tokens=6)
        file.truncate(1)
        for _ in range(2):
            with pytest.raises(
                TableError, match=rf"^table file {re.escape(str(path))} ends before byte [0-9]+: it was"
            ):
                llm.generate("Another text", max_tokens=6)
        file.write(whole)
        assert same(llm.generate(PROMPT, max_tokens=6), expected)


@pytest.mark.parametrize("token_ids", [[VOCAB], [-1], [7] * (CONTEXT + 1), []])
def test_logits_refuse_what_generate_refuses(llm: LLM, token_ids: list[int]) -> None:
    with pytest.raises(RequestError):
        llm.logits(token_ids)


def test_an_unknown_executor_is_named(workshop: Workshop) -> None:
    with pytest.raises(RequestError) as caught:
        LLM(workshop.ready().path, "cuda")
    assert str(caught.value) == "executor 'cuda' is unknown; there are ['onnxruntime', 'tvm']"


@pytest.mark.parametrize("executor", EXECUTORS)
def test_threads_must_be_positive(workshop: Workshop, executor: str) -> None:
    with pytest.raises(EngramError) as caught:
        LLM(workshop.ready().path, executor, threads=0)
    assert str(caught.value) == "threads is 0, expected 1 to 256"


def test_a_path_can_be_text(workshop: Workshop) -> None:
    with LLM(str(workshop.ready().path), "onnxruntime", threads=1) as llm:
        assert llm.last is None


AFFINITY = """
import os, sys
from engram_runtime import LLM
before = os.sched_getaffinity(0)
for threads in (None, 1, 2):
    with LLM(sys.argv[1], "tvm", threads=threads) as llm:
        llm.logits([1, 2, 3])
        assert os.sched_getaffinity(0) == before, (threads, os.sched_getaffinity(0), before)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_loading_and_running_leaves_the_process_its_cpus(workshop: Workshop) -> None:
    """TVM's pool pins the thread that starts it: whatever is loaded later would count one CPU and use one thread."""
    subprocess.run([sys.executable, "-c", AFFINITY, workshop.ready().path], check=True)
