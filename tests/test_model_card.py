"""Every bundle has a card for people, made of what its export measured; nothing in it means more than it says."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Command
from tests.tiny import CONTEXT, TinyModel, TinySite
from tests.workshop import Workshop, copy_folder, export

from engram_export.checkpoint import license_name, open_checkpoint
from engram_export.model_card import HIDDEN, code, front_matter, published_name
from engram_export.verify import Verification
from engram_runtime.bundle import MANIFEST_NAME, MODEL_CARD, Bundle, sealed
from engram_runtime.errors import BundleError
from examples import demo

HOSTILE = "a|b`<img src=x>\n# [c](javascript:d)"
SHOWN = f"`a{HIDDEN}b{HIDDEN}<img src=x>{HIDDEN}# [c](javascript:d)`"


@dataclasses.dataclass(frozen=True)
class Exported:
    """A bundle of a checkpoint and a site in folders with names that mean something to Markdown."""

    bundle: Bundle
    verification: Verification

    @property
    def card(self) -> list[str]:
        """The lines of its card."""
        return self.bundle.file(MODEL_CARD).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def exported(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("cards")
    checkpoint = copy_folder(workshop.checkpoint(TinyModel()), root / HOSTILE)
    (checkpoint / "README.md").write_text("---\ntags: [x]\nlicense: 'apache-2.0'\n---\n# A model\nlicense: mit\n")
    site = copy_folder(workshop.site_folder(TinyModel(), TinySite()), root / f"memory {HOSTILE}")
    (site / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    verification = export(checkpoint, root / "bundle", engram=site, tables="repack", table_dtype="fp8")
    return Exported(Bundle.open(root / "bundle"), verification)


def test_the_card_says_what_the_bundle_was_made_from(exported: Exported) -> None:
    assert f"# {SHOWN} for engram-edge" in exported.card
    assert f"| source | {SHOWN}, license apache-2.0 |" in exported.card
    assert f"| added from | `memory {SHOWN[1:]}, license apache-2.0 |" in exported.card
    assert f"| context | {CONTEXT} tokens |" in exported.card


def test_the_card_says_to_model_hubs_what_they_ask_for(exported: Exported) -> None:
    assert exported.card[: exported.card.index("---", 1) + 1] == [
        "---",
        'license: "apache-2.0"',
        'library_name: "engram-edge"',
        'pipeline_tag: "text-generation"',
        'tags: ["engram-edge", "onnx", "engram", "llama"]',
        "---",
    ]


def test_no_license_is_claimed_for_what_was_added_under_another(exported: Exported, tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(open_checkpoint(demo.checkpoint()), license="mit")
    assert 'license: "mit"' in front_matter(exported.bundle, checkpoint, None)
    assert "license" not in front_matter(exported.bundle, checkpoint, tmp_path)


def test_the_card_has_the_figures_of_the_export(exported: Exported) -> None:
    graph, errors = exported.verification.graph, exported.verification.rows["layer_1"]
    figures = f"{graph.max_abs:.2e} | {graph.mean_abs:.2e} | {graph.argmax_agreement:.1%}"
    assert f"| graph, torch, same weights | {figures} |" in exported.card
    assert f"Repacked rows of `layer_1` are off by {errors.mean:.2%}, at most {errors.max:.2%}." in exported.card


def test_the_card_has_formats_tables_and_sizes(exported: Exported) -> None:
    assert "| float32 | 11 |" in exported.card
    assert "| `layer_1` | 326 | float8_e4m3 x 16, scale float16, 18 bytes | 4 | the bundle |" in exported.card
    assert "| cache, a token | 512 B |" in exported.card
    size = exported.bundle.file("graph/decoder.onnx").stat().st_size
    assert f"| `graph/decoder.onnx` | {size / 1024:.1f} KiB |" in exported.card


def test_the_manifest_vouches_for_the_card(exported: Exported, tmp_path: Path) -> None:
    bundle = Bundle.open(copy_folder(exported.bundle.path, tmp_path / "bundle"))
    whole = bundle.file(MODEL_CARD).read_bytes()
    bundle.verify_digests()
    bundle.file(MODEL_CARD).write_bytes(changed := whole.replace(b"512 B", b"256 B"))
    with pytest.raises(BundleError) as caught:
        bundle.verify_digests()
    found, expected = (hashlib.sha256(content).hexdigest() for content in (changed, whole))
    assert str(caught.value) == f"README.md has SHA-256 {found}, the manifest says {expected}; export again"


def test_a_bundle_of_before_there_were_cards_opens(exported: Exported, tmp_path: Path, command: Command) -> None:
    bundle = copy_folder(exported.bundle.path, tmp_path / "bundle")
    assert command("engram", "inspect", bundle, "--json").json["card"] == "README.md"
    (bundle / MODEL_CARD).unlink()
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != MODEL_CARD]
    (bundle / MANIFEST_NAME).write_bytes(sealed(manifest))
    assert "card" not in command("engram", "inspect", bundle, "--json").json


@given(text=st.text())
def test_a_name_is_one_span_of_code_whatever_it_holds(text: str) -> None:
    shown = code(text)
    assert (shown[0], shown[-1], shown.count("`"), shown.count("|")) == ("`", "`", 2, 0)
    assert len(shown) > 2
    assert shown.isprintable()


@given(text=st.text(st.characters(categories=["L", "N"])).filter(bool))
def test_a_plain_name_is_shown_as_it_is(text: str) -> None:
    assert code(text) == f"`{text}`"


def licensed(checkpoint: Path, tmp_path: Path, card: str) -> str | None:
    """Return the license of a checkpoint with a card; its weights are those of another one."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in checkpoint.iterdir():
        os.link(path, folder / path.name)
    (folder / "README.md").write_text(card)
    return open_checkpoint(folder).license


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: apache-2.0 \r\n---\r\n", "apache-2.0"),
        ('---\nbase_model: x\nlicense: "llama3.1"\n---\n', "llama3.1"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\nlicense: <script>\n---\n", None),
        ("---\nlicense: a b\n---\n", None),
        ("---\nlicense: " + "m" * 65 + "\n---\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_license_is_the_one_that_the_front_matter_names(
    workshop: Workshop, tmp_path: Path, card: str, expected: str | None
) -> None:
    assert licensed(workshop.checkpoint(TinyModel()), tmp_path, card) == expected


def test_the_license_of_a_gguf_file_is_the_one_in_its_metadata() -> None:
    assert open_checkpoint(demo.checkpoint()).license == "apache-2.0"


@pytest.mark.parametrize("value", [None, 1, ["mit"], "a\nb", "", "-"])
def test_what_is_no_name_of_a_license_is_none(value: object) -> None:
    assert license_name(value) is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/cache/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/12fd/model.gguf", "HuggingFaceTB/SmolLM2-135M"),
        ("/cache/hub/models--Qwen--Qwen3.8-Flash_Next/snapshots/12fd", "Qwen/Qwen3.8-Flash_Next"),
        ("/cache/hub/models--a b--c/snapshots/12fd", None),
        ("/models/SmolLM2-135M", None),
    ],
)
def test_a_model_in_the_cache_of_hugging_face_has_the_name_of_its_page(path: str, expected: str | None) -> None:
    assert published_name(Path(path)) == expected
