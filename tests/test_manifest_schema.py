"""The published schema of manifests takes what the runtime takes, and what it refuses the runtime refuses, too."""

from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator
from tests.published import SCHEMA, VALIDATOR, check_manifest
from tests.test_manifest import (
    COUNTS,
    INTEGER_LISTS,
    KEYS,
    OBJECTS,
    VALUES,
    changed,
    mutated_manifests,
    parsed,
    site_only,
    sound_manifest,
    token_table,
    without,
)
from tests.workshop import Workshop

from tools.manifest_schema import value_schema


def fits(raw: Any) -> bool:
    """Whether the schema takes a manifest, once it has a seal."""
    valid: bool = VALIDATOR.is_valid(raw | {"sha256": "0" * 64})
    return valid


def test_the_schema_is_sound() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("raw", [sound_manifest(), token_table(), site_only()], ids=["ngrams", "token", "site"])
def test_sound_manifests_fit(raw: dict[str, Any]) -> None:
    assert fits(raw)


def test_a_bundle_fits(workshop: Workshop) -> None:
    """So do all others that tests export, see `tests.workshop.export`."""
    check_manifest(workshop.uncompiled().path)


@settings(max_examples=200, deadline=None)
@given(raw=mutated_manifests())
def test_what_the_schema_refuses_the_runtime_refuses(raw: dict[str, Any]) -> None:
    assert fits(raw) or parsed(raw) is None


@pytest.mark.parametrize("path", [path for path, _, _ in KEYS])
def test_a_missing_key_does_not_fit(path: str) -> None:
    assert not fits(without(path))


@pytest.mark.parametrize("path", [path for path, _, _ in VALUES])
def test_a_value_of_another_type_does_not_fit(path: str) -> None:
    assert not fits(changed(path, 1.5))


@pytest.mark.parametrize("path", ["", *(path for path, _ in OBJECTS)])
def test_an_unknown_key_does_not_fit(path: str) -> None:
    assert not fits(changed(f"{path}.surprise".lstrip("."), 1))


@pytest.mark.parametrize("value", [-1, 2**53])
@pytest.mark.parametrize("path", [path for path, _ in COUNTS])
def test_a_count_out_of_range_does_not_fit(path: str, value: int) -> None:
    assert not fits(changed(path, value))


@pytest.mark.parametrize("value", [True, "1", 2**63, -(2**63) - 1, None])
@pytest.mark.parametrize("path", [path for path, _ in INTEGER_LISTS])
def test_an_item_that_is_no_64_bit_integer_does_not_fit(path: str, value: object) -> None:
    assert not fits(changed(f"{path}.0", value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format_version", 1),
        ("files.0.path", "../up"),
        ("files.0.path", "a//b"),
        ("files.0.path", "a/."),
        ("graphs.decoder.file", "/etc/passwd"),
        ("graphs.decoder.states.0.kind", "ring"),
        ("graphs.decoder.states.0.shape", [32]),
        ("graphs.decoder.inputs.0.shape", ["X"]),
        ("graphs.encoder", sound_manifest()["graphs"]["decoder"]),
        ("model.vocab_size", 0),
        ("producer", "a\0b"),
        ("tables.0.record.payload", "float64"),
        ("tables.0.record.factor", "1.0"),
        ("tables.0.keyer.kind", "splitmix"),
        ("tables.0.keyer.orders", [0, 3]),
        ("tables.0.keyer.primes", [5, 7, 11, 1]),
        ("tables.0.parts.0.ranges.0.external", True),
        ("tables.0.parts.0.ranges.0.identity", "0"),
        ("tables.0.parts.0.ranges.0.file", "/rows"),
    ],
)
def test_a_value_that_is_wrong_by_itself_does_not_fit(path: str, value: object) -> None:
    assert not fits(changed(path, value))


def test_a_type_that_no_schema_is_known_of_is_an_error() -> None:
    with pytest.raises(TypeError, match="a manifest has a value of <class 'complex'>, of which no schema is known"):
        value_schema(complex)
