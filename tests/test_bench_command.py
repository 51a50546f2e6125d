"""``engram bench`` on tiny bundles: what it prints, and how it ends where something is missing."""

import json
import sys
from pathlib import Path

import pytest
from tests.conftest import Command
from tests.tiny import TinyModel
from tests.workshop import Workshop, copy_folder

from engram_runtime.bench import bandwidth, bundle_runner
from engram_runtime.drafting.options import DraftOptions

SIZES = ("--prompt-tokens", 5, "--decode-tokens", 3, "--depth", 0, "--depth", 7, "--rounds", 2, "--threads", 1)
FIGURES = ("prefill_tok_s", "decode_tok_s", "ttft_ms", "load_ms", "start_ms", "rss_anon_mb", "rss_file_mb")


@pytest.fixture(autouse=True)
def small_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read less than a measurement needs."""
    monkeypatch.setattr(bandwidth, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidth, "MOST_BYTES", 1 << 20)


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have llama.cpp appear to be installed."""
    monkeypatch.setattr("engram_runtime.commands.bench.LLAMA_CPP_PACKAGE", "numpy")


def error_of(command: Command, *arguments: object) -> tuple[int, str]:
    outcome = command("engram", *arguments)
    assert outcome.out == ""
    return outcome.code, outcome.err.splitlines()[-1]


def test_bench_measures_both_executors(
    workshop: Workshop, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("os.getloadavg", iter([(0.5, 9.0, 9.0), (0.75, 9.0, 9.0)]).__next__)
    found = command(
        *("engram", "bench", workshop.ready().path, *SIZES, "--against", "onnxruntime", "--table-io", "mmap", "--json"),
        *("--plot", tmp_path / "speed.png"),
    ).json
    for figures, runner in ((found, "tvm"), (found["against"], "onnxruntime")):
        assert (figures["runner"], figures["threads"]) == (runner, 1)
        assert list(figures["verify_cost"]) == ["2", "4", "8", "16"]
        assert list(figures["depths"]) == ["0", "7"]
        assert min(figures[key] for key in FIGURES) > 0
    assert found["bandwidth_share"] > 0
    assert found["against"]["bandwidth_share"] is None
    assert {*FIGURES, "verify_cost", "depths", "bandwidth_share"} <= found["against"]["ratios"].keys()
    assert (found["prompt_tokens"], found["decode_tokens"], found["rounds"]) == (5, 3, 2)
    assert (found["load_average"], found["load_average_after"]) == (0.5, 0.75)
    assert [(table["site"], table["io"]) for table in found["tables"]] == [("layer_1", "mmap")]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "report.json").write_text(json.dumps(found))
    itself = command("engram", "bench", "compare", tmp_path / "report.json", tmp_path / "report.json", "--json").json
    assert itself["differences"] == {}
    assert itself["figures"].keys() == itself["against"].keys()
    assert {figure["ratio"]["value"] for figure in itself["figures"].values()} == {1.0}


def test_a_plot_is_a_png(workshop: Workshop, command: Command) -> None:
    assert error_of(command, "bench", workshop.ready().path, *SIZES, "--plot", "speed.svg") == (
        2,
        "engram: plot speed.svg has the suffix '.svg', expected .png",
    )


def test_bench_alone_prints_a_table_and_where_the_time_goes(workshop: Workshop, command: Command) -> None:
    outcome = command("engram", "bench", workshop.ready().path, *SIZES, "--profile", "--table-io", "pread")
    lines = outcome.out.splitlines()
    assert outcome.err.splitlines()[-1] == "table layer_1: pread, 5.7 KiB: as asked for"
    assert "|  | tvm |" in lines
    assert [line.split(",")[0] for line in lines if "| calls |" in line] == ["| decode", "| prefill"]
    assert sum(line.startswith("| outside kernels |") for line in lines) == 2
    assert any(line.startswith("| linear_int8 |") for line in lines)


DRAFTS = ("--draft", "lookup", "--draft-k", 2)


def test_bench_measures_drafts_on_a_text(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    (text := tmp_path / "tide.txt").write_text("the tide comes in and the tide comes in and")
    line = ("bench", workshop.ready().path, *SIZES, "--decode-tokens", 40, *DRAFTS, "--prompt-file", text)
    found = command("engram", *line, "--prompt-tokens", 12, "--json").json
    drafts = found["drafts"]
    assert found["prompts"] == {str(text): text.read_text()}
    assert (drafts["draft"], drafts["same_text"], list(drafts["texts"])) == ("lookup", True, [str(text)])
    assert drafts["drafted"] > 0
    assert drafts["forwards"] == 2 * 40 - drafts["accepted"]
    assert drafts["texts"][str(text)] == {key: drafts[key] for key in ("plain_tok_s", "tok_s", "over_plain")}
    assert drafts["over_plain"] > 0
    assert drafts["experts_per_forward"] == {"plain": None, "drafted": None}


def test_texts_that_were_drafted_for_are_no_part_of_what_is_measured_after_them(workshop: Workshop) -> None:
    path = str(workshop.uncompiled().path)
    runner = bundle_runner.load(
        "onnxruntime", path, threads=1, tables_on=True, table_io="auto", table_ram=None, positions=64
    )
    said = runner.go_on("the tide comes in", prompt_tokens=4, tokens=3, drafts=DraftOptions(drafter="lookup", drafts=2))
    assert (len(said.token_ids), len(runner)) == (4, 0)


def test_without_a_file_drafts_are_for_the_texts_that_are_built_in(workshop: Workshop, command: Command) -> None:
    outcome = command("engram", "bench", workshop.ready().path, *SIZES, *DRAFTS)
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("tvm, drafts by lookup")]
    assert line.startswith("tvm, drafts by lookup, 2 a pass, after up to 5 tokens of prose, code, copy: ")
    assert line.endswith("; the same text as without")
    assert "| drafts over plain, all texts | " in outcome.out


def test_drafts_that_cant_be_made_end_the_measurements_at_once(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready().path
    assert error_of(command, "bench", bundle, *SIZES, "--draft", "mtp") == (
        2,
        f"engram: bundle {bundle} has no draft head, which drafter 'mtp' needs; use 'lookup' or export the bundle with "
        "a head",
    )
    assert error_of(command, "bench", bundle, *SIZES, "--prompt-file", "tide.txt") == (
        2,
        "engram: --prompt-file is what drafts are made for; give --draft as well or leave it out",
    )
    assert error_of(command, "bench", bundle, *SIZES, "--draft", "lookup", "--prompt-file", "no such") == (
        2,
        "engram: text no such can't be read: No such file or directory",
    )


def test_bench_takes_bundles_without_a_tokenizer(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in workshop.checkpoint(TinyModel()).iterdir():
        if not path.name.startswith("tokenizer"):
            (checkpoint / path.name).write_bytes(path.read_bytes())
    bundle = workshop.bundle(checkpoint)
    found = command("engram", "bench", bundle.path, *SIZES, "--executor", "onnxruntime", "--json").json
    assert found["decode_tok_s"] > 0


def test_llama_cpp_runs_the_bundles_weights_which_are_gone_afterwards(
    workshop: Workshop, command: Command, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'engram-edge[peers]'")
    bundle = copy_folder(workshop.bundle(workshop.checkpoint(TinyModel(dtype="bfloat16"))).path, tmp_path / "bundle")
    line = ("bench", bundle, *SIZES, "--executor", "onnxruntime", "--against", "llama.cpp", "--json")
    found = command("engram", *line).json["against"]
    assert found["build"].endswith(", BF16 x 15, F32 x 5")
    assert min(found[key] for key in FIGURES) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_only_tvm_tells_kernels_apart(workshop: Workshop, command: Command) -> None:
    line = ("bench", workshop.ready().path, *SIZES, "--executor", "onnxruntime", "--profile")
    assert error_of(command, *line) == (
        2,
        "engram: the onnxruntime executor can't tell kernels apart; give --profile with --executor tvm",
    )


def test_a_gguf_without_llama_cpp_is_refused(workshop: Workshop, command: Command) -> None:
    assert error_of(command, "bench", workshop.ready().path, *SIZES, "--gguf", "model.gguf") == (
        2,
        "engram: --gguf is what llama.cpp runs with --against llama.cpp; give both or neither",
    )


@pytest.mark.usefixtures("llama_cpp")
def test_a_gguf_that_is_not_there_is_named(workshop: Workshop, command: Command, tmp_path: Path) -> None:
    line = ("bench", workshop.ready().path, *SIZES, "--against", "llama.cpp", "--gguf", tmp_path / "model.gguf")
    assert error_of(command, *line) == (
        3,
        f"engram: {tmp_path / 'model.gguf'} is not a file; give a .gguf file or leave out --gguf to have one written",
    )


@pytest.mark.usefixtures("llama_cpp")
def test_sites_that_llama_cpp_lacks_are_told(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready().path
    assert error_of(command, "bench", bundle, *SIZES, "--against", "llama.cpp") == (
        3,
        f"engram: bundle {bundle} has Engram sites, which llama.cpp's llama has not; export it without --engram",
    )


def test_llama_cpp_that_is_not_installed_says_how_to_install_it(
    workshop: Workshop, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert error_of(command, "bench", workshop.ready().path, *SIZES, "--against", "llama.cpp") == (
        4,
        "engram: --against llama.cpp needs llama_cpp: pip install 'engram-edge[export,peers]'",
    )


def test_measurements_that_do_not_fit_the_context_are_refused(workshop: Workshop, command: Command) -> None:
    assert error_of(command, "bench", workshop.ready().path, "--prompt-tokens", 190, "--depth", 0) == (
        2,
        "engram: these measurements need 206 tokens, the context holds 192; give a smaller --prompt-tokens, "
        "--decode-tokens or --depth",
    )
