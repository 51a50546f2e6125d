"""The random checkpoints that speed is measured on are exported by the command that the README gives."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Command

from engram_runtime.bundle import Bundle

ROOT = Path(__file__).parents[1]
SIZES = {"layers": 1, "hidden": 64, "feed_forward": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocabulary": 300}


def benchmark() -> Any:
    """Import benchmarks/random_models.py."""
    spec = importlib.util.spec_from_file_location("random_models", ROOT / "benchmarks" / "random_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented_options(document: Path) -> list[str]:
    (options,) = re.findall(r"engram-export build/random-1b -o \S+ (.*)", document.read_text(encoding="utf-8"))
    return str(options).split()


@pytest.mark.parametrize("document", ["README.md", "benchmarks/random_models.py"])
def test_the_documented_options_export_a_random_model(tmp_path: Path, command: Command, document: str) -> None:
    module = benchmark()
    module.write_checkpoint(module.Shape(**SIZES), tmp_path / "checkpoint")
    options = documented_options(ROOT / document)
    outcome = command("engram-export", tmp_path / "checkpoint", "-o", tmp_path / "bundle", *options)
    assert outcome.code == 0, outcome.err
    model = Bundle.open(tmp_path / "bundle").manifest.model
    assert (model.quantisation, model.context_length) == ("int4", 4096)
