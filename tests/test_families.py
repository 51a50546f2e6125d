"""Families with experts, streams and n-gram tables compute what transformers does, in every executor."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import Command
from tests.reference import transformers_logits
from tests.tiny_families import (
    END_ID,
    FAMILIES,
    MANY_EXPERTS,
    TinyFamily,
    bfloat16_table,
    fp8_rounded_table,
    fp8_table,
    rope,
)
from tests.workshop import Workshop, bundle_logits, copy_folder, export, open_session, random_ids, stepwise_logits
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen4_exp.modeling_qwen4_exp import _find_nth_prime_after

from engram_export.checkpoint import Checkpoint
from engram_export.families import read_architecture
from engram_export.families.qwen4_exp import Qwen4ExpArchitecture
from engram_export.families.qwen4_memory import read_memories
from engram_export.formats import weight_format
from engram_export.source import open_source
from engram_export.streamed import BundleRows
from engram_export.verify import reference_logits
from engram_runtime.bundle import Bundle
from engram_runtime.cpu import cpu_flags
from engram_runtime.errors import CheckpointError
from engram_runtime.executors.tvm_library import TvmExecutor
from engram_runtime.executors.tvm_library import load as load_tvm
from engram_runtime.generation import decode_tokens
from engram_runtime.library import find_library
from engram_runtime.sampling import SamplingOptions, make_sampler
from engram_runtime.session import Session, open_sites
from engram_runtime.tokenizer import TextTokenizer
from engram_runtime.tracing.recorder import EXPERTS

NATIVE = "avx512_vnni" if "avx512_vnni" in cpu_flags() else "portable"
# Float32 sums in another order; over a chunk of linear attention transformers itself differs by 1e-4.
FLOAT_TOLERANCE = 1e-3
# tvm rounds activations to 16 bits per row, 0.003 % of the row's largest.
SIXTEEN_BIT_TOLERANCE = 2e-2
LENGTHS = (1, 7, 64, 300)
GENERATED = 64
TEXT_TOKENS = 150
# Seed of a text in which no two experts tie within that rounding, where either would be right.
WITHOUT_TIES = 1


def every_configuration(usual: Container[str]) -> list[Any]:
    """Return family and number of each configuration; all but the first of a usual family are exhaustive."""
    exhaustive = [pytest.mark.exhaustive]
    return [
        pytest.param(family, number, id=f"{family}-{number}", marks=exhaustive * (number > 0 or family not in usual))
        for family, configurations in FAMILIES.items()
        for number in range(len(configurations))
    ]


with_configurations = pytest.mark.parametrize(("family", "number"), every_configuration(FAMILIES))
# Their kernels for experts are those of the others, which test_expert_kernels.py and test_experts.py have as well.
with_compiled = pytest.mark.parametrize(("family", "number"), every_configuration(("qwen3_5_moe", "qwen4_exp")))


def text(length: int, seed: int = 0) -> list[int]:
    """Return random ids with an end of text here and there: as the fourth token, two in a row, near the end."""
    ends = (3, 20, 21, 60, 145, 298)
    return [END_ID if position in ends else token_id for position, token_id in enumerate(random_ids(length, seed))]


def assert_close(found: NDArray[Any], expected: NDArray[Any], tolerance: float = FLOAT_TOLERANCE) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def float_bundle(workshop: Workshop, family: TinyFamily) -> Bundle:
    return workshop.bundle(workshop.family(family))


# The float graph


@pytest.mark.parametrize("length", LENGTHS)
@with_configurations
def test_the_float_graph_gives_the_logits_of_transformers(
    workshop: Workshop, family: str, number: int, length: int
) -> None:
    tiny, token_ids = FAMILIES[family][number], text(length)
    expected = transformers_logits(workshop.family(tiny.original), token_ids)
    assert_close(bundle_logits(float_bundle(workshop, tiny), token_ids), expected)


@with_configurations
def test_one_token_at_a_time_gives_the_logits_of_all_at_once(workshop: Workshop, family: str, number: int) -> None:
    bundle, token_ids = float_bundle(workshop, FAMILIES[family][number]), text(TEXT_TOKENS)
    assert_close(stepwise_logits(bundle, token_ids, "onnxruntime"), bundle_logits(bundle, token_ids))


@with_configurations
def test_a_text_in_pieces_of_odd_sizes_gives_the_logits_of_the_whole(
    workshop: Workshop, family: str, number: int
) -> None:
    bundle, token_ids = float_bundle(workshop, FAMILIES[family][number]), text(TEXT_TOKENS)
    with open_session(bundle) as session:
        found = np.concatenate([session.decode(piece) for piece in pieces(token_ids, (1, 2, 19, 1, 63, 3))])
    assert_close(found, bundle_logits(bundle, token_ids))


def pieces(token_ids: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    """Split a text into pieces of these sizes and a last one with the rest."""
    bounds = [0, *np.cumsum(sizes).tolist(), len(token_ids)]
    return [token_ids[start:stop] for start, stop in itertools.pairwise(bounds)]


@with_configurations
def test_greedy_continuations_are_those_of_transformers(workshop: Workshop, family: str, number: int) -> None:
    tiny, prompt = FAMILIES[family][number], text(23)
    bundle = float_bundle(workshop, tiny)
    with open_session(bundle) as session:
        found = greedy(session, prompt)
    assert found == generated(workshop.family(tiny.original), prompt)


def greedy(session: Session, prompt: Sequence[int]) -> list[int]:
    sample = make_sampler(SamplingOptions())
    return list(decode_tokens(session, session.prefill(prompt), sample, max_tokens=GENERATED, end_ids=()))


def generated(checkpoint: Path, prompt: Sequence[int]) -> list[int]:
    """Return the tokens transformers continues with, ends of text among them."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = END_ID
    ids = torch.tensor([list(prompt)])
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GENERATED, do_sample=False)
    continuation: list[int] = whole[0, len(prompt) :].tolist()
    return continuation


@pytest.mark.exhaustive
@pytest.mark.parametrize("quant", ["int8", "int4"])
@with_configurations
def test_quantised_graphs_compute_the_same_weights_as_torch(
    workshop: Workshop, tmp_path: Path, family: str, number: int, quant: str
) -> None:
    verification = export(workshop.family(FAMILIES[family][number]), tmp_path / "bundle", quant=quant)
    assert verification.graph.max_abs < FLOAT_TOLERANCE
    assert verification.graph.argmax_agreement > 0.99


def test_the_end_token_of_a_nested_config_is_kept(workshop: Workshop, tmp_path: Path) -> None:
    checkpoint = copy_folder(workshop.family(FAMILIES["qwen3_5_moe"][0]), tmp_path / "checkpoint")
    (checkpoint / "generation_config.json").unlink()
    export(checkpoint, tmp_path / "bundle")
    assert json.loads((tmp_path / "bundle" / "generation_config.json").read_text()) == {"eos_token_id": END_ID}


# The tables of Qwen4-Exp

NGRAMS = FAMILIES["qwen4_exp"][0]


def with_table(table: Callable[[Path], None]) -> TinyFamily:
    return dataclasses.replace(NGRAMS, rewrite=table)


def test_fp8_rows_and_their_factor_are_the_numbers_they_stand_for(workshop: Workshop) -> None:
    token_ids = text(40)
    bundle = float_bundle(workshop, with_table(fp8_table))
    expected = transformers_logits(workshop.family(with_table(fp8_rounded_table)), token_ids)
    assert bundle.manifest.tables[0].record.payload == "float8_e4m3"
    assert_close(bundle_logits(bundle, token_ids), expected)


def test_bfloat16_rows_are_copied_as_they_are(workshop: Workshop) -> None:
    token_ids, tiny = text(40), with_table(bfloat16_table)
    bundle = float_bundle(workshop, tiny)
    assert bundle.manifest.tables[0].record.payload == "bfloat16"
    assert_close(bundle_logits(bundle, token_ids), transformers_logits(workshop.family(tiny), token_ids))


@pytest.mark.parametrize("table", [fp8_table, pytest.param(bfloat16_table, marks=pytest.mark.exhaustive)])
def test_referred_tables_give_the_logits_of_copied_ones(workshop: Workshop, table: Callable[[Path], None]) -> None:
    checkpoint = workshop.family(with_table(table))
    copied, referred = (workshop.bundle(checkpoint, tables=tables) for tables in ("copy", "reference"))
    assert_same_bits(bundle_logits(referred, text(40)), bundle_logits(copied, text(40)))


def test_the_tables_change_the_logits(workshop: Workshop) -> None:
    bundle = float_bundle(workshop, NGRAMS)
    on, off = (bundle_logits(bundle, text(40), tables_on=tables_on) for tables_on in (True, False))
    assert np.abs(on - off).mean() > 0.1  # against a tolerance of 1e-3 above


def test_an_end_of_text_hides_what_was_before_it_from_the_table(workshop: Workshop) -> None:
    """The rows after it are those of a text that begins there; attention and states still see all of the text."""
    (site,) = open_sites(float_bundle(workshop, NGRAMS))
    after = random_ids(6, seed=3)
    whole = np.array([*random_ids(5), END_ID, *after])
    np.testing.assert_array_equal(site.rows([], whole)[6:], site.rows([], np.array(after)))
    site.table.close()


# Published sizes


class NoTensors:
    """The tensors of a checkpoint of which only the config is read."""

    def names(self) -> list[str]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        raise KeyError(name)

    def read(self, name: str) -> NDArray[np.float32]:
        raise KeyError(name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        raise KeyError(name)


def config_alone(model_type: str, **values: Any) -> Checkpoint:
    """Return a checkpoint with the config transformers has for a family's published model."""
    return Checkpoint(
        config=AutoConfig.for_model(model_type, **values).to_dict(),
        tensors=NoTensors(),
        tokenizer_json=None,
        tokenizer_config={},
        generation_config={},
        chat_template=None,
        source="published",
        path=Path(),
    )


@pytest.mark.parametrize(
    ("model_type", "layers", "experts"),
    [("mixtral", 32, (8, 2)), ("qwen3_moe", 24, (128, 8)), ("qwen3_5_moe_text", 40, (256, 8))],
)
def test_configs_of_published_sizes_are_read(model_type: str, layers: int, experts: tuple[int, int]) -> None:
    architecture: Any = read_architecture(config_alone(model_type))
    assert architecture.text.num_layers == layers
    assert (architecture.mixture.num_experts, architecture.mixture.top_k) == experts


def test_memories_of_more_hash_heads_than_are_worth_searching_primes_for_are_refused() -> None:
    checkpoint = config_alone("qwen4_exp_text")
    checkpoint.config.update(ngram_size=16, heads_per_ngram=256, ple_layer_ids=list(range(1, 19)))
    with pytest.raises(CheckpointError) as raised:
        read_memories(checkpoint, "model.", ("full_attention",) * 18)
    assert str(raised.value) == (
        f"{checkpoint.config_name} has 18 n-gram memories of 3840 hash heads, wanted at most 65536 heads in all; "
        f"correct the config"
    )


def test_tables_of_published_sizes_have_the_primes_of_transformers() -> None:
    sizes = {"indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048}
    others = {"indexer_compress_ratio": 16, "rope_parameters": rope(0.25), "eos_token_id": 248044}
    architecture = read_architecture(config_alone("qwen4_exp_text", **sizes, **others, ple_layer_ids=[2, 6]))
    assert isinstance(architecture, Qwen4ExpArchitecture)
    primes = [prime for memory in architecture.memories.values() for prime in memory.keyer.primes]
    assert [primes[index] for index in (0, 15, 16, 31)] == [
        _find_nth_prime_after(20_000_000 - 1, index + 1) for index in (0, 15, 16, 31)
    ]


# Compiled bundles


def compiled(workshop: Workshop, family: TinyFamily, quant: str) -> Bundle:
    """Return a bundle compiled for 1 and 8 tokens at once."""
    bundle = workshop.bundle(workshop.family(family), quant=quant)
    return workshop.compiled(bundle, NATIVE, decode_tokens=(1,), prefill_tokens=(8,))


def decoded_weights_logits(checkpoint: Path, bundle: Bundle, token_ids: Sequence[int], quant: str) -> NDArray[Any]:
    """Return what a bundle's quantised weights give in torch, where activations stay float32."""
    source = open_source(checkpoint, engram=None, context=None)
    stored = BundleRows.open(source, bundle.file(bundle.manifest.decoder.weights))
    return reference_logits(source, np.array(token_ids), weight_format(quant, source.kept_type), encoded=stored)


@with_compiled
def test_tvm_gives_the_logits_of_the_int8_weights(workshop: Workshop, family: str, number: int) -> None:
    tiny, token_ids = FAMILIES[family][number], text(TEXT_TOKENS, WITHOUT_TIES)
    bundle = compiled(workshop, tiny, "int8")
    expected = decoded_weights_logits(workshop.family(tiny), bundle, token_ids, "int8")
    found = bundle_logits(bundle, token_ids, "tvm")
    assert_close(found, expected, SIXTEEN_BIT_TOLERANCE)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.99


@with_compiled
def test_one_token_at_a_time_gives_the_bits_of_all_at_once(workshop: Workshop, family: str, number: int) -> None:
    bundle, token_ids = compiled(workshop, FAMILIES[family][number], "int8"), text(TEXT_TOKENS)
    assert_same_bits(stepwise_logits(bundle, token_ids, "tvm"), bundle_logits(bundle, token_ids, "tvm"))


@pytest.mark.exhaustive
@with_configurations
def test_a_float_bundle_in_tvm_gives_the_logits_of_onnxruntime(workshop: Workshop, family: str, number: int) -> None:
    bundle, token_ids = compiled(workshop, FAMILIES[family][number], "none"), text(TEXT_TOKENS)
    tvm, ort = (bundle_logits(bundle, token_ids, executor) for executor in ("tvm", "onnxruntime"))
    assert_close(tvm, ort)


@pytest.mark.exhaustive
@with_configurations
def test_a_float_bundle_in_tvm_gives_the_same_bits_a_token_at_a_time(
    workshop: Workshop, family: str, number: int
) -> None:
    bundle, token_ids = compiled(workshop, FAMILIES[family][number], "none"), text(TEXT_TOKENS)
    assert_same_bits(stepwise_logits(bundle, token_ids, "tvm"), bundle_logits(bundle, token_ids, "tvm"))


# 512 experts, of which a token takes 10

PIECES = (1, 8, 1, 8)  # sizes that are compiled


def test_of_512_experts_only_the_routed_ones_are_read(workshop: Workshop) -> None:
    """Per piece of a text and layer, the distinct experts that the logits of transformers' routers name."""
    token_ids = text(sum(PIECES))
    chosen = routed_experts(workshop.family(MANY_EXPERTS.original), token_ids)
    bundle = compiled(workshop, MANY_EXPERTS, "none")
    executor = load_tvm(bundle, threads=2, target=None)
    found = bytes_by_piece(bundle, executor, pieces(token_ids, PIECES[:-1]))
    expert_bytes = 3 * 32 * 64 * 4  # gate, up and down of 32 features over a hidden size of 64, float32
    ends = np.cumsum(PIECES)
    distinct = [
        sum(len(np.unique(layer[end - size : end])) for layer in chosen) for end, size in zip(ends, PIECES, strict=True)
    ]
    assert found == [expert_bytes * count for count in distinct]
    assert executor.experts_read == sum(distinct)


def test_bench_tells_the_bytes_of_the_experts_a_token_takes(workshop: Workshop, command: Command) -> None:
    bundle = compiled(workshop, MANY_EXPERTS, "none")
    sizes = ("--prompt-tokens", 8, "--decode-tokens", 3, "--depth", 0, "--rounds", 2, "--threads", 1)
    figures = command("engram", "bench", bundle.path, *sizes, "--against", "onnxruntime", "--json").json
    expected = bundle.manifest.model.num_layers * 10 * 3 * 32 * 64 * 4
    assert figures["expert_bytes_per_token"] == expected
    assert figures["against"]["expert_bytes_per_token"] is None
    layers = bundle.manifest.model.num_layers
    assert figures["verify_experts"]["1"] == layers * 10 < figures["verify_experts"]["8"] <= layers * 80
    assert figures["against"]["verify_experts"] is None
    _, library = find_library(bundle)
    weights = sum(tensor.end - tensor.offset for tensor in library.tensors if ".experts." not in tensor.name)
    assert expected < figures["bytes_per_token"] < expected + weights  # no rows of the embedding


def test_run_tells_how_many_experts_a_forward_pass_reads(
    workshop: Workshop, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is another model's with as many tokens: the bundle has no tokenizer."""
    tokenizer = TextTokenizer.load(workshop.uncompiled().path)
    monkeypatch.setattr(TextTokenizer, "load", lambda folder: tokenizer)
    bundle = compiled(workshop, MANY_EXPERTS, "none")
    line = ("engram", "run", bundle.path, "The tide", "--max-tokens", 5)
    found = command(*line, "--trace", tmp_path / "trace.json", "--json").json
    experts = bundle.manifest.model.num_layers * 10
    assert found["experts_per_forward"] == experts
    assert f"; {experts}.0 experts a forward pass; " in command(*line).err
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["args"][EXPERTS] for event in events if event["name"] == EXPERTS][-4:] == [experts] * 4


def bytes_by_piece(bundle: Bundle, executor: TvmExecutor, texts: Sequence[Sequence[int]]) -> list[int]:
    """Return the bytes of experts read for each piece of a text."""
    read = []
    with Session.open(bundle, executor) as session:
        for piece in texts:
            before = executor.expert_bytes_read
            session.decode(piece)
            read.append(executor.expert_bytes_read - before)
    return read


def routed_experts(checkpoint: Path, token_ids: Sequence[int]) -> list[NDArray[np.int64]]:
    """Return for each layer the ``[T, 10]`` experts of largest router logits in transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    logits: list[NDArray[np.float32]] = []
    for layer in model.model.layers:
        router = layer.mlp.gate
        router.register_forward_pre_hook(
            lambda module, arguments: logits.append((arguments[0].flatten(0, -2) @ module.weight.T).numpy())
        )
    with torch.no_grad():
        model(torch.tensor([list(token_ids)]))
    return [np.argsort(-values, axis=1, kind="stable")[:, :10] for values in logits]


@pytest.mark.exhaustive
def test_a_model_of_512_experts_in_tvm_gives_the_logits_of_its_int8_weights(workshop: Workshop) -> None:
    token_ids, checkpoint = text(40, WITHOUT_TIES), workshop.family(MANY_EXPERTS)
    bundle = compiled(workshop, MANY_EXPERTS, "int8")
    expected = decoded_weights_logits(checkpoint, bundle, token_ids, "int8")
    assert_close(bundle_logits(bundle, token_ids, "tvm"), expected, SIXTEEN_BIT_TOLERANCE)
