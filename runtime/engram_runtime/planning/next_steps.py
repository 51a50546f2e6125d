"""What to type next."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from engram_runtime.planning.machine import Machine
from engram_runtime.planning.outline import ExportNeeds, Outline

PROMPT = "The capital of France is"


def commands(outline: Outline, machine: Machine) -> Sequence[str]:
    """Return the commands that lead from what there is to a text."""
    if outline.export is None:
        return _of_bundle(outline, outline.path, machine)
    bundle = Path(f"{outline.path.stem if outline.path.is_file() else outline.path.resolve().name}.engram")
    export = _line("engram-export", outline.path, "-o", bundle, *_export_options(outline.export))
    return [export] if outline.export.tables_only else [export, *_of_bundle(outline, bundle, machine)]


def _of_bundle(outline: Outline, bundle: Path, machine: Machine) -> Sequence[str]:
    if not outline.runs:
        return [_line("engram", "verify", bundle)]
    compiling = (
        [] if outline.target == machine.target else [_line("engram", "compile", bundle, "--target", machine.target)]
    )
    return [*compiling, _line("engram", "run", bundle, PROMPT)]


def _export_options(export: ExportNeeds) -> Sequence[object]:
    repacking = [] if export.table_dtype is None else ["--tables", "repack", "--table-dtype", export.table_dtype]
    only = ["--tables-only"] if export.tables_only else []
    context = [] if export.context is None else ["--context", export.context]
    return [*only, "--quant", export.quant, *context, *repacking]


def _line(*words: object) -> str:
    return shlex.join(map(str, words))
