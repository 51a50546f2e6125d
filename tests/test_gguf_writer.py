"""GGUF files written from bundles hold the checkpoint's weights, and llama.cpp computes the same model from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from tests.tiny import CONTEXT, TinyModel
from tests.tiny_families import TinyFamily, experts, heads, rope
from tests.workshop import Workshop, bundle_logits, random_ids

from engram_export.checkpoint import open_checkpoint
from engram_export.gguf_sizes import types_of_tensors, weight_bytes_of_a_token
from engram_export.gguf_writer import write_gguf
from engram_export.quantise import Int4Weight, Int8Weight, quantise_int4, quantise_int8
from engram_runtime.bench import llama_cpp_runner
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, TargetError

MIXTURE = TinyFamily(
    model_type="qwen3_moe",
    sizes={
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "norm_topk_prob": True,
        "rope_parameters": rope(1.0),
        **heads(4, 2, 32),
        **experts(8, 2),
    },
)


def written(bundle: Bundle, folder: Path) -> Path:
    write_gguf(bundle, folder / "model.gguf")
    return folder / "model.gguf"


def read_by_gguf(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Kind]]:
    """Return every tensor, dequantised by the gguf package, and its type."""
    tensors = gguf.GGUFReader(path).tensors
    values = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}
    return values, {tensor.name: tensor.tensor_type for tensor in tensors}


@pytest.mark.parametrize(
    "model", [TinyModel(), TinyModel(tied=False, head_dim=32), TinyModel(family="qwen3")], ids=["tied", "head", "qwen3"]
)
def test_a_float_bundle_gives_back_the_checkpoint(workshop: Workshop, tmp_path: Path, model: TinyModel) -> None:
    checkpoint = open_checkpoint(workshop.checkpoint(model))
    found = open_checkpoint(written(workshop.bundle(checkpoint.path), tmp_path))
    assert set(found.tensors.names()) == set(checkpoint.tensors.names())
    for name in checkpoint.tensors.names():
        np.testing.assert_array_equal(found.tensors.read(name), checkpoint.tensors.read(name), err_msg=name)
    for key in ("head_dim", "num_attention_heads", "num_key_value_heads", "rope_theta", "rms_norm_eps", "vocab_size"):
        assert found.config[key] == checkpoint.config.get(key, 10000.0), key
    assert found.config["max_position_embeddings"] == CONTEXT


def test_matrices_of_bfloat16_stay_so(workshop: Workshop, tmp_path: Path) -> None:
    path = written(workshop.bundle(workshop.checkpoint(TinyModel(dtype="bfloat16"))), tmp_path)
    values, kinds = read_by_gguf(path)
    norms = {name for name in kinds if "norm" in name}
    assert {kinds[name] for name in norms} == {Kind.F32}
    assert {kinds[name] for name in kinds.keys() - norms} == {Kind.BF16}
    assert types_of_tensors(path) == f"BF16 x {len(kinds) - len(norms)}, F32 x {len(norms)}"
    plain = open_checkpoint(workshop.checkpoint(TinyModel(dtype="bfloat16"))).tensors
    np.testing.assert_array_equal(values["blk.1.ffn_up.weight"], plain.read("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize(
    ("quant", "kind", "quantise"), [("int8", Kind.Q8_0, quantise_int8), ("int4", Kind.Q4_0, quantise_int4)]
)
def test_quantised_weights_are_those_of_the_bundle_in_the_type_of_their_bits(
    workshop: Workshop, tmp_path: Path, quant: str, kind: Kind, quantise: Callable[..., Int8Weight | Int4Weight]
) -> None:
    checkpoint = workshop.checkpoint(TinyModel(tied=False))
    values, kinds = read_by_gguf(written(workshop.bundle(checkpoint, quant=quant), tmp_path))
    assert kinds["token_embd.weight"] == kinds["output.weight"] == Kind.Q8_0
    assert {kinds[name] for name in kinds if "norm" in name} == {Kind.F32}
    linear = [name for name in kinds if name.startswith("blk.") and "norm" not in name]
    assert {kinds[name] for name in linear} == {kind}
    weight = open_checkpoint(checkpoint).tensors.read("model.layers.1.mlp.up_proj.weight")
    expected = gguf.quants.quantize(quantise(weight).dequantise(), kind)
    np.testing.assert_array_equal(values["blk.1.ffn_up.weight"], gguf.dequantize(expected, kind))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_blocks_that_were_kept_from_a_gguf_file_come_back_as_they_were(
    workshop: Workshop, tmp_path: Path, kind: Kind
) -> None:
    original = workshop.gguf(kind, TinyModel())
    values, kinds = read_by_gguf(written(workshop.bundle(original, quant="keep"), tmp_path))
    expected, expected_kinds = read_by_gguf(original)
    for name in (name for name, found in expected_kinds.items() if found == kind):
        assert kinds[name] == kind
        np.testing.assert_array_equal(values[name], expected[name], err_msg=name)


def test_experts_are_split_into_gate_and_up(workshop: Workshop, tmp_path: Path) -> None:
    folder = workshop.family(MIXTURE)
    path = written(workshop.bundle(folder), tmp_path)
    values, kinds = read_by_gguf(path)
    checkpoint = open_checkpoint(folder).tensors
    for part in ("gate", "up", "down"):
        expected = [checkpoint.read(f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight") for expert in range(8)]
        np.testing.assert_array_equal(values[f"blk.1.ffn_{part}_exps.weight"], np.stack(expected))
    router = checkpoint.read("model.layers.1.mlp.gate.weight")
    np.testing.assert_array_equal(values["blk.1.ffn_gate_inp.weight"], router)
    assert kinds["blk.1.ffn_gate_inp.weight"] == Kind.F32
    sizes = {name: tensor.nbytes for name, tensor in values.items() if name != "token_embd.weight"}
    used = sum(size // 4 if "_exps" in name else size for name, size in sizes.items())  # 2 of 8 experts
    assert weight_bytes_of_a_token(path) == used


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_the_head_and_not_the_embedding(workshop: Workshop, tmp_path: Path, tied: bool) -> None:
    path = written(workshop.bundle(workshop.checkpoint(TinyModel(tied=tied))), tmp_path)
    values, _ = read_by_gguf(path)
    total = sum(tensor.nbytes for tensor in values.values())
    assert weight_bytes_of_a_token(path) == (total if tied else total - values["token_embd.weight"].nbytes)


def test_what_llama_cpp_computes_otherwise_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    bundle = workshop.bundle(workshop.checkpoint(TinyModel(rope=scaled)))
    with pytest.raises(BundleError) as caught:
        write_gguf(bundle, tmp_path / "model.gguf")
    assert str(caught.value) == (
        f"bundle {bundle.path} scales its rotary positions, which isn't written; give --gguf FILE"
    )


def test_families_that_llama_cpp_does_not_know_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    family = TinyFamily(
        model_type="mixtral",
        sizes={"hidden_size": 64, "num_hidden_layers": 2, "num_local_experts": 4, **heads(4, 2, 16)},
    )
    with pytest.raises(BundleError) as caught:
        write_gguf(workshop.bundle(workshop.family(family)), tmp_path / "model.gguf")
    assert str(caught.value) == (
        "mixtral can't be written as GGUF, ['llama', 'qwen3', 'qwen3_moe'] can; give --gguf FILE"
    )


def llama_cpp_logits(path: Path, token_ids: list[int]) -> NDArray[np.float32]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'engram-edge[peers]'")
    runner = llama_cpp_runner.load(
        "llama.cpp", str(path), threads=1, tables_on=True, table_io="auto", table_ram=None, positions=CONTEXT
    )
    return runner.decode(token_ids).copy()


@pytest.mark.parametrize(
    "source", [TinyModel(), TinyModel(family="qwen3", tied=False), MIXTURE], ids=["llama", "qwen3", "qwen3_moe"]
)
def test_llama_cpp_computes_the_same_model(workshop: Workshop, tmp_path: Path, source: TinyModel | TinyFamily) -> None:
    checkpoint = workshop.family(source) if isinstance(source, TinyFamily) else workshop.checkpoint(source)
    bundle, token_ids = workshop.bundle(checkpoint), random_ids(40)
    found = llama_cpp_logits(written(bundle, tmp_path), token_ids)
    # Its caches are float16, 5e-4 of a value off at most; of logits up to 4 that came to 1.2e-2 where it was measured.
    np.testing.assert_allclose(found, bundle_logits(bundle, token_ids), rtol=0, atol=2e-2)


def test_llama_cpp_steps_back(workshop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'engram-edge[peers]'")
    path, token_ids = written(workshop.bundle(workshop.checkpoint(TinyModel())), tmp_path), random_ids(12)
    runner = llama_cpp_runner.load(
        "llama.cpp", str(path), threads=1, tables_on=True, table_io="auto", table_ram=None, positions=CONTEXT
    )
    first = runner.decode(token_ids)[-1].copy()
    runner.trim(5)
    assert len(runner) == 7
    np.testing.assert_allclose(runner.prefill(token_ids[7:]), first, rtol=0, atol=1e-2)


def test_llama_cpp_says_why_it_refuses_a_file(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'engram-edge[peers]'")
    (tmp_path / "model.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(TargetError) as caught:
        llama_cpp_runner.load(
            "llama.cpp",
            str(tmp_path / "model.gguf"),
            threads=1,
            tables_on=True,
            table_io="auto",
            table_ram=None,
            positions=8,
        )
    assert str(caught.value).startswith(f"llama.cpp can't load {tmp_path / 'model.gguf'}: ")
