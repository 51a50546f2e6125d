"""The published schema of manifests, to hold bundles against."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from engram_runtime.bundle import MANIFEST_NAME

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parents[1] / "docs" / "engram.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def check_manifest(bundle: Path) -> None:
    """Hold the manifest of a bundle's folder against the schema."""
    VALIDATOR.validate(json.loads((bundle / MANIFEST_NAME).read_text()))
