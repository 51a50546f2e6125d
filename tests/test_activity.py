"""What a graph says of its sites is what they do, in torch's terms, on onnxruntime and compiled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.reference import reference_activity
from tests.test_compile import NATIVE, assert_same_bits
from tests.tiny import TinyModel, TinySite, site_files
from tests.tiny_families import END_ID, FAMILIES
from tests.workshop import Workshop, open_session, random_ids
from transformers import AutoModelForCausalLM
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from engram_runtime.activity import SiteActivity
from engram_runtime.bundle import Bundle
from engram_runtime.session import Session

SITE, PLAIN_SITE = TinySite(), TinySite(convolution=False, gate_bias=False, gains=False, output_scale=None)
STREAMS = FAMILIES["qwen4_exp"][0]
TOKENS = 23  # 8 + 8 + 4 + 2 + 1: every compiled number of tokens takes part
FLOAT_TOLERANCE = 1e-4  # relative: float32 sums in another order, over two layers

Array = NDArray[Any]


def text(count: int = TOKENS) -> list[int]:
    """Return random ids with an end of text among them, where the n-grams of Qwen4-Exp start anew."""
    return [END_ID if position == 5 else token_id for position, token_id in enumerate(random_ids(count))]


def engram_bundle(workshop: Workshop, site: TinySite = SITE) -> Bundle:
    return workshop.bundle(workshop.checkpoint(TinyModel(), site))


def streams_bundle(workshop: Workshop) -> Bundle:
    return workshop.bundle(workshop.family(STREAMS))


def activity(
    bundle: Bundle, token_ids: Sequence[int], executor: str = "onnxruntime", *, step: int | None = None, **options: bool
) -> Array:
    """Return what the only site says of a text, ``[T, G, 3]``, run in one piece or ``step`` tokens at a time."""
    with open_session(bundle, executor, **options) as session:
        size = step or len(token_ids)
        pieces = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
        return np.concatenate([values(session) for piece in pieces for _ in session.logits(piece)])


def values(session: Session) -> Array:
    (site,) = session.activity.values()
    return site.values


def transformers_activity(checkpoint: Path, token_ids: Sequence[int]) -> Array:
    """Return ``[T, G, 3]`` of the only n-gram memory of a Qwen4-Exp, from what goes into and out of its modules."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    (memory,) = (module for module in model.modules() if isinstance(module, Qwen4ExpTextPLELayer))
    seen: dict[str, torch.Tensor] = {}
    memory.norm_key.register_forward_hook(lambda _, given, made: seen.update(key=made))
    memory.norm_query.register_forward_hook(lambda _, given, made: seen.update(query=made, stream=given[0]))
    memory.register_forward_hook(lambda _, given, made: seen.update(update=made))
    with torch.no_grad():
        model(torch.tensor([list(token_ids)]))
    key, query, stream, update = (
        seen[name][0].double().reshape(len(token_ids), memory.hc_count, -1).numpy()
        for name in ("key", "query", "stream", "update")
    )
    score = (key * query).sum(axis=2) / np.sqrt(key.shape[2])
    gate = 1 / (1 + np.exp(-np.sign(score) * np.sqrt(np.maximum(np.abs(score), 1e-6))))
    return np.stack([gate, np.linalg.norm(update, axis=2), np.linalg.norm(stream, axis=2)], axis=-1)


@pytest.mark.parametrize("site", [SITE, PLAIN_SITE], ids=["all parts", "no parts"])
def test_an_engram_site_says_its_gate_and_what_it_adds_to_the_stream(workshop: Workshop, site: TinySite) -> None:
    plain = workshop.checkpoint(TinyModel())
    block, tensors = site_files(plain, site)
    expected = reference_activity(plain, text(), block, tensors)
    found = activity(engram_bundle(workshop, site), text())
    np.testing.assert_allclose(found, expected, rtol=FLOAT_TOLERANCE)


def test_an_ngram_site_says_so_of_every_stream(workshop: Workshop) -> None:
    expected = transformers_activity(workshop.family(STREAMS.original), text())
    found = activity(streams_bundle(workshop), text())
    assert found.shape == (TOKENS, 2, 3)
    np.testing.assert_allclose(found, expected, rtol=FLOAT_TOLERANCE)


BUNDLES = {"one stream": engram_bundle, "streams": streams_bundle}


@pytest.mark.parametrize("name", BUNDLES)
def test_compiled_sites_say_the_same(workshop: Workshop, name: str) -> None:
    bundle = BUNDLES[name](workshop)
    found = activity(workshop.compiled(bundle, NATIVE), text(), "tvm")
    np.testing.assert_allclose(found, activity(bundle, text()), rtol=FLOAT_TOLERANCE)


@pytest.mark.parametrize("name", BUNDLES)
def test_compiled_sites_say_the_same_bits_of_a_token_whatever_comes_with_it(workshop: Workshop, name: str) -> None:
    bundle = workshop.compiled(BUNDLES[name](workshop), NATIVE)
    whole = activity(bundle, text(), "tvm")
    assert_same_bits(activity(bundle, text(), "tvm", step=1), whole)
    assert_same_bits(activity(bundle, text(), "tvm", step=4), whole)


@pytest.mark.parametrize("executor", ["onnxruntime", "tvm"])
@pytest.mark.parametrize("name", BUNDLES)
def test_rows_of_zeros_add_nothing(workshop: Workshop, name: str, executor: str) -> None:
    bundle = workshop.compiled(BUNDLES[name](workshop), NATIVE)
    site = SiteActivity(activity(bundle, text(), executor, tables_on=False))
    assert not site.added.any()
    assert not site.contribution.any()
    assert (site.stream > 0).all()


def test_two_sites_are_told_apart(workshop: Workshop) -> None:
    sites = [TinySite(layer_id=layer, convolution=False) for layer in (0, 1)]
    bundle = workshop.bundle(workshop.checkpoint(TinyModel(), *sites))
    with open_session(bundle) as session:
        assert session.activity == {}
        session.prefill(text())
        streams = {name: site.stream for name, site in session.activity.items()}
    assert list(streams) == ["layer_0", "layer_1"]
    assert (streams["layer_0"] != streams["layer_1"]).all()


@pytest.mark.parametrize("executor", ["onnxruntime", "tvm"])
def test_values_of_a_pass_outlive_the_next_one(workshop: Workshop, executor: str) -> None:
    bundle = workshop.compiled(engram_bundle(workshop), NATIVE)
    with open_session(bundle, executor) as session:
        session.decode(text(4))
        first = values(session)
        kept = first.copy()
        session.decode(random_ids(4, seed=3))
    assert_same_bits(first, kept)


def test_a_contribution_is_the_norm_over_all_streams() -> None:
    site = SiteActivity(np.array([[[0.5, 3, 6], [0.9, 4, 8]], [[0.5, 0, 0], [0.5, 0, 0]]], dtype=np.float32))
    np.testing.assert_allclose(site.contribution, [5 / 10, 0])
    assert site.gate.tolist() == [[0.5, np.float32(0.9)], [0.5, 0.5]]
