"""``engram tables why`` says which n-grams a token looked up, what was in their rows and what became of it."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Command
from tests.test_manifest import sound_manifest
from tests.tiny import TinyModel, TinySite
from tests.tiny_gemma import save_gemma
from tests.workshop import Workshop, copy_folder, export, open_session

from engram_runtime.bundle import MANIFEST_NAME, Bundle, sealed
from engram_runtime.errors import BundleError
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.keyers import NO_ROW
from engram_runtime.lens import why
from engram_runtime.lens.columns import column, quoted, width
from engram_runtime.lens.why import Ngram, Reading, SiteReadings, explained_sites, hashed_ids
from engram_runtime.lens.why_table import LINE_COLUMNS, chosen, json_values, lines
from engram_runtime.manifest import Manifest
from engram_runtime.session import open_sites
from engram_runtime.tokenizer import TextTokenizer

TEXT = "The tide comes in twice,\nÜber 日本語."
HERE = ("--executor", "onnxruntime", "--threads", "1")
BARRIER, SILENT, PAD = 7, 8, 9
KEYER = NgramKeyerSpec(
    orders=(2, 4),
    num_heads=2,
    multipliers=(3, 50, 700, 9000),
    primes=(101, 103, 107, 109),
    offsets=(0, 101, 204, 311),
    pad_id=PAD,
    barrier_ids=(BARRIER,),
    silent_ids=(SILENT,),
)


# The n-grams


def rows_of(hashed: Sequence[int | None]) -> list[int]:
    """Return the rows of the n-grams that end a text of hashed ids, in Python's own integers."""
    rows = []
    for column_index, prime in enumerate(KEYER.primes):
        order, mixed = KEYER.orders[column_index // KEYER.num_heads], 0
        for back in range(order):
            token_id = hashed[-1 - back]
            mixed ^= (PAD if token_id is None else token_id) * KEYER.multipliers[back]
        rows.append(KEYER.offsets[column_index] + mixed % prime)
    return rows


@given(st.lists(st.integers(0, SILENT), min_size=1, max_size=12))
def test_the_tokens_that_are_shown_are_those_that_are_hashed(token_ids: list[int]) -> None:
    row_ids = KEYER.keyer(10, None).row_ids([], np.array(token_ids))
    hashed = [rows_of(hashed_ids(KEYER, token_ids[: end + 1])) for end in range(len(token_ids))]
    silent = np.array(token_ids) == SILENT
    assert row_ids.tolist() == np.where(silent[:, None], NO_ROW, hashed).tolist()


# The table

WORDS = {0: "<s>", 1: " a\n", 2: "日本語日本語", 3: "é" * 60, 4: "?"}


def decode(token_ids: Sequence[int]) -> str:
    return "".join(WORDS[token_id] for token_id in token_ids)


def reading(position: int, token_id: int, contribution: float, *ngrams: Ngram) -> Reading:
    return Reading(
        position=position,
        token_id=token_id,
        gate=(0.25, 0.5),
        added=(1.0, 2.0),
        stream=(4.0, 4.0),
        contribution=contribution,
        ngrams=ngrams,
    )


def ngram(*token_ids: int | None, row_ids: Sequence[int] = (5, 1234567), norms: Sequence[float] = (3.0, 4.0)) -> Ngram:
    return Ngram(token_ids=token_ids, row_ids=tuple(row_ids), row_norms=tuple(norms))


MANY = range(1_000_000_000, 1_000_000_008)
READINGS = SiteReadings(
    site="layer_3",
    orders=(2, 3),
    num_heads=2,
    readings=(
        reading(0, 0, 0.0521, ngram(None, 0), ngram(None, None, 0, norms=(0.0, 0.5))),
        reading(1, 4, 0.0),
        reading(2, 1, 1.5, ngram(2, 1), ngram(2, 3, 1, row_ids=MANY, norms=[0, 1, 1, 1, 1, 0, 0, 1])),
    ),
)
TABLE = """\
site layer_3: n-grams of 2 and 3 tokens, 2 rows each
       token              gate    adds  n-gram                          norm  rows
    0  "<s>"             0.500    5.2%  ·"<s>"                             5  5 1234567
                                        ··"<s>"                          0.5  5* 1234567
    1  "?"                   -    0.0%                                        none
    2  " a\\n"            0.500  150.0%  "日本語日本語 a\\n"                 5  5 1234567
                                        …éééééééééééééééééééééé a\\n"    2.24  1000000000* 1000000001 1000000002 +5 (2*)
"""


def test_a_line_shows_a_token_and_an_ngram() -> None:
    assert "\n".join(lines(READINGS, READINGS.readings, decode)) + "\n" == TABLE


def test_what_is_added_to_a_stream_of_zeros_is_no_number_in_json() -> None:
    site = dataclasses.replace(READINGS, readings=(reading(0, 0, math.inf),))
    assert json.loads(json.dumps(json_values(site, site.readings, decode)))["readings"][0]["contribution"] is None


def test_only_the_largest_contributions_may_be_shown_and_first() -> None:
    def positions(sort: str, top: int | None) -> list[int]:
        return [shown.position for shown in chosen(READINGS, sort=sort, top=top)]

    assert [positions("position", None), positions("contribution", None)] == [[0, 1, 2], [2, 0, 1]]
    assert [positions("position", 2), positions("contribution", 1)] == [[0, 2], [2]]


@given(st.text(), st.integers(2, 30))
def test_a_column_is_as_wide_as_it_says_whatever_it_holds(text: str, columns: int) -> None:
    shown = column(quoted(text), columns)
    assert shown.isprintable()
    assert width(shown) == columns


# The command


def tiny_bundle(workshop: Workshop) -> Bundle:
    return workshop.bundle(workshop.checkpoint(TinyModel(), TinySite()))


def test_the_command_says_what_session_keyer_and_table_say(workshop: Workshop, command: Command) -> None:
    bundle = tiny_bundle(workshop)
    tokenizer = TextTokenizer.load(bundle.path)
    token_ids = tokenizer.encode(TEXT)
    with open_session(bundle) as session:
        session.prefill(token_ids)
        activity = session.activity["layer_1"]
    (site,) = open_sites(bundle)
    rows = site.rows([], np.array(token_ids)).astype(np.float64)
    site.table.close()
    answer = command("engram", "tables", "why", bundle.path, TEXT, *HERE, "--json").json
    (found,) = answer["sites"]
    readings = found["readings"]
    ngrams = [ngram for shown in readings for ngram in shown["ngrams"]]
    assert (answer["executor"], found["site"], found["orders"], found["num_heads"]) == (
        "onnxruntime",
        "layer_1",
        [2, 3],
        2,
    )
    assert [shown["token_id"] for shown in readings] == token_ids
    assert "".join(shown["token"] for shown in readings[:9]) == tokenizer.decode(token_ids[:9])
    np.testing.assert_allclose([shown["gate"] for shown in readings], activity.gate, rtol=1e-6)
    np.testing.assert_allclose([shown["contribution"] for shown in readings], activity.contribution, rtol=1e-6)
    row_ids = [row_id for ngram in ngrams for row_id in ngram["row_ids"]]
    assert row_ids == site.keyer.row_ids([], np.array(token_ids)).ravel().tolist()
    np.testing.assert_allclose(
        [norm for ngram in ngrams for norm in ngram["row_norms"]], np.linalg.norm(rows, axis=2).ravel(), rtol=1e-6
    )
    assert ngrams[3] == ngrams[3] | {"token_ids": [None, *token_ids[:2]], "text": tokenizer.decode(token_ids[:2])}


def test_norms_do_not_depend_on_where_a_chunk_ends(
    workshop: Workshop, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("engram", "tables", "why", tiny_bundle(workshop).path, TEXT, *HERE, "--json")
    whole = command(*line).json
    monkeypatch.setattr(why, "CHUNK_TOKENS", 3)
    assert command(*line).json == whole


def test_the_command_prints_no_line_wider_than_a_terminal(workshop: Workshop, command: Command) -> None:
    outcome = command("engram", "tables", "why", tiny_bundle(workshop).path, TEXT, *HERE, "--top", 3)
    assert len(outcome.out.splitlines()) == 2 + 3 * 2
    assert max(width(line) for line in outcome.out.splitlines()) <= LINE_COLUMNS
    table, legend, _ = outcome.err.splitlines()
    assert table.startswith("table layer_1: resident, ")
    assert legend.startswith("gate: 0 to 1")


def test_one_of_several_sites_is_shown_alone(workshop: Workshop, command: Command) -> None:
    sites = [TinySite(layer_id=layer, convolution=False) for layer in (0, 1)]
    bundle = workshop.bundle(workshop.checkpoint(TinyModel(), *sites))
    both, one = (
        command("engram", "tables", "why", bundle.path, TEXT, *HERE, "--json", *chosen_site).json["sites"]
        for chosen_site in ((), ("--site", "layer_1"))
    )
    assert [site["site"] for site in both] == ["layer_0", "layer_1"]
    assert one == both[1:]


# What can't be explained


def test_an_unknown_site_is_named_beside_those_there_are(workshop: Workshop, command: Command) -> None:
    path = tiny_bundle(workshop).path
    outcome = command("engram", "tables", "why", path, TEXT, *HERE, "--site", "layer_7")
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: site 'layer_7' is unknown; bundle {path} reads n-grams at ['layer_1']\n",
    )


def test_a_bundle_without_site_outputs_runs_but_is_not_explained(
    workshop: Workshop, command: Command, tmp_path: Path
) -> None:
    path = copy_folder(tiny_bundle(workshop).path, tmp_path / "old")
    raw = json.loads((path / MANIFEST_NAME).read_text())
    del raw["graphs"]["decoder"]["outputs"][1:]
    (path / MANIFEST_NAME).write_bytes(sealed(raw))
    assert command("engram", "run", path, TEXT, *HERE, "--max-tokens", 2).code == 0
    outcome = command("engram", "tables", "why", path, TEXT, *HERE)
    assert (outcome.code, outcome.err) == (
        3,
        f"engram: bundle {path} was exported without site outputs; export it again\n",
    )


def test_a_bundle_without_a_decoder_is_not_explained() -> None:
    raw: dict[str, Any] = sound_manifest() | {"graphs": {}}
    with pytest.raises(BundleError, match="this bundle holds tables and sites only, no decoder"):
        explained_sites(Bundle(Path(), Manifest.from_dict(raw)), None)


def test_rows_of_a_token_alone_are_not_explained(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    export(save_gemma(tmp_path / "checkpoint", "gemma4"), path)
    assert Bundle.open(path).manifest.decoder.activity_outputs == ()
    outcome = command("engram", "tables", "why", path, TEXT, *HERE)
    assert (outcome.code, outcome.err) == (
        2,
        f"engram: bundle {path} has no site that reads n-grams, so there is nothing to explain\n",
    )


def test_a_text_without_tokens_is_not_explained(workshop: Workshop, command: Command) -> None:
    outcome = command("engram", "tables", "why", tiny_bundle(workshop).path, "", *HERE)
    assert (outcome.code, outcome.err.splitlines()[1:]) == (
        2,
        ["engram: no tokens were given; the model needs at least one"],
    )
