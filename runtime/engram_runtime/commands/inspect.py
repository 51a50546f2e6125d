"""``engram inspect``: what a bundle or a checkpoint holds."""

import importlib
import json
from pathlib import Path
from typing import Any

import click

from engram_runtime.bundle import MANIFEST_NAME, MODEL_CARD, Bundle, file_sha256
from engram_runtime.commands.options import json_option
from engram_runtime.errors import TargetError
from engram_runtime.library import LIBRARY_FOLDER, LIBRARY_INFO_NAME, LibraryInfo
from engram_runtime.manifest import DRAFT_HEAD, Manifest
from engram_runtime.strict_json import read_json_object
from engram_runtime.terminal import show

CHECKPOINT_INSPECTION = "engram_export.inspection"  # needs the export extra; only asked for on checkpoints


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what PATH holds: a bundle, a Hugging Face folder or a GGUF file."""
    facts = describe_bundle(Bundle.open(path)) if (path / MANIFEST_NAME).is_file() else _describe_checkpoint(path)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        _print(facts)


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return a bundle's facts as JSON values."""
    manifest = bundle.manifest
    libraries = sorted(bundle.file(LIBRARY_FOLDER).glob(f"*/{LIBRARY_INFO_NAME}"))
    infos = [LibraryInfo.from_dict(read_json_object(path)) for path in libraries]
    return {
        "kind": "bundle",
        "model": manifest.model.name,
        "family": manifest.model.family,
        "quantisation": manifest.model.quantisation,
        "layers": manifest.model.num_layers,
        "hidden size": manifest.model.hidden_size,
        "vocabulary": manifest.model.vocab_size,
        "context": manifest.model.context_length,
        "producer": manifest.producer,
        **({"card": MODEL_CARD} if any(entry.path == MODEL_CARD for entry in manifest.files) else {}),
        "bytes": sum(entry.bytes for entry in manifest.files),
        "graphs": ", ".join(manifest.graphs),
        **_draft_head(manifest),
        "tables": [
            {
                "site": table.site,
                "rows": table.num_rows,
                "record": f"{table.record.payload} x {table.record.columns}, scale {table.record.scale}",
                "record bytes": table.record.record_bytes,
                "rows a token": table.keyer.columns,
                "read": "in place" if table.ranges[0].external else "from the bundle",
            }
            for table in manifest.tables
        ],
        "sha256": file_sha256(bundle.path / MANIFEST_NAME),
        "libraries": [
            {"target": info.target, "fits here": info.misfit() is None, "sha256": info.digest} for info in infos
        ],
    }


def _draft_head(manifest: Manifest) -> dict[str, Any]:
    if DRAFT_HEAD not in manifest.graphs:
        return {}
    return {"drafts": f"of {manifest.graphs[DRAFT_HEAD].outputs[0].shape[-1]:,} tokens"}


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    try:
        inspection = importlib.import_module(CHECKPOINT_INSPECTION)
    except ModuleNotFoundError as error:
        raise TargetError(
            f"{path} is no bundle, and reading checkpoints needs {error.name}: pip install 'engram-edge[export]'"
        ) from error
    facts: dict[str, Any] = inspection.describe_checkpoint(path)
    return facts


def _print(facts: dict[str, Any], indent: str = "") -> None:
    for key, value in facts.items():
        if isinstance(value, list):
            show(f"{indent}{key}")
            for item in value:
                show(f"{indent}  " + ", ".join(f"{name} {part}" for name, part in item.items()))
        else:
            show(f"{indent}{key:14}{value:,}" if isinstance(value, int) else f"{indent}{key:14}{value}")
