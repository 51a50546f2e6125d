"""``--tables-only``: bundles without a decoder, what the commands make of them, and every bad input."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import Command
from tests.test_deepseek_v41 import TOKENS, expected_rows, export, read
from tests.tiny import VOCAB, edit_config
from tests.tiny_deepseek import LAYERS, ROW_DIM, TinyDeepseek, edit_tensors, save_deepseek
from tests.workshop import SilentReporter, copy_folder, export_options

from engram_export.formats import FLOAT
from engram_export.pipeline import export_bundle
from engram_export.safetensors_file import SafetensorsFile
from engram_export.site_verify import SITE_TOLERANCE, compare_site
from engram_runtime.bundle import MODEL_CARD, Bundle
from engram_runtime.errors import EngramError
from engram_runtime.session import open_sites


@pytest.fixture
def tiny(tmp_path: Path) -> TinyDeepseek:
    return save_deepseek(tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyDeepseek, Bundle]:
    folder = tmp_path_factory.mktemp("deepseek")
    checkpoint = save_deepseek(folder / "checkpoint")
    export(checkpoint.folder, folder / "bundle")
    return checkpoint, Bundle.open(folder / "bundle")


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(EngramError) as raised:
        action()
    return str(raised.value)


def test_tables_read_in_place_give_the_same_rows(tiny: TinyDeepseek, tmp_path: Path) -> None:
    export(tiny.folder, tmp_path / "bundle", tables="reference")
    assert not list((tmp_path / "bundle" / "tables").glob("*.safetensors"))
    for layer, site in zip(LAYERS, open_sites(Bundle.open(tmp_path / "bundle")), strict=True):
        np.testing.assert_array_equal(site.rows([], TOKENS), expected_rows(tiny, layer, TOKENS), strict=True)
        site.table.close()


def test_the_card_has_sites_and_tables(exported: tuple[TinyDeepseek, Bundle]) -> None:
    _, bundle = exported
    card = bundle.file(MODEL_CARD).read_text()
    assert re.search(r"^\| `layer_1` \| \d+ \| \d\.\d\de-\d\d \| \d\.\d\de-\d\d \|$", card, re.MULTILINE)
    assert re.search(r"^\| `layer_1` \| [\d,]+ \| .* \| the bundle \|$", card, re.MULTILINE)
    assert ("pipeline_tag" in card, "engram run" in card) == (False, False)


def test_int8_sites_and_repacked_rows_stay_close(tiny: TinyDeepseek, tmp_path: Path) -> None:
    found = export(tiny.folder, tmp_path / "bundle", quant="int8", tables="repack", table_dtype="int8")
    for site in found:
        assert site.graph < SITE_TOLERANCE
        assert site.graph < site.model < 0.2
        assert site.row_errors is not None
        assert site.row_errors.max < 0.02


def test_a_graph_that_is_not_its_site_is_refused(exported: tuple[TinyDeepseek, Bundle], tmp_path: Path) -> None:
    checkpoint, bundle = exported
    copy = Bundle(copy_folder(bundle.path, tmp_path / "bundle"), bundle.manifest)
    path, entry = SafetensorsFile(copy.file(bundle.manifest.graphs["site.layer_1"].weights)).locate("gain")
    data = bytearray(path.read_bytes())
    data[entry.start : entry.stop] = bytes(entry.stop - entry.start)
    path.write_bytes(data)
    rows = expected_rows(checkpoint, LAYERS[0], TOKENS)
    message = refusal(lambda: compare_site(read(checkpoint.folder).sites[0], copy, FLOAT, rows, rows))
    assert re.fullmatch(
        r"the graph of site layer_1 differs from torch by \S+ with the same weights, at most \S+ is rounding; "
        r"this is another site",
        message,
    )


# Commands.


def test_the_commands_take_a_bundle_without_a_decoder(tiny: TinyDeepseek, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "bundle"
    outcome = command("engram-export", tiny.folder, "-o", out, "--tables-only", "--json")
    assert outcome.code == 0, outcome.err
    assert [site["site"] for site in outcome.json["sites"]] == ["layer_1", "layer_3"]
    assert outcome.json["plan"]["formats"] == {"int8": 2}
    assert outcome.json["plan"]["peak_memory_bytes"] is None
    assert "peak memory" not in outcome.err
    facts = command("engram", "inspect", out, "--json").json
    assert facts["graphs"] == "site.layer_1, site.layer_3"
    assert [table["record"] for table in facts["tables"]] == ["float8_e4m3 x 64, scale e8m0"] * 2
    assert command("engram", "verify", out, "--json").json == {
        "digests": "ok",
        "tables": "ok",
        "decoder": "none",
        "sites": "not run",
    }


@pytest.mark.parametrize(("name", "value"), [("executor", "tvm"), ("threads", 1), ("tables", "on")])
def test_verify_refuses_options_of_a_decoder_where_there_is_none(
    exported: tuple[TinyDeepseek, Bundle], command: Command, name: str, value: object
) -> None:
    outcome = command("engram", "verify", exported[1].path, f"--{name}", value)
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: --{name} is for running a decoder, this bundle holds tables and sites only; leave it out\n",
    )


def test_inspect_says_what_of_a_checkpoint_is_supported(tiny: TinyDeepseek, command: Command) -> None:
    facts = command("engram", "inspect", tiny.folder, "--json").json
    assert (facts["supported"], facts["layers"]) == ("tables and sites, with --tables-only", 4)


NO_DECODER = "engram: this bundle holds tables and sites only, no decoder; export without --tables-only to run it\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "BUNDLE", "hello"),
        ("run", "BUNDLE", "hello", "--executor", "onnxruntime"),
        ("bench", "BUNDLE"),
        ("compile", "BUNDLE", "--target", "native"),
        ("verify", "BUNDLE", "--against", "CHECKPOINT"),
    ],
)
def test_nothing_runs_without_a_decoder(
    exported: tuple[TinyDeepseek, Bundle], command: Command, arguments: tuple[str, ...]
) -> None:
    paths = {"BUNDLE": exported[1].path, "CHECKPOINT": exported[0].folder}
    outcome = command("engram", *(paths.get(argument, argument) for argument in arguments))
    assert outcome.code == 3
    assert outcome.err.endswith(NO_DECODER)


def test_rows_that_changed_since_the_export_are_found(tiny: TinyDeepseek, tmp_path: Path, command: Command) -> None:
    export(tiny.folder, tmp_path / "bundle", tables="reference")
    rows = Bundle.open(tmp_path / "bundle").manifest.tables[1].parts[0].ranges[0]
    data = bytearray(Path(rows.file).read_bytes())
    table = slice(rows.offset, rows.offset + rows.num_rows * ROW_DIM)
    data[table] = bytes(byte ^ 1 for byte in data[table])
    Path(rows.file).write_bytes(data)
    outcome = command("engram", "verify", tmp_path / "bundle")
    assert outcome.code == 5
    assert outcome.err.endswith("engram: rows of site layer_3 differ from those at export; export again\n")


# Bad input.


def change_text_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, text_config={**config["text_config"], **values})


def refused(tiny: TinyDeepseek, **changes: Any) -> str:
    """Export and return the refusal; nothing may be left behind."""
    out = tiny.folder.parent / "bundle"
    message = refusal(lambda: export(tiny.folder, out, **changes))
    assert [path.name for path in out.parent.iterdir()] == [tiny.folder.name]
    return message


def test_a_decoder_is_not_exported(tiny: TinyDeepseek, tmp_path: Path) -> None:
    options = export_options(tiny.folder, tmp_path / "bundle")
    assert refusal(lambda: export_bundle(options, SilentReporter())) == (
        "of 'deepseek_v41' the n-gram tables and the sites that read them are supported, attention, experts and "
        "hyper-connections are not; add --tables-only to export what is"
    )


def test_another_compressed_vocabulary(tiny: TinyDeepseek) -> None:
    found = int(open_map(tiny).max()) + 1
    change_text_config(tiny.folder, engram_compressed_vocab_size=99092)
    assert refused(tiny) == (
        f"the tokenizer's 300 tokens compress to {found} ids, 'engram_compressed_vocab_size' in config.json of "
        f"checkpoint is 99092; row ids would be wrong, give the model's own tokenizer.json"
    )


def open_map(tiny: TinyDeepseek) -> NDArray[np.int32]:
    token_map = read(tiny.folder).sites[0].table.token_map
    assert token_map is not None
    return token_map


def test_a_tokenizer_of_another_vocabulary(tiny: TinyDeepseek) -> None:
    change_text_config(tiny.folder, vocab_size=VOCAB + 1)
    assert refused(tiny) == (
        "the tokenizer has 300 tokens, the config says 301; row ids would be wrong, give the model's own tokenizer.json"
    )


def test_no_tokenizer(tiny: TinyDeepseek) -> None:
    (tiny.folder / "tokenizer.json").unlink()
    assert refused(tiny) == ("checkpoint has no tokenizer.json, which row ids are computed with; download it as well")


def test_a_tokenizer_that_can_not_be_read(tiny: TinyDeepseek) -> None:
    (tiny.folder / "tokenizer.json").write_text("{")
    assert refused(tiny) == (
        "the tokenizer of checkpoint can't be used: Cannot instantiate Tokenizer from buffer: EOF while parsing an "
        "object at line 1 column 1"
    )


def test_rows_that_are_not_the_sum_of_the_primes(tiny: TinyDeepseek) -> None:
    first, second = (site.table.num_rows for site in read(tiny.folder).sites)
    change_text_config(tiny.folder, engram_num_embeddings=[first, second + 1])
    assert refused(tiny) == (
        f"'engram_num_embeddings' in config.json of checkpoint is {second + 1} for layer 3, the primes of its hash sum "
        f"to {second}; correct the config"
    )


def test_a_table_of_other_rows(tiny: TinyDeepseek) -> None:
    rows = read(tiny.folder).sites[1].table.num_rows
    edit_tensors(tiny.folder, layers__3__engram__embed__weight=torch.ones(rows - 1, ROW_DIM).to(torch.float8_e4m3fn))
    assert refused(tiny) == (
        f"layers.3.engram.embed.weight has {rows - 1} rows, the hash of table layer_3 wants {rows}"
    )


def test_a_scale_of_the_table_that_is_not_a_number(tiny: TinyDeepseek) -> None:
    scales = tiny.tensors["layers.3.engram.embed.scale"].view(torch.uint8).clone()
    scales[417, 1] = 255
    edit_tensors(tiny.folder, layers__3__engram__embed__scale=scales.view(torch.float8_e8m0fnu))
    assert refused(tiny) == (
        "layers.3.engram.embed.scale has scale nan in row 417, expected finite scales; download the checkpoint again"
    )


def test_a_scale_of_a_weight_that_is_not_a_number(tiny: TinyDeepseek) -> None:
    scales = tiny.tensors["layers.1.engram.wkv.scale"].view(torch.uint8).clone()
    scales[2, 3] = 255
    edit_tensors(tiny.folder, layers__1__engram__wkv__scale=scales.view(torch.float8_e8m0fnu))
    assert (
        refused(tiny) == "layers.1.engram.wkv.scale has scale nan at [2, 3], expected finite scales; download it again"
    )


def test_weights_that_are_missing(tiny: TinyDeepseek) -> None:
    edit_tensors(tiny.folder, layers__1__engram__wkv__weight=None, layers__1__engram__k_weight=None)
    assert refused(tiny).startswith(
        "the checkpoint lacks 2 tensors: layers.1.engram.k_weight, layers.1.engram.wkv.weight"
    )


@pytest.mark.parametrize("name", ["embed.weight", "embed.scale"])
def test_a_table_that_is_missing(tiny: TinyDeepseek, name: str) -> None:
    edit_tensors(tiny.folder, **{f"layers.1.engram.{name}": None})
    assert refused(tiny) == (
        f"{tiny.folder / 'model.safetensors'} holds no tensor 'layers.1.engram.{name}'; the checkpoint lacks a weight "
        f"the model needs"
    )


def test_a_site_with_weights_this_family_does_not_have(tiny: TinyDeepseek) -> None:
    edit_tensors(tiny.folder, layers__1__engram__conv__weight=torch.ones(2))
    assert refused(tiny) == ("the checkpoint has 1 tensors: layers.1.engram.conv.weight that this family doesn't know")


def test_a_fused_weight_of_another_shape(tiny: TinyDeepseek) -> None:
    change_text_config(tiny.folder, hc_mult=3)
    assert refused(tiny) == (
        "the checkpoint has layers.1.engram.wkv.weight [320, 384], its config wants [256, 384]; they don't belong "
        "together"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engram_layer_ids": [1]},
            "config.json of checkpoint has 1 'engram_layer_ids' and 2 'engram_num_embeddings', wanted as many of both",
        ),
        (
            {"engram_layer_ids": [1, 4]},
            "'engram_layer_ids' in config.json of checkpoint are [1, 4], wanted distinct layers of 0 to 3",
        ),
        (
            {"engram_layer_ids": [1, 1]},
            "'engram_layer_ids' in config.json of checkpoint are [1, 1], wanted distinct layers of 0 to 3",
        ),
        (
            {"engram_max_ngram_size": 1},
            "'engram_max_ngram_size' in config.json of checkpoint is 1, wanted 2 to 16; correct the config",
        ),
        (
            {"engram_pad_token_id": VOCAB},
            "config.json of checkpoint names token id 300, the vocabulary has 300",
        ),
    ],
)
def test_a_config_that_can_not_be(tiny: TinyDeepseek, changes: dict[str, Any], message: str) -> None:
    change_text_config(tiny.folder, **changes)
    assert refused(tiny) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engram": Path("x")}, "--engram adds a site to a decoder, --tables-only exports none; leave one of them out"),
        (
            {"embeddings": True},
            "--embeddings adds an input to a decoder, --tables-only exports none; leave one of them out",
        ),
        ({"context": 8}, "--context is the length of a decoder's caches, --tables-only exports none; leave it out"),
        (
            {"quant": "keep"},
            "--quant keep takes over integers of a GGUF file, sites have none; use int8 or none",
        ),
        (
            {"quant": "int4"},
            "--quant int4 is for layers of a decoder, sites have none below int8; use int8 or none",
        ),
    ],
)
def test_options_without_effect(tiny: TinyDeepseek, changes: dict[str, Any], message: str) -> None:
    assert refused(tiny, **changes) == message


def test_a_family_without_sites_of_its_own(tiny: TinyDeepseek) -> None:
    edit_config(tiny.folder, model_type="llama")
    assert refused(tiny) == (
        "--tables-only takes checkpoints of ['deepseek_v41'], this is 'llama'; its tables are exported with its "
        "decoder, without that option"
    )
