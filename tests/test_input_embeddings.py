"""Positions given as input embeddings are tokens of those embeddings, for all that comes after them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.conftest import Command
from tests.test_export_errors import error_line
from tests.tiny import HIDDEN, TinyModel, TinySite
from tests.tiny_gemma import save_gemma
from tests.workshop import Workshop, bundle_logits, open_session, random_ids

from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError
from engram_runtime.input_embeddings import InputEmbeddings
from engram_runtime.keyers import NO_ROW, NO_TOKEN, NgramKeyer
from engram_runtime.session import Session, open_sites

MODELS = {"llama": TinyModel(), "qwen3": TinyModel(family="qwen3", head_dim=32, tied=False)}
SITE = TinySite()
EXECUTORS = ("onnxruntime", "tvm")
FLOAT_TOLERANCE = 1e-4  # of onnxruntime's passes of other lengths


CASES = [
    ("llama", "onnxruntime"),
    ("qwen3", "onnxruntime"),
    ("llama with a site", "tvm"),
    pytest.param("qwen3", "tvm", marks=pytest.mark.exhaustive),
]


def saved(workshop: Workshop, name: str) -> Path:
    return workshop.checkpoint(MODELS[name.split()[0]], *([SITE] if name.endswith("site") else []))


def taking(workshop: Workshop, name: str, executor: str = "onnxruntime") -> Bundle:
    bundle = workshop.bundle(saved(workshop, name), embeddings=True)
    return workshop.compiled(bundle) if executor == "tvm" else bundle


def embedding_of(checkpoint: Path, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Return ``[T, D]`` rows of a checkpoint's embedding."""
    rows: NDArray[np.float32] = safetensors.numpy.load_file(checkpoint / "model.safetensors")[
        "model.embed_tokens.weight"
    ]
    return rows[list(token_ids)]


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32], executor: str) -> None:
    if executor == "tvm":
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32), strict=True)
    else:
        np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT_TOLERANCE)


@pytest.mark.parametrize(("name", "executor"), CASES)
def test_with_tables_off_embeddings_of_tokens_are_those_tokens(workshop: Workshop, name: str, executor: str) -> None:
    bundle, text = taking(workshop, name, executor), random_ids(30)
    expected = bundle_logits(bundle, text, executor, tables_on=False)
    with open_session(bundle, executor, tables_on=False) as session:
        session.prefill(text[:5])
        last = session.prefill_embeddings(embedding_of(saved(workshop, name), text[5:16]))
        assert_same(last, expected[15], executor)
        assert_same(session.decode(text[16:]), expected[16:], executor)
        assert session.token_ids == [*text[:5], *[NO_TOKEN] * 11, *text[16:]]


@pytest.mark.parametrize("executor", ["onnxruntime", pytest.param("tvm", marks=pytest.mark.exhaustive)])
def test_an_input_that_is_not_used_changes_no_bit(workshop: Workshop, executor: str) -> None:
    checkpoint, text = workshop.checkpoint(MODELS["llama"], SITE), random_ids(30)
    bundles = [workshop.bundle(checkpoint, quant="int8", embeddings=given) for given in (False, True)]
    plain, taken = (workshop.compiled(bundle) if executor == "tvm" else bundle for bundle in bundles)
    np.testing.assert_array_equal(bundle_logits(taken, text, executor), bundle_logits(plain, text, executor))


def test_hidden_states_are_told_without_a_draft_head(workshop: Workshop) -> None:
    with open_session(taking(workshop, "llama")) as session:
        session.prefill(random_ids(7))
        latent = session.hidden
        session.prefill_embeddings(latent)
        assert (latent.shape, session.hidden.shape) == ((7, HIDDEN), (7, HIDDEN))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_site_adds_nothing_at_positions_that_are_no_tokens(workshop: Workshop, executor: str) -> None:
    """With tables on they are what tokens are with tables off."""
    bundle, text = taking(workshop, "llama with a site", executor), random_ids(12)
    with open_session(bundle, executor, tables_on=False) as off, open_session(bundle, executor) as on:
        expected = off.prefill(text)
        given = embedding_of(saved(workshop, "llama with a site"), text)
        assert_same(on.prefill_embeddings(given), expected, executor)


def test_a_site_sees_what_follows_as_the_beginning_of_a_text(workshop: Workshop) -> None:
    (site,) = open_sites(taking(workshop, "llama with a site"))
    for count in (2, 20):
        before, after = random_ids(count), np.array(random_ids(count, seed=1))
        whole = np.concatenate([before, [NO_TOKEN] * 3, after])
        np.testing.assert_array_equal(site.rows([], whole)[count + 3 :], site.rows([], after))
        np.testing.assert_array_equal(site.rows([], whole)[count : count + 3], 0)
        np.testing.assert_array_equal(site.rows([*before, NO_TOKEN], after), site.rows([], after))
    site.table.close()


@given(text=st.lists(st.integers(NO_TOKEN, 19), min_size=1, max_size=14), begin=st.integers(0, 13))
@settings(deadline=None)
def test_a_keyer_hides_all_up_to_a_position_that_is_no_token(text: list[int], begin: int) -> None:
    keyer = NgramKeyer(
        orders=(2, 3),
        num_heads=1,
        multipliers=np.array([3, 5, 7]),
        primes=np.array([101, 103]),
        offsets=np.array([0, 101]),
        pad_id=19,
        barrier_ids=np.array([4]),
        silent_ids=np.array([6]),
        token_map=None,
    )
    found = keyer.row_ids(text[:begin], np.array(text[begin:], dtype=np.int64))
    for place, row_ids in zip(range(begin, len(text)), found, strict=False):
        since = max((index + 1 for index, token in enumerate(text[:place]) if token == NO_TOKEN), default=0)
        alone = keyer.row_ids(text[since:place], np.array(text[place : place + 1]))
        assert row_ids.tolist() == ([NO_ROW, NO_ROW] if text[place] == NO_TOKEN else alone[0].tolist())


@pytest.mark.parametrize(("name", "executor"), CASES)
def test_embeddings_that_were_trimmed_leave_no_trace(workshop: Workshop, name: str, executor: str) -> None:
    """With the window of a site, kept ones are computed again."""
    bundle, text = taking(workshop, name, executor), random_ids(20)
    first, other = np.random.default_rng(0).normal(size=(2, 6, HIDDEN)).astype(np.float32)

    def run(session: Session, *, detour: bool) -> list[NDArray[np.float32]]:
        session.prefill(text[:3])
        session.prefill_embeddings(first)
        if detour:
            session.decode(text[9:12])
            session.prefill_embeddings(other)
            session.trim(9)
        return [session.decode(text[3:6]), session.prefill_embeddings(other[:2]), session.decode(text[6:9])]

    with open_session(bundle, executor) as straight, open_session(bundle, executor) as around:
        pairs = zip(run(around, detour=True), run(straight, detour=False), strict=True)
        for found, expected in pairs:
            assert_same(found, expected, executor)


@given(puts=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=5), at=st.integers(0, 9))
def test_embeddings_are_kept_by_position(puts: list[tuple[int, int]], at: int) -> None:
    kept, expected = InputEmbeddings(2), np.zeros((20, 2), dtype=np.float32)
    for number, (start, count) in enumerate(puts, start=1):
        kept.put(start, np.full((count, 2), number, dtype=np.float32))
        expected[start:] = 0
        expected[start : start + count] = number
    np.testing.assert_array_equal(kept.of(at, 6), expected[at : at + 6], strict=True)


def test_embeddings_that_cant_be_are_refused(workshop: Workshop) -> None:
    wide = np.zeros((2, HIDDEN + 1), dtype=np.float32)
    wrong: list[tuple[NDArray[np.float32], str]] = [
        (wide, f"input embeddings are [2, {HIDDEN + 1}], wanted [T, {HIDDEN}] finite numbers"),
        (
            np.full((1, HIDDEN), np.nan, dtype=np.float32),
            f"input embeddings are [1, {HIDDEN}], wanted [T, {HIDDEN}] finite numbers",
        ),
        (np.zeros((0, HIDDEN), dtype=np.float32), "no tokens were given; the model needs at least one"),
        (np.zeros((193, HIDDEN), dtype=np.float32), "193 tokens exceed the context of 192; shorten the prompt"),
    ]
    with open_session(taking(workshop, "llama")) as session:
        for embeddings, sentence in wrong:
            with pytest.raises(RequestError) as caught:
                session.prefill_embeddings(embeddings)
            assert str(caught.value) == sentence
        assert len(session) == 0


def test_a_bundle_without_that_input_says_how_to_get_it(workshop: Workshop) -> None:
    with open_session(workshop.uncompiled()) as session, pytest.raises(RequestError) as caught:
        session.prefill_embeddings(np.zeros((1, HIDDEN), dtype=np.float32))
    assert str(caught.value) == "this bundle takes no input embeddings; export it with --embeddings"


def test_families_of_several_streams_refuse(tmp_path: Path, command: Command) -> None:
    checkpoint = save_gemma(tmp_path / "gemma", "gemma3n")
    outcome = command("engram-export", checkpoint, "-o", tmp_path / "bundle", "--embeddings")
    assert error_line(outcome.err) == (
        "engram-export: models of 'gemma3n_text' take no input embeddings, only those of one residual stream and an "
        "embedding alone, like llama and qwen3; export without --embeddings"
    )


def test_the_command_exports_that_input(workshop: Workshop, tmp_path: Path, command: Command) -> None:
    checkpoint = workshop.checkpoint(MODELS["llama"])
    command("engram-export", checkpoint, "-o", tmp_path / "bundle", "--quant", "none", "--embeddings")
    decoder = Bundle.open(tmp_path / "bundle").manifest.decoder
    assert (decoder.takes_embeddings, decoder.told_outputs) == (True, ("hidden",))
