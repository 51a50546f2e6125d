"""``README.md`` of a bundle, as model hubs show it: what it was made from, what it holds and how far off it is."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_export.calibration_report import CalibrationReport
from engram_export.checkpoint import Checkpoint, stated_license
from engram_export.repack import RowErrors
from engram_runtime.bundle import MODEL_CARD, Bundle
from engram_runtime.manifest import DECODER, StateSpec
from engram_runtime.sizes import format_size
from engram_runtime.table_spec import TableSpec

if TYPE_CHECKING:  # they import the recipes that write cards
    from engram_export.site_verify import SiteVerification
    from engram_export.verify import Verification

CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)  # a model's folder in the cache of Hugging Face
HIDDEN = "\N{REPLACEMENT CHARACTER}"


def write_card(
    bundle: Bundle, checkpoint: Checkpoint, added: Path | None, formats: Mapping[str, int], parity: Iterable[str]
) -> None:
    """Write the card of a bundle all other files of which are there; the same export writes the same bytes.

    Args:
        added: the folder whose site or draft head was added to the checkpoint, or None.
        formats: number of weight matrices by format.
        parity: paragraphs of what was measured, see `decoder_parity` and `site_parity`.
    """
    paragraphs = [
        front_matter(bundle, checkpoint, added),
        f"# {code(checkpoint.source)} for engram-edge",
        f"A bundle that {bundle.manifest.producer} exported: a graph, its weights and the tables it reads.",
        table(["", ""], facts(bundle, checkpoint, added)),
        "## Formats",
        table(["weights", "matrices"], [(name, f"{count:,}") for name, count in formats.items()]),
        *tables(bundle.manifest.tables),
        "## Sizes",
        table(["", "size"], sizes(bundle)),
        "## Parity",
        *parity,
        "## Running it",
        *usage(bundle),
    ]
    bundle.file(MODEL_CARD).write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def front_matter(bundle: Bundle, checkpoint: Checkpoint, added: Path | None) -> str:
    """Return what model hubs read, as YAML; each value is also JSON, so that it can't be taken for anything else.

    A license is that of the checkpoint and of what was added to it, or is left to whoever publishes the bundle.
    """
    same = added is None or stated_license(added) == checkpoint.license
    model, name = bundle.manifest.model, published_name(checkpoint.path)
    runs = DECODER in bundle.manifest.graphs
    values: dict[str, Any] = {
        "license": checkpoint.license if same else None,
        "base_model": name,
        "base_model_relation": "quantized" if name is not None and model.quantisation != "none" else None,
        "library_name": "engram-edge",
        "pipeline_tag": "text-generation" if runs else None,
        "tags": ["engram-edge", "onnx", *(["engram"] if bundle.manifest.tables else []), model.family],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def published_name(path: Path) -> str | None:
    """Return ``owner/name`` of a checkpoint in the cache of Hugging Face, None for one anywhere else."""
    found = [match for part in path.absolute().parts if (match := CACHED.fullmatch(part))]
    return "/".join(found[-1].groups()) if found else None


def facts(bundle: Bundle, checkpoint: Checkpoint, added: Path | None) -> list[tuple[str, str]]:
    """Return rows of what the model is."""
    model = bundle.manifest.model
    sources = [("source", checkpoint.source, checkpoint.license)]
    if added is not None:
        sources.append(("added from", added.resolve().name, stated_license(added)))
    return [
        *((title, f"{code(name)}, license {stated or 'not stated'}") for title, name, stated in sources),
        ("family", model.family),
        ("quantisation", model.quantisation),
        ("layers, hidden size", f"{model.num_layers:,}, {model.hidden_size:,}"),
        ("vocabulary", f"{model.vocab_size:,} tokens"),
        ("context", f"{model.context_length:,} tokens"),
    ]


def tables(specs: Sequence[TableSpec]) -> list[str]:
    """Return the section on host tables, if there are any."""
    rows = [
        (
            code(spec.site),
            f"{spec.num_rows:,}",
            f"{spec.record.payload} x {spec.record.columns:,}, scale {spec.record.scale}, {spec.record.record_bytes:,} "
            "bytes",
            f"{spec.keyer.columns}",
            "the files of the source" if spec.ranges[0].external else "the bundle",
        )
        for spec in specs
    ]
    return ["## Tables", table(["site", "rows", "a row", "rows a token", "read from"], rows)] if rows else []


def sizes(bundle: Bundle) -> list[tuple[str, str]]:
    """Return rows of the graphs, weights and tables, and of what a sequence takes in memory."""
    paths = sorted(path for folder in ("graph", "tables") for path in bundle.file(folder).glob("*"))
    files = [(code(path.relative_to(bundle.path).as_posix()), format_size(path.stat().st_size)) for path in paths]
    decoder = bundle.manifest.graphs.get(DECODER)
    if decoder is None:
        return files
    growing = sum(_bytes(state) for state in decoder.states if state.rolls_back)
    fixed = sum(_bytes(state) for state in decoder.states if not state.rolls_back)
    caches = {"cache, a token": growing // bundle.manifest.model.context_length, "other states, a sequence": fixed}
    return [*files, *((title, format_size(num_bytes)) for title, num_bytes in caches.items() if num_bytes)]


def decoder_parity(verification: "Verification") -> list[str]:
    """Return what the export of a decoder measured."""
    rows = [
        (title, f"{parity.max_abs:.2e}", f"{parity.mean_abs:.2e}", f"{parity.argmax_agreement:.1%}")
        for title, parity in verification.parities.items()
    ]
    repacked = [repacked_rows(site, errors) for site, errors in verification.rows.items()]
    return [
        f"Logits at {verification.model.tokens:,} positions of a fixed text, activations in float32:",
        table(["compared", "largest difference", "mean difference", "argmax agreement"], rows),
        *([calibration(verification.calibration)] if verification.calibration is not None else []),
        *repacked,
    ]


def site_parity(sites: Iterable["SiteVerification"]) -> list[str]:
    """Return what the export of sites by themselves measured."""
    found = list(sites)
    rows = [(code(site.site), f"{site.tokens:,}", f"{site.graph:.2e}", f"{site.model:.2e}") for site in found]
    repacked = [repacked_rows(site.site, site.row_errors) for site in found if site.row_errors is not None]
    return [
        "Largest differences of what a site makes of random streams and the rows of a fixed text:",
        table(["site", "tokens", "graph, torch, same weights", "bundle, float32 checkpoint"], rows),
        *repacked,
    ]


def calibration(report: CalibrationReport) -> str:
    """Return how int4 was quantised."""
    if report.reason is not None:
        return f"int4 by plain rounding: {code(report.reason)}"
    assert report.text is not None
    return (
        f"int4 calibrated on {report.tokens:,} tokens of the text {code(report.text)}: KL(float32 || bundle) is "
        f"{report.chosen:.4f} nats on {report.held_out_tokens:,} others, {report.int4:.4f} with all layers in int4."
    )


def repacked_rows(site: str, errors: RowErrors) -> str:
    """Return what repacking cost."""
    return f"Repacked rows of {code(site)} are off by {errors.mean:.2%}, at most {errors.max:.2%}."


def usage(bundle: Bundle) -> list[str]:
    """Return commands to type in the bundle's folder."""
    lines = ["engram inspect .", "engram verify ."]
    if DECODER in bundle.manifest.graphs:
        lines = ["engram compile .", "engram verify ."]
        if bundle.file("tokenizer.json").exists():
            lines.append('engram run . "Once upon a time"')
    commands = "\n".join(["```sh", *lines, "```"])
    return ["In this folder, with engram-edge installed:", commands]


def code(text: str) -> str:
    """Return text from elsewhere so that nothing in it means anything to Markdown; marks that could are replaced."""
    shown = "".join(mark if mark.isprintable() and mark not in "`|" else HIDDEN for mark in text)
    return f"`{shown or HIDDEN}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells without line breaks and bars."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _bytes(state: StateSpec) -> int:
    return prod(state.shape) * 4
