"""The ``engram`` command: one JSON object each, the documented keys, one sentence and an exit code where it fails."""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tests.conftest import Command
from tests.tiny import CONTEXT, HIDDEN, VOCAB, TinyModel, TinySite
from tests.workshop import THREADS, Workshop, copy_folder, files_of, tiny_profile

from engram_runtime import LLM, Bundle, Generation, SamplingOptions
from engram_runtime.bundle import sealed
from engram_runtime.command_line import run_command
from engram_runtime.commands.chat import HELP
from engram_runtime.commands.run import summary
from engram_runtime.errors import TableError
from engram_runtime.library import find_library
from engram_runtime.tables.counters import TableCounters
from engram_runtime.tables.options import TABLE_IO
from engram_targets import profile_names

PLAIN, UNTIED = TinyModel(), TinyModel(tied=False)
PROMPT = "The tide comes in"
RUN_KEYS = {
    "text", "token_ids", "finish_reason", "prompt_tokens", "prefill_tok_s", "decode_tok_s", "ttft_ms", "executor",
    "threads", "tables_on", "tables", "overlays",
}  # fmt: skip
SMALL_TABLE = "table layer_1: resident, 5.7 KiB: tables up to 64.0 MiB are, where there is room"
WEIGHTS = "graph/weights.safetensors"
EXECUTORS = ["tvm", "onnxruntime"]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_run_prints_the_generation_as_json(workshop: Workshop, command: Command, executor: str) -> None:
    bundle = workshop.ready().path
    outcome = command("engram", "run", bundle, PROMPT, "--max-tokens", 12, "--executor", executor, "--json")
    with LLM(bundle, executor, threads=THREADS) as llm:
        made = llm.generate(PROMPT, max_tokens=12)
    assert (outcome.code, outcome.json.keys()) == (0, RUN_KEYS)
    assert outcome.json["token_ids"] == list(made.token_ids)
    assert outcome.json["text"] == made.text
    assert (outcome.json["executor"], outcome.json["tables_on"]) == (executor, True)


def test_run_takes_the_library_of_a_target(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready()
    target = find_library(bundle)[1].target
    ran = [command("engram", "run", bundle.path, PROMPT, "--max-tokens", 2, *of) for of in ((), ("--target", target))]
    assert ran[0].out == ran[1].out
    other = command("engram", "run", bundle.path, PROMPT, "--target", "other")
    assert (other.code, other.err) == (
        4,
        f"engram: bundle {bundle.path} has no library for target 'other', it has ['{target}']; "
        f"run: engram compile {bundle.path} --target other\n",
    )


def test_a_target_is_not_for_onnxruntime(workshop: Workshop, command: Command) -> None:
    options = ("--executor", "onnxruntime", "--target", "native")
    outcome = command("engram", "run", workshop.ready().path, PROMPT, *options)
    expected = "engram: target 'native' picks a compiled library, which onnxruntime doesn't run; leave it out\n"
    assert (outcome.code, outcome.err) == (2, expected)


def test_run_prints_the_text_on_stdout_and_figures_on_stderr(workshop: Workshop, command: Command) -> None:
    outcome = command("engram", "run", workshop.ready().path, PROMPT, "--max-tokens", 12)
    as_json = command("engram", "run", workshop.ready().path, PROMPT, "--max-tokens", 12, "--json").json
    assert outcome.out == as_json["text"] + "\n"
    table, figures = outcome.err.splitlines()
    assert table == SMALL_TABLE
    assert figures.startswith("[12 tokens, ")
    assert figures.endswith(" ms; length]")


def test_run_counts_what_it_asked_of_each_table(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready()
    made = command("engram", "run", bundle.path, PROMPT, "--max-tokens", 12, "--json").json
    (figures,) = made["tables"]
    (site,) = bundle.manifest.tables
    computed = made["prompt_tokens"] + len(made["token_ids"]) - 1
    assert figures.keys() > {"site", "io", "rows", "unique", "bytes", "cold", "wait_ms"}
    assert (figures["site"], figures["io"]) == (site.site, "resident")
    assert figures["rows"] == computed * site.keyer.columns
    assert figures["bytes"] == figures["unique"] * site.record.record_bytes


def test_the_summary_tells_rows_that_were_waited_for() -> None:
    generation = Generation(
        text="ab",
        token_ids=(1, 2),
        finish_reason="length",
        prompt_tokens=4,
        prefilled_tokens=4,
        prefill_s=0.5,
        ttft_s=0.5,
        decode_s=0.1,
        tables={"a": TableCounters(cold=30, wait_s=0.004), "b": TableCounters(cold=2, wait_s=0.001)},
    )
    assert summary(generation) == (
        "[2 tokens, 10.0 tok/s; prompt 4 tokens, 8.0 tok/s; first token after 500 ms; 32 rows waited for, 5 ms; length]"
    )


def test_run_without_tables_makes_another_text(workshop: Workshop, command: Command) -> None:
    line = ("engram", "run", workshop.ready().path, PROMPT, "--max-tokens", 12, "--json", "--tables")
    on, off = (command(*line, tables).json for tables in ("on", "off"))
    assert (on["tables_on"], off["tables_on"], off["tables"]) == (True, False, [])
    assert on["token_ids"] != off["token_ids"]


SAMPLING = {
    "temperature": (("--temperature", 1.5, "--seed", 3), SamplingOptions(temperature=1.5, seed=3)),
    "top-k": (("--temperature", 1.5, "--top-k", 4, "--seed", 3), SamplingOptions(temperature=1.5, top_k=4, seed=3)),
    "top-p": (("--temperature", 1.5, "--top-p", 0.3, "--seed", 3), SamplingOptions(temperature=1.5, top_p=0.3, seed=3)),
    "min-p": (("--temperature", 1.5, "--min-p", 0.4, "--seed", 3), SamplingOptions(temperature=1.5, min_p=0.4, seed=3)),
    "penalty": (("--repetition-penalty", 1.9), SamplingOptions(repetition_penalty=1.9)),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_options_reach_the_sampler(workshop: Workshop, command: Command, name: str) -> None:
    arguments, sampling = SAMPLING[name]
    outcome = command("engram", "run", workshop.ready().path, PROMPT, "--max-tokens", 24, "--json", *arguments)
    with LLM(workshop.ready().path, threads=THREADS) as llm:
        expected = llm.generate(PROMPT, max_tokens=24, sampling=sampling)
        greedy = llm.generate(PROMPT, max_tokens=24)
    assert outcome.json["token_ids"] == list(expected.token_ids)
    assert expected.token_ids != greedy.token_ids


def test_a_stop_string_ends_the_run(workshop: Workshop, command: Command) -> None:
    line = ("engram", "run", workshop.ready().path, PROMPT, "--temperature", 1, "--seed", 5, "--json")
    whole = command(*line, "--max-tokens", 24).json["text"]
    stopped = command(*line, "--max-tokens", 24, "--stop", "never there", "--stop", whole[8:10]).json
    assert (stopped["text"], stopped["finish_reason"]) == (whole[: whole.index(whole[8:10])], "stop_string")


@pytest.mark.parametrize("io", TABLE_IO)
def test_tokens_are_the_same_however_tables_are_read(workshop: Workshop, command: Command, io: str) -> None:
    line = ("engram", "run", workshop.ready().path, PROMPT, "--max-tokens", 12, "--json")
    asked, default = command(*line, "--table-io", io), command(*line)
    (table,) = asked.json["tables"]
    assert (table["site"], table["io"]) == ("layer_1", "resident" if io == "auto" else io)
    assert asked.json["token_ids"] == default.json["token_ids"]
    assert asked.err == (f"{SMALL_TABLE}\n" if io == "auto" else f"table layer_1: {io}, 5.7 KiB: as asked for\n")


def test_table_ram_is_the_most_that_resident_tables_take(workshop: Workshop, command: Command) -> None:
    line = ("engram", "run", workshop.ready().path, PROMPT, "--max-tokens", 2, "--table-ram")
    reasons = {size: command(*line, size).err.splitlines()[0] for size in ("5868B", "5KiB", "0")}
    assert reasons == {
        "5868B": SMALL_TABLE,
        "5KiB": "table layer_1: mmap, 5.7 KiB: more than the 5.0 KiB allowed",
        "0": "table layer_1: mmap, 5.7 KiB: more than the 0 B allowed",
    }


@pytest.mark.parametrize("line", [("run", PROMPT), ("chat",), ("eval", "ppl", "--text", "text.txt"), ("verify",)])
def test_tables_say_how_they_are_read(
    workshop: Workshop, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The hash of the last two tokens is read by the table.")
    places = 2 if line[0] == "eval" else 1
    outcome = command("engram", *line[:places], workshop.ready().path, *line[places:], "--table-io", "pread")
    assert outcome.code == 0
    assert outcome.err.splitlines().count("table layer_1: pread, 5.7 KiB: as asked for") == 1


@pytest.mark.parametrize("executor", EXECUTORS)
def test_threads_are_the_ones_asked_for(workshop: Workshop, command: Command, executor: str) -> None:
    line = ("engram", "run", workshop.ready().path, PROMPT, "--max-tokens", 2, "--executor", executor, "--json")
    assert command(*line, "--threads", 1).json["threads"] == 1


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_inspect_shows_a_bundle(workshop: Workshop, command: Command) -> None:
    facts = command("engram", "inspect", workshop.ready().path, "--json").json
    manifest = workshop.ready().manifest
    library = workshop.ready().path / "lib" / tiny_profile().name
    assert facts == {
        "kind": "bundle",
        "card": "README.md",
        "model": "checkpoint",
        "family": "llama",
        "quantisation": "int8",
        "layers": 2,
        "hidden size": HIDDEN,
        "vocabulary": VOCAB,
        "context": CONTEXT,
        "producer": f"engram-edge {version('engram-edge')}",
        "bytes": sum(entry.bytes for entry in manifest.files),
        "graphs": "decoder",
        "tables": [
            {
                "site": "layer_1",
                "rows": 326,
                "record": "int8 x 16, scale float16",
                "record bytes": 18,
                "rows a token": 4,
                "read": "from the bundle",
            }
        ],
        "sha256": sha256(workshop.ready().path / "engram.json"),
        "libraries": [
            {"target": tiny_profile().name, "fits here": True, "sha256": sha256(library / "compile.json")},
        ],
    }


def test_inspect_shows_a_hugging_face_folder(workshop: Workshop, command: Command) -> None:
    checkpoint = workshop.checkpoint(UNTIED)
    assert command("engram", "inspect", checkpoint, "--json").json == {
        "kind": "checkpoint",
        "model": "checkpoint",
        "family": "llama",
        "supported": "yes",
        "parameters": 112448,
        "layers": 2,
        "hidden size": HIDDEN,
        "vocabulary": VOCAB,
        "context": CONTEXT,
        "tokenizer": "yes",
        "engram": "no",
        "tensors": [{"type": "F32", "count": 21}],
    }


def test_inspect_shows_a_gguf_file(workshop: Workshop, command: Command) -> None:
    facts = command("engram", "inspect", workshop.gguf(Kind.Q4_0, UNTIED), "--json").json
    assert (facts["model"], facts["parameters"], facts["context"]) == ("tiny.gguf", 112448, CONTEXT)
    assert facts["tensors"] == [{"type": "Q4_0", "count": 15}, {"type": "F32", "count": 6}]


def test_inspect_prints_the_same_facts_as_text(workshop: Workshop, command: Command) -> None:
    outcome = command("engram", "inspect", workshop.ready().path)
    assert outcome.out.splitlines()[:4] == [
        "kind          bundle",
        "model         checkpoint",
        "family        llama",
        "quantisation  int8",
    ]


@pytest.mark.parametrize("executor", EXECUTORS)
def test_verify_finds_a_bundle_as_it_was_exported(workshop: Workshop, command: Command, executor: str) -> None:
    outcome = command("engram", "verify", workshop.ready().path, "--executor", executor, "--json")
    report = outcome.json
    assert (outcome.code, report["digests"], report["tables"], report["executor"]) == (0, "ok", "ok", executor)
    assert report["golden"]["tokens"] == CONTEXT


def test_verify_says_that_all_was_well(workshop: Workshop, command: Command) -> None:
    outcome = command("engram", "verify", workshop.ready().path)
    assert outcome.out.startswith("digests: ok\ntables: ok\n")
    assert outcome.out.endswith("\nfiles and golden values are as they were exported\n")


def test_a_message_is_answered_as_in_a_chat(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready()
    with LLM(bundle.path) as llm:
        answer = "".join(llm.chat([{"role": "user", "content": PROMPT}], max_tokens=12))
    assert command("engram", "run", bundle.path, PROMPT, "--chat", "--max-tokens", 12).out == f"{answer}\n"
    plain, asked = (
        command("engram", "run", bundle.path, PROMPT, *chat, "--max-tokens", 12, "--json").json
        for chat in ((), ("--chat",))
    )
    assert (asked["text"], asked["prompt_tokens"] > plain["prompt_tokens"]) == (answer, True)


def test_verify_compares_with_the_checkpoint_in_transformers(workshop: Workshop, command: Command) -> None:
    checkpoint = workshop.checkpoint(PLAIN)
    line = ("engram", "verify", workshop.bundle(checkpoint).path, "--executor", "onnxruntime", "--json")
    report = command(*line, "--against", checkpoint, "--tokens", 150).json["against"]
    assert report["tokens"] == 150
    assert report["max_abs"] < 1e-4  # of logits about 1 in size, as in test_export
    assert report["argmax_agreement"] == 1.0
    assert report["perplexity_ratio"] == pytest.approx(1, abs=1e-5)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_verify_finds_one_flipped_bit_of_a_table(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_folder(workshop.ready().path, tmp_path / "bundle"))
    (rows,) = bundle.manifest.tables[0].ranges
    flip(bundle.table_path(rows), rows.offset + 100)
    outcome = command("engram", "verify", bundle.path)
    digest = next(entry.sha256 for entry in bundle.manifest.files if entry.path == rows.file)
    found = outcome.err.splitlines()[-1].split(" SHA-256 ")[1][:64]
    assert outcome.code == 3
    assert outcome.err.splitlines()[-1] == (
        f"engram: {rows.file} has SHA-256 {found}, the manifest says {digest}; export again"
    )
    assert found != digest


def test_eval_ppl_is_that_of_the_logits(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    text = "The hash of the last two tokens is read by the table. " * 2
    (tmp_path / "text.txt").write_text(text)
    line = ("engram", "eval", "ppl", workshop.ready().path, "--text", tmp_path / "text.txt", "--json")
    report = command(*line, "--tokens", 20, "--window", 10).json
    with LLM(workshop.ready().path, threads=THREADS) as llm:
        token_ids = llm.tokenizer.encode(text)[:20]
        losses = [loss for half in (token_ids[:10], token_ids[10:]) for loss in next_token_losses(llm, half)]
    assert report["scored_tokens"] == 18
    assert report["perplexity"]["value"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
    assert (report["executor"], report["tables_on"], report["window"]) == ("tvm", True, 10)
    assert [table["io"] for table in report["tables"]] == ["resident"]


def next_token_losses(llm: LLM, token_ids: list[int]) -> list[float]:
    logits = llm.logits(token_ids).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return [-float(np.log(probabilities[i, token])) for i, token in enumerate(token_ids[1:])]


def test_compile_makes_a_library_that_runs(
    workshop: Workshop, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_folder(workshop.uncompiled().path, tmp_path / "bundle")
    profile = tiny_profile(decode_tokens=(1,), prefill_tokens=())
    monkeypatch.setattr("engram_compilers.cli.load_profile", {"native": profile}.__getitem__)
    result = command("engram", "compile", bundle, "--json").json
    folder = bundle / "lib" / profile.name
    assert result.keys() == {"target", "folder", "seconds", "library_bytes", "weights_bytes"}
    assert (result["target"], result["folder"]) == (profile.name, str(folder))
    assert result["library_bytes"] == (folder / "model.so").stat().st_size
    assert result["weights_bytes"] == (folder / "weights.bin").stat().st_size
    made, expected = (command("engram", "run", path, PROMPT, "--json") for path in (bundle, workshop.ready().path))
    assert made.json["token_ids"] == expected.json["token_ids"]


def chat(command: Command, bundle: Path, *lines: str, options: tuple[object, ...] = ()) -> list[str]:
    """Chat for six tokens an answer; returns what was printed after each prompt."""
    stdin = "".join(f"{line}\n" for line in lines)
    outcome = command("engram", "chat", bundle, "--max-tokens", 6, *options, stdin=stdin)
    assert (outcome.code, outcome.err) == (0, f"{SMALL_TABLE}\n")
    return outcome.out.split("> ")[1:]


def answer_to(bundle: Path, *contents: str) -> str:
    """Return the answer of the Python API to a conversation of user and assistant in turn."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    with LLM(bundle, threads=THREADS) as llm:
        return "".join(llm.chat(messages, max_tokens=6))


def test_chat_remembers_the_conversation(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready().path
    first = answer_to(bundle, "hello")
    second = answer_to(bundle, "hello", first, "and now?")
    assert chat(command, bundle, "hello", "and now?", "/exit") == [f"{first}\n", f"{second}\n", ""]


def test_chat_forgets_with_reset(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready().path
    first = answer_to(bundle, "hello")
    assert chat(command, bundle, "hello", "/reset", "hello", "/exit") == [f"{first}\n", "", f"{first}\n", ""]


def test_chat_begins_with_the_system_message_again_after_reset(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready().path
    shown = chat(command, bundle, "hello", "/reset", "hello", options=("--system", "Be brief."))
    assert shown[0] == shown[2]
    assert shown[0] != f"{answer_to(bundle, 'hello')}\n"


def test_chat_has_help_stats_and_a_word_for_what_it_doesnt_know(workshop: Workshop, command: Command) -> None:
    shown = chat(command, workshop.ready().path, "/help", "/stats", "/sing", "", "hello", "/stats", "/exit", "unread")
    assert shown[:4] == [f"{HELP}\n", "no answer yet\n", "/sing is no command; /help lists them\n", ""]
    assert shown[5].startswith("[6 tokens, ")
    assert shown[6:] == [""]


def test_chat_ends_with_its_input(workshop: Workshop, command: Command) -> None:
    assert chat(command, workshop.ready().path) == ["\n"]


def test_chat_survives_rows_that_cant_be_read(
    workshop: Workshop, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, broken = LLM.chat, iter([True])

    def broken_once(llm: LLM, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[str]:
        if next(broken, False):
            raise TableError("table file rows ends before byte 8: it was truncated")
        yield from answer(llm, messages, **options)

    bundle = workshop.ready().path
    monkeypatch.setattr(LLM, "chat", broken_once)
    outcome = command("engram", "chat", bundle, "--max-tokens", 6, stdin="first\nhello\n")
    monkeypatch.undo()
    assert outcome.err == f"{SMALL_TABLE}\ntable file rows ends before byte 8: it was truncated\n"
    assert (outcome.code, outcome.out) == (0, f"> > {answer_to(bundle, 'hello')}\n> \n")


def test_chat_survives_a_conversation_beyond_the_context(workshop: Workshop, command: Command) -> None:
    long = "x " * CONTEXT
    outcome = command("engram", "chat", workshop.ready().path, "--max-tokens", 6, stdin=f"{long}\nhello\n")
    with LLM(workshop.ready().path, threads=THREADS) as llm:
        tokens = len(llm.tokenizer.encode_chat([{"role": "user", "content": long.strip()}]))
    refusal = f"{tokens} tokens exceed the context of {CONTEXT}; shorten the prompt; /reset begins anew"
    assert outcome.err == f"{SMALL_TABLE}\n{refusal}\n"
    assert (outcome.code, outcome.out) == (0, f"> > {answer_to(workshop.ready().path, 'hello')}\n> \n")


def error_of(command: Command, *arguments: object) -> tuple[int, str]:
    """Return exit code and last line of a command that fails and prints nothing on stdout."""
    outcome = command("engram", *arguments)
    assert outcome.out == ""
    return outcome.code, outcome.err.splitlines()[-1]


BUNDLE_COMMANDS: dict[str, tuple[object, ...]] = {
    "run": ("run", PROMPT),
    "chat": ("chat",),
    "verify": ("verify",),
    "bench": ("bench",),
    "compile": ("compile",),
    "eval": ("eval", "ppl", "--text", "text.txt"),
}


def on_bundle(name: str, bundle: Path) -> tuple[object, ...]:
    """Return a command line with the bundle put where it belongs."""
    line = list(BUNDLE_COMMANDS[name])
    line.insert(2 if name == "eval" else 1, bundle)
    return tuple(line)


@pytest.mark.parametrize("name", BUNDLE_COMMANDS)
def test_what_is_no_bundle_is_said_to_be_none(command: Command, tmp_path: Path, name: str) -> None:
    assert error_of(command, *on_bundle(name, tmp_path)) == (
        3,
        f"engram: {tmp_path} is not a bundle: it has no engram.json; make one with engram-export",
    )


@pytest.mark.parametrize("name", BUNDLE_COMMANDS)
def test_a_weight_file_one_byte_short_is_named(workshop: Workshop, command: Command, tmp_path: Path, name: str) -> None:
    bundle = copy_folder(workshop.ready().path, tmp_path / "bundle")
    weights = bundle / WEIGHTS
    whole = weights.stat().st_size
    os.truncate(weights, whole - 1)
    assert error_of(command, *on_bundle(name, bundle)) == (
        3,
        f"engram: {WEIGHTS} holds {whole - 1} bytes, the manifest says {whole}; export the bundle again",
    )


def edit_manifest(bundle: Path, change: Any) -> None:
    path = bundle / "engram.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_bytes(sealed(manifest))


@pytest.mark.parametrize("name", [*BUNDLE_COMMANDS, "inspect"])
def test_a_manifest_that_leaves_its_folder_is_refused(
    workshop: Workshop, command: Command, tmp_path: Path, name: str
) -> None:
    bundle = copy_folder(workshop.ready().path, tmp_path / "bundle")
    (tmp_path / "secret").write_text("x")
    edit_manifest(bundle, lambda manifest: manifest["files"][0].update(path="../secret"))
    line = ("inspect", bundle) if name == "inspect" else on_bundle(name, bundle)
    assert error_of(command, *line) == (
        3,
        f"engram: {bundle / 'engram.json'}: path '../secret' leaves the bundle; only plain relative paths are allowed",
    )


@pytest.mark.parametrize("name", ["run", "chat", "verify", "bench"])
def test_a_bundle_without_library_says_how_to_make_one(workshop: Workshop, command: Command, name: str) -> None:
    bundle = workshop.uncompiled().path
    sizes = ("--prompt-tokens", 8, "--depth", 0) if name == "bench" else ()
    assert error_of(command, *on_bundle(name, bundle), *sizes) == (
        4,
        f"engram: bundle {bundle} has no compiled library; run: engram compile {bundle} --target native",
    )


def test_a_prompt_beyond_the_context_is_refused(workshop: Workshop, command: Command) -> None:
    prompt = "\x00" * (CONTEXT + 1)  # a token a byte
    assert error_of(command, "run", workshop.ready().path, prompt) == (
        2,
        f"engram: {CONTEXT + 1} tokens exceed the context of {CONTEXT}; shorten the prompt",
    )


def test_an_empty_prompt_is_refused(workshop: Workshop, command: Command) -> None:
    assert error_of(command, "run", workshop.ready().path, "") == (
        2,
        "engram: no tokens were given; the model needs at least one",
    )


OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "threads": (("--threads", 0), "Error: Invalid value for '--threads': 0 is not in the range 1<=x<=256."),
    "max-tokens": (("--max-tokens", 0), "Error: Invalid value for '--max-tokens': 0 is not in the range x>=1."),
    "executor": (
        ("--executor", "cuda"),
        "Error: Invalid value for '--executor': 'cuda' is not one of 'tvm', 'onnxruntime'.",
    ),
    "tables": (("--tables", "maybe"), "Error: Invalid value for '--tables': 'maybe' is not one of 'on', 'off'."),
    "table-io": (
        ("--table-io", "io_uring"),
        "Error: Invalid value for '--table-io': 'io_uring' is not one of 'auto', 'resident', 'mmap', 'pread'.",
    ),
    "table-ram": (("--table-ram", "4GB"), "engram: '4GB' is not a size, expected one such as 512MiB, 1.5GiB or 0"),
    "table-ram-unused": (
        ("--table-ram", "1GiB", "--table-io", "mmap"),
        "engram: table ram is for resident tables, with table io mmap there are none; leave it out",
    ),
    "table-io-off": (
        ("--table-io", "mmap", "--tables", "off"),
        "engram: --table-io, --table-ram and --overlay say how tables are read, with --tables off none is; "
        "leave out one or the other",
    ),
    "table-room": (
        ("--table-io", "resident", "--table-ram", "1KiB"),
        "engram: table layer_1 can't be resident: its 5.7 KiB are more than the 1.0 KiB allowed; give --table-io mmap, "
        "or more memory",
    ),
    "temperature": (("--temperature", -1), "engram: temperature is -1.0, wanted between 0 and 100"),
    "temperature-nan": (("--temperature", "nan"), "engram: temperature is nan, wanted between 0 and 100"),
    "top-p": (("--top-p", 0), "engram: top_p is 0.0, wanted above 0 and at most 1"),
    "min-p": (("--min-p", 2), "engram: min_p is 2.0, wanted between 0 and 1"),
    "top-k": (("--top-k", -1), "engram: top_k is -1, wanted 0 for no limit or a positive number of tokens"),
    "penalty": (("--repetition-penalty", 0), "engram: repetition_penalty is 0.0, wanted between 0.01 and 100"),
    "seed": (("--seed", -1), "engram: seed is -1, wanted 0 or a positive number"),
    "stop": (("--stop", ""), "engram: stop string '' has 0 characters, wanted 1 to 256"),
    "unknown": (("--xyz", 4), "Error: No such option '--xyz'."),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_cant_be_is_refused(workshop: Workshop, command: Command, name: str) -> None:
    arguments, sentence = OPTIONS[name]
    assert error_of(command, "run", workshop.ready().path, PROMPT, *arguments) == (2, sentence)


def test_an_unknown_command_is_named(command: Command) -> None:
    assert error_of(command, "sing") == (2, "Error: No such command 'sing'.")


def test_an_unknown_target_is_named(workshop: Workshop, command: Command) -> None:
    assert error_of(command, "compile", workshop.uncompiled().path, "--target", "warp") == (
        4,
        f"engram: target 'warp' is unknown; there are {['native', *profile_names()]}, and files by path, *.toml",
    )


def test_a_text_that_isnt_there_is_named(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    assert error_of(command, "eval", "ppl", workshop.ready().path, "--text", tmp_path / "none.txt") == (
        2,
        f"engram: text {tmp_path / 'none.txt'} can't be read: No such file or directory",
    )


def test_a_text_too_short_to_score_is_refused(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\x00")
    assert error_of(command, "eval", "ppl", workshop.ready().path, "--text", tmp_path / "text.txt") == (
        2,
        f"engram: a text of 1 tokens in windows of {CONTEXT} has nothing to score, as the first one of "
        "each only stands before; give a longer one",
    )


def test_a_bundle_without_chat_template_takes_no_chat(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    bundle = copy_folder(workshop.ready().path, tmp_path / "bundle")
    gone = ("chat_template.jinja", "tokenizer_config.json")
    for name in gone:
        (bundle / name).unlink()
    edit_manifest(
        bundle, lambda manifest: manifest.update(files=[f for f in manifest["files"] if f["path"] not in gone])
    )
    outcome = command("engram", "chat", bundle, stdin="hello\n")
    assert outcome.err == (
        f"{SMALL_TABLE}\n"
        "the bundle has no chat template, so it takes no messages; give a plain prompt; /reset begins anew\n"
    )


def test_the_version_is_that_of_the_package(command: Command) -> None:
    assert command("engram", "--version").out == f"engram, version {version('engram-edge')}\n"


def test_golden_values_cant_be_verified_with_tables_off(workshop: Workshop, command: Command) -> None:
    outcome = command("engram", "verify", workshop.ready().path, "--tables", "off")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "engram: golden values are those with tables on, --tables off acts on --against CHECKPOINT only\n"
    )


def test_no_command_writes_into_a_bundle(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready().path
    before = files_of(bundle)
    command("engram", "run", bundle, PROMPT, "--max-tokens", 2)
    command("engram", "verify", bundle)
    command("engram", "inspect", bundle)
    assert files_of(bundle) == before


def test_a_site_of_a_checkpoint_is_shown(workshop: Workshop, command: Command) -> None:
    checkpoint = workshop.checkpoint(PLAIN, TinySite())
    assert command("engram", "inspect", checkpoint, "--json").json["engram"] == "yes"


def test_a_warning_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def warns() -> None:
        warnings.warn("table file t is being changed", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr(sys, "argv", ["engram"])
    with pytest.raises(SystemExit):
        run_command(warns, "engram")
    assert capsys.readouterr() == ("", "engram: table file t is being changed\n")
