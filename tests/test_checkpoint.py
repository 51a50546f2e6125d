import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_export.checkpoint import INDEX_FILE, open_checkpoint
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_export.safetensors_header import MAX_HEADER_BYTES
from engram_runtime.errors import CheckpointError

FLOATS = {
    "single": torch.randn(7, 5, generator=torch.Generator().manual_seed(1)),
    "half": torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2)).half(),
    "brain": torch.cat([torch.randn(6), torch.tensor([0.0, -0.0, float("inf"), 1e-40, 3e38, -1.5])]).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}
INTEGERS = {
    "I8": torch.tensor([-128, 0, 127], dtype=torch.int8),
    "U8": torch.tensor([[0, 255]], dtype=torch.uint8),
    "I32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
    "I64": torch.tensor([-(2**63), 2**63 - 1]),
}


@pytest.fixture
def floats(tmp_path: Path) -> SafetensorsFile:
    safetensors.torch.save_file(FLOATS, tmp_path / "model.safetensors")
    return SafetensorsFile(tmp_path / "model.safetensors")


def write_raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def message(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


def write_model(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 8, "rope_theta": 10000}')
    safetensors.torch.save_file(FLOATS, folder / "model.safetensors")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


class TestValues:
    @pytest.mark.parametrize("name", FLOATS)
    def test_float_tensors_equal_what_the_safetensors_library_reads(self, floats: SafetensorsFile, name: str) -> None:
        np.testing.assert_array_equal(floats.read(name), FLOATS[name].float().numpy())

    @pytest.mark.parametrize("name", FLOATS)
    def test_values_are_float32_and_own_their_memory(self, floats: SafetensorsFile, name: str) -> None:
        values = floats.read(name)
        assert values.dtype == np.float32
        assert values.flags.writeable

    @pytest.mark.parametrize("dtype", INTEGERS)
    def test_integer_tensors_are_read_in_their_own_dtype(self, tmp_path: Path, dtype: str) -> None:
        safetensors.torch.save_file(INTEGERS, tmp_path / "codes.safetensors")
        values = SafetensorsFile(tmp_path / "codes.safetensors").read_raw(dtype)
        np.testing.assert_array_equal(values, INTEGERS[dtype].numpy(), strict=True)

    def test_float8_is_read_as_its_bits(self, tmp_path: Path) -> None:
        values = torch.tensor([1.0, -2.0, 0.5]).to(torch.float8_e4m3fn)
        safetensors.torch.save_file({"w": values}, tmp_path / "f8.safetensors")
        np.testing.assert_array_equal(
            SafetensorsFile(tmp_path / "f8.safetensors").read_raw("w"), values.view(torch.uint8).numpy(), strict=True
        )

    @settings(deadline=None)
    @given(data=st.data())
    def test_rows_equal_a_slice_of_the_whole(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        path = tmp_path_factory.mktemp("rows") / "model.safetensors"
        safetensors.torch.save_file(FLOATS, path)
        name = data.draw(st.sampled_from(["single", "half", "brain", "empty"]))
        rows = FLOATS[name].shape[0]
        start = data.draw(st.integers(0, rows))
        stop = data.draw(st.integers(start, rows))
        expected = FLOATS[name].float().numpy()[start:stop]
        np.testing.assert_array_equal(SafetensorsFile(path).read_rows(name, start, stop), expected, strict=True)

    def test_names_shapes_and_metadata_are_those_of_the_file(self, tmp_path: Path) -> None:
        safetensors.torch.save_file(FLOATS, tmp_path / "m.safetensors", metadata={"format": "pt"})
        file = SafetensorsFile(tmp_path / "m.safetensors")
        assert {name: file.shape(name) for name in file.names()} == {k: tuple(v.shape) for k, v in FLOATS.items()}
        assert file.metadata == {"format": "pt"}

    def test_reading_a_row_of_a_gigabyte_allocates_a_row(self, tmp_path: Path) -> None:
        rows, row_bytes = 1 << 20, 1 << 10
        path = write_raw(
            tmp_path / "big.safetensors", {"w": tensor("F32", [rows, row_bytes // 4], 0, rows * row_bytes)}, b""
        )
        os.truncate(path, path.stat().st_size + rows * row_bytes)
        file = SafetensorsFile(path)
        tracemalloc.start()
        values = file.read_rows("w", 12_345, 12_346)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert values.shape == (1, row_bytes // 4)
        assert peak < 64 << 10


class TestRefusals:
    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 8), (3, 2), (8, 8)])
    def test_rows_outside_the_tensor_are_an_index_error(self, floats: SafetensorsFile, start: int, stop: int) -> None:
        with pytest.raises(
            IndexError, match=rf"^rows {start}:{stop} of tensor 'single' are outside its shape \[7, 5\]$"
        ):
            floats.read_rows("single", start, stop)

    def test_a_missing_tensor_is_named(self, floats: SafetensorsFile) -> None:
        assert message(lambda: floats.read("lm_head.weight")) == (
            f"{floats.path} holds no tensor 'lm_head.weight'; the checkpoint lacks a weight the model needs"
        )

    def test_an_integer_tensor_is_not_read_as_float(self, tmp_path: Path) -> None:
        path = tmp_path / "codes.safetensors"
        safetensors.torch.save_file(INTEGERS, path)
        assert message(lambda: SafetensorsFile(path).read("I32")) == (
            f"tensor 'I32' of {path} has dtype I32, wanted F32, F16 or BF16; convert the checkpoint"
        )

    def test_a_truncated_file_is_refused_when_opened(self, floats: SafetensorsFile) -> None:
        wanted = floats.path.stat().st_size
        os.truncate(floats.path, wanted - 10)
        assert message(lambda: SafetensorsFile(floats.path)) == (
            f"{floats.path} holds {wanted - 10} bytes, its header says {wanted}; copy or download the file again"
        )

    def test_a_file_cut_after_opening_is_an_error_and_not_a_crash(self, floats: SafetensorsFile) -> None:
        os.truncate(floats.path, 8)
        assert message(lambda: floats.read("single")).endswith(
            "; the file changed while it was read, copy or download it again"
        )

    def test_bytes_after_the_last_tensor_are_refused(self, tmp_path: Path) -> None:
        path = write_raw(tmp_path / "m.safetensors", {"w": tensor("U8", [2], 0, 2)}, b"abc")
        size = path.stat().st_size
        assert message(lambda: SafetensorsFile(path)) == (
            f"{path} holds {size} bytes, its header says {size - 1}; copy or download the file again"
        )

    @pytest.mark.parametrize(
        ("header", "data", "expected"),
        [
            (
                {"w": tensor("F4", [2], 0, 1)},
                b"a",
                "tensor 'w' in the header of PATH has dtype 'F4', known are BOOL, U8, I8, F8_E4M3, F8_E5M2, F8_E8M0, "
                "U16, I16, F16, BF16, U32, I32, F32, U64, I64, F64; convert the file",
            ),
            (
                {"w": tensor("U8", [2], 0, 3)},
                b"abc",
                "tensor 'w' in the header of PATH spans 3 bytes, its shape and dtype want 2; write the file again",
            ),
            (
                {"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)},
                b"abc",
                "tensor 'b' in PATH starts at byte DATA+1, wanted DATA+2 where tensor 'a' ends; write the file again",
            ),
            (
                {"a": tensor("U8", [2], 1, 3)},
                b"abc",
                "tensor 'a' in PATH starts at byte DATA+1, wanted DATA+0 where the header ends; write the file again",
            ),
            (
                {"w": tensor("U8", [0, 2**62], 0, 0)},
                b"",
                f"tensor 'w' in the header of PATH has an unusable shape [0, {2**62}]; write the file again",
            ),
            (
                {"w": tensor("U8", [True], 0, 1)},
                b"a",
                "tensor 'w' in the header of PATH has an unusable shape [True]; write the file again",
            ),
            (
                {"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}},
                b"a",
                "tensor 'w' in the header of PATH has unusable data_offsets [0, 1, 1]; write the file again",
            ),
            (
                {"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "extra": 0}},
                b"a",
                "tensor 'w' in the header of PATH must have exactly dtype, shape and data_offsets; "
                "write the file again",
            ),
            (
                {"__metadata__": {"epoch": 3}},
                b"",
                "__metadata__ in the header of PATH is not a map of strings; write the file again",
            ),
            (
                b'{"w": 1, "w": 2}',
                b"",
                "the header of PATH is not valid json: key 'w' appears twice; copy or download the file again",
            ),
            (
                b"[" * 100_000,
                b"",
                "the header of PATH is not valid json: it is nested too deeply; copy or download the file again",
            ),
            (b"[]", b"", "the header of PATH holds a json list, wanted an object; check the file"),
            (
                {f"t{i}": tensor("U8", [0], 0, 0) for i in range(100_001)},
                b"",
                "PATH lists 100001 tensors, at most 100000 are read; split the file",
            ),
        ],
    )
    def test_a_broken_header_is_described(self, tmp_path: Path, header: object, data: bytes, expected: str) -> None:
        path = write_raw(tmp_path / "m.safetensors", header, data)
        start = path.stat().st_size - len(data)
        for offset in range(3):
            expected = expected.replace(f"DATA+{offset}", str(start + offset))
        assert message(lambda: SafetensorsFile(path)) == expected.replace("PATH", str(path))

    def test_a_header_length_beyond_the_bound_is_not_read(self, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
        assert message(lambda: SafetensorsFile(path)) == (
            f"{path} states a header of {2**63} bytes, at most {MAX_HEADER_BYTES} are read; "
            f"check that it is a safetensors file"
        )

    def test_a_pipe_is_refused_without_waiting_for_a_writer(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "m.safetensors")
        assert message(lambda: SafetensorsFile(tmp_path / "m.safetensors")) == (
            f"{tmp_path / 'm.safetensors'} is not a regular file; give the path of a file"
        )


TEXTS = st.text("aF32é\0\ud800", max_size=4)  # a lone surrogate is what json can hold and utf-8 cannot
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def read_everything(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name in file.names():
        assert file.read_raw(name).shape == file.shape(name)


class TestHostileHeaders:
    @settings(max_examples=300, deadline=None)
    @given(
        edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers()
    )
    def test_changed_bytes_give_a_checkpoint_error_or_readable_tensors(
        self, tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int
    ) -> None:
        content = bytearray(safetensors.torch.save(FLOATS))
        for position, value in edits:
            content[position % len(content)] = value
        read_everything(bytes(content[: len(content) - max(0, cut)]), tmp_path_factory.getbasetemp() / "bytes")

    @settings(max_examples=300, deadline=None)
    @given(
        header=st.dictionaries(
            st.sampled_from(["a", "b", "__metadata__"]),
            JSON_VALUES
            | st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "U8", "BF16", "F4"]) | JSON_VALUES,
                    "shape": st.lists(st.integers(0, 4), max_size=3) | JSON_VALUES,
                    "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | JSON_VALUES,
                }
            ),
        ),
        data=st.binary(max_size=32),
    )
    def test_any_json_header_gives_a_checkpoint_error_or_readable_tensors(
        self, tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
    ) -> None:
        text = json.dumps(header).encode()
        read_everything(struct.pack("<Q", len(text)) + text + data, tmp_path_factory.getbasetemp() / "json")


class TestFolders:
    def test_a_folder_is_opened_with_everything_beside_the_weights(self, tmp_path: Path) -> None:
        folder = write_model(
            tmp_path / "smol",
            tokenizer__json="{}",
            tokenizer_config__json='{"eos_token": "</s>"}',
            generation_config__json='{"eos_token_id": 2}',
            chat_template__jinja="{{ messages }}",
        )
        checkpoint = open_checkpoint(folder)
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.tokenizer_json == b"{}"
        assert checkpoint.tokenizer_config == {"eos_token": "</s>"}
        assert checkpoint.generation_config == {"eos_token_id": 2}
        assert checkpoint.chat_template == "{{ messages }}"
        assert (checkpoint.source, checkpoint.path) == ("smol", folder)
        np.testing.assert_array_equal(checkpoint.tensors.read("single"), FLOATS["single"].numpy())

    def test_a_folder_with_config_and_weights_alone_is_enough(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_model(tmp_path / "bare"))
        assert (checkpoint.tokenizer_json, checkpoint.tokenizer_config) == (None, {})
        assert (checkpoint.generation_config, checkpoint.chat_template) == ({}, None)

    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            ('"a"', "a"),
            ('[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]', "d"),
            ("null", None),
        ],
    )
    def test_the_chat_template_may_stand_in_the_tokenizer_config(
        self, tmp_path: Path, template: str, expected: str | None
    ) -> None:
        folder = write_model(tmp_path / "m", tokenizer_config__json=f'{{"chat_template": {template}}}')
        assert open_checkpoint(folder).chat_template == expected

    def test_links_are_followed_as_model_caches_consist_of_them(self, tmp_path: Path) -> None:
        blobs = write_model(tmp_path / "blobs")
        cache = tmp_path / "snapshot"
        cache.mkdir()
        (cache / "config.json").symlink_to(blobs / "config.json")
        (cache / "model.safetensors").symlink_to(blobs / "model.safetensors")
        np.testing.assert_array_equal(open_checkpoint(cache).tensors.read("single"), FLOATS["single"].numpy())

    def test_shards_read_like_one_file(self, tmp_path: Path) -> None:
        tensors = open_checkpoint(write_shards(tmp_path)).tensors
        assert isinstance(tensors, SafetensorsShards)
        assert tensors.names() == ["half", "single"]
        assert (tensors.shape("half"), tensors.dtype("half")) == ((4, 3, 2), "F16")
        np.testing.assert_array_equal(tensors.read("half"), FLOATS["half"].float().numpy())
        np.testing.assert_array_equal(tensors.read_rows("single", 2, 5), FLOATS["single"][2:5].numpy())
        np.testing.assert_array_equal(tensors.read_raw("half"), FLOATS["half"].numpy())

    def test_code_named_by_the_config_is_ignored(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "m", modeling__py="raise SystemExit('ran')")
        (folder / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "modeling.Model"}}')
        assert open_checkpoint(folder).tensors.names() == SafetensorsFile(folder / "model.safetensors").names()


def write_shards(folder: Path, weight_map: object = None) -> Path:
    (folder / "config.json").write_text("{}")
    safetensors.torch.save_file({"single": FLOATS["single"]}, folder / "a.safetensors")
    safetensors.torch.save_file({"half": FLOATS["half"]}, folder / "b.safetensors")
    weight_map = weight_map or {"half": "b.safetensors", "single": "a.safetensors"}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


class TestFolderRefusals:
    @pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/a.safetensors", "x\0.safetensors", ".safetensors", 3])
    def test_a_shard_outside_the_folder_is_refused(self, tmp_path: Path, shard: object) -> None:
        write_shards(tmp_path, {"single": shard})
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path / INDEX_FILE} places tensor 'single' in {shard!r}, "
            f"wanted a .safetensors file of the same folder; download the index again"
        )

    def test_a_tensor_its_shard_does_not_hold_is_refused(self, tmp_path: Path) -> None:
        write_shards(tmp_path, {"single": "b.safetensors"})
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path / INDEX_FILE} places tensor 'single' in b.safetensors, which does not hold it; "
            f"download both again"
        )

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        write_shards(tmp_path, {"single": "c.safetensors"})
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path / 'c.safetensors'} cannot be read: No such file or directory; "
            f"check the path and its permissions"
        )

    def test_an_index_without_a_map_is_refused(self, tmp_path: Path) -> None:
        write_shards(tmp_path, [1])
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path / INDEX_FILE} has no 'weight_map' object; download the index again"
        )

    def test_several_files_without_an_index_are_refused(self, tmp_path: Path) -> None:
        (write_shards(tmp_path) / INDEX_FILE).unlink()
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path} holds 2 safetensors files but no {INDEX_FILE}; download the index"
        )

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
    def test_pickled_weights_are_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / name).write_bytes(b"\x80")
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path / name} is a pickle, which can run code when it is read; "
            f"convert the model to safetensors and give that folder"
        )

    def test_a_pickle_given_by_itself_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").write_bytes(b"\x80")
        assert message(lambda: open_checkpoint(tmp_path / "model.bin")).startswith(
            f"{tmp_path / 'model.bin'} is a pickle, which can run code when it is read"
        )

    def test_a_folder_without_weights_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path} holds no weights, wanted model.safetensors; download the model's safetensors files"
        )

    def test_a_folder_without_a_model_is_refused(self, tmp_path: Path) -> None:
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path} holds neither config.json nor a .gguf file; give a model's folder"
        )

    def test_a_folder_with_two_gguf_files_is_ambiguous(self, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").touch()
        (tmp_path / "b.gguf").touch()
        assert message(lambda: open_checkpoint(tmp_path)) == (
            f"{tmp_path} holds 2 .gguf files and no config.json; give one of the files"
        )

    def test_a_path_that_does_not_exist_is_named(self, tmp_path: Path) -> None:
        assert message(lambda: open_checkpoint(tmp_path / "nowhere")) == (
            f"{tmp_path / 'nowhere'} does not exist; give a folder with config.json or a .gguf file"
        )

    def test_a_single_safetensors_file_lacks_its_config(self, tmp_path: Path) -> None:
        path = write_model(tmp_path / "m") / "model.safetensors"
        assert message(lambda: open_checkpoint(path)) == (
            f"{path} is neither a folder nor a .gguf file; give the folder that holds config.json"
        )

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ("{", "is not valid json: expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
            ('{"a": 1, "a": 2}', "is not valid json: key 'a' appears twice"),
            ('{"a": NaN}', "is not valid json: the value NaN is not a number in json"),
        ],
    )
    def test_bad_json_names_the_file(self, tmp_path: Path, config: str, expected: str) -> None:
        folder = write_model(tmp_path / "m")
        (folder / "config.json").write_text(config)
        assert message(lambda: open_checkpoint(folder)) == (
            f"{folder / 'config.json'} {expected}; copy or download the file again"
        )

    def test_a_chat_template_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "m")
        (folder / "chat_template.jinja").write_bytes(b"ab\xff")
        assert message(lambda: open_checkpoint(folder)) == (
            f"{folder / 'chat_template.jinja'} is not utf-8 at byte 2; save it as utf-8"
        )


class TestRequire:
    def test_a_value_of_the_config_is_returned_with_its_type(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_model(tmp_path / "m"))
        assert checkpoint.require("hidden_size", int) == 8
        assert checkpoint.require("rope_theta", float) == 10000.0

    def test_a_gap_names_file_and_key(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_model(tmp_path / "m"))
        assert message(lambda: checkpoint.require("vocab_size", int)) == (
            "config.json of m has no 'vocab_size'; the checkpoint is incomplete"
        )

    def test_a_wrong_type_names_file_and_key(self, tmp_path: Path) -> None:
        checkpoint = open_checkpoint(write_model(tmp_path / "m"))
        assert message(lambda: checkpoint.require("model_type", int)) == (
            "'model_type' in config.json of m is 'llama', wanted int; correct the config"
        )
