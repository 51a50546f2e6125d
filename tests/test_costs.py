"""Costs of passes are measured once for a library, a machine and a number of threads, and found again."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.steps import FunctionStep
from tests.toy_model import ToyModel, toy_bundle
from tests.workshop import THREADS, Workshop, copy_folder, files_of

from engram_runtime.bundle import Bundle
from engram_runtime.drafting import costs
from engram_runtime.drafting.costs import MOST_ROWS, ROUNDS, ForwardCosts, forward_costs, measure
from engram_runtime.executor import State, Step, StepInputs, load_executor
from engram_runtime.library import find_library
from engram_runtime.manifest import DECODER, Manifest


class TimedModel(ToyModel):
    """The toy model with a clock by which a pass takes ``fixed_s`` and ``row_s`` for each of its tokens."""

    def __init__(self, fixed_s: float, row_s: float) -> None:
        super().__init__(largest=8)
        self.now = 0.0
        self._fixed_s, self._row_s = fixed_s, row_s

    def bind(self, states: Mapping[str, State], graph: str = DECODER) -> Step:
        step = super().bind(states, graph)

        def timed(inputs: StepInputs) -> NDArray[np.float32]:
            self.now += self._fixed_s + self._row_s * len(inputs.token_ids)
            return step(inputs)

        return FunctionStep(timed, step.told)


def timed_costs(model: TimedModel) -> ForwardCosts:
    return measure(toy_bundle(), model, library="x", clock=lambda: model.now)


def test_costs_are_the_seconds_of_passes_and_of_those_a_number_of_tokens_is_split_into() -> None:
    found = timed_costs(TimedModel(0.01, 0.001))
    expected = [
        0.011 * rows if rows < 8 else 0.018 * (rows // 8) + 0.011 * (rows % 8) for rows in range(1, MOST_ROWS + 1)
    ]
    np.testing.assert_allclose(found.forward_s, expected, rtol=1e-9)
    assert (found.library, found.threads, found.draft_s) == ("x", 1, 0)


@pytest.mark.parametrize(("fixed_s", "rounds"), [(0.001, ROUNDS), (0.1, 2), (5.0, 1)])
def test_measuring_ends_with_the_budget(fixed_s: float, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "DEPTH", 1)
    model = TimedModel(fixed_s, 0.0)
    timed_costs(model)
    assert model.passes.count(8) == 1 + rounds  # the first one isn't counted


@pytest.mark.parametrize("context", [2, 3, 9, 17, 40])
def test_of_a_short_context_what_fits_is_measured(context: int) -> None:
    raw = json.loads(json.dumps(toy_bundle().manifest.to_dict()))
    raw["model"]["context_length"] = context
    found = measure(Bundle(Path(), Manifest.from_dict(raw)), TimedModel(1.0, 0.0), library="", clock=lambda: 0.0)
    assert len(found.forward_s) == MOST_ROWS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is measured of tiny models out of the developer's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    return Bundle.open(copy_folder(workshop.ready().path, tmp_path / "bundle"))


def stored(bundle: Bundle, threads: int = THREADS) -> Path:
    path = costs.costs_path(find_library(bundle)[1], threads)
    assert path is not None
    return path


def costs_of(bundle: Bundle, threads: int = THREADS) -> ForwardCosts:
    return forward_costs(bundle, load_executor("tvm", bundle, threads=threads))


def test_costs_are_measured_once_for_each_number_of_threads(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = costs_of(bundle), costs_of(bundle, threads=1)
    monkeypatch.setattr(costs, "measure", pytest.fail)
    assert (costs_of(bundle), costs_of(bundle, threads=1)) == (first, other)
    assert (first.threads, other.threads) == (THREADS, 1)
    assert ForwardCosts.from_dict(json.loads(stored(bundle).read_text())) == first
    assert min(first.forward_s) > 0
    assert Bundle.open(bundle.path).manifest == bundle.manifest


@pytest.mark.parametrize("change", [{"library": "other"}, {"machine": "other"}, {"threads": 7}])
def test_costs_of_something_else_are_measured_anew(bundle: Bundle, change: dict[str, object]) -> None:
    found = costs_of(bundle)
    stored(bundle).write_text(json.dumps({**found.to_dict(), "draft_s": 77.0, **change}))
    assert costs_of(bundle).draft_s != 77.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', "\0"])
def test_a_damaged_file_is_replaced(bundle: Bundle, text: str) -> None:
    stored(bundle).parent.mkdir(parents=True)
    stored(bundle).write_text(text)
    found = costs_of(bundle)
    assert ForwardCosts.from_dict(json.loads(stored(bundle).read_text())) == found


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"forward_s": [1.0]},
        {"forward_s": [-1.0] * MOST_ROWS},
        {"forward_s": [0.0] * MOST_ROWS},
        {"draft_s": -1.0},
        {"more": 1},
    ],
)
def test_a_file_that_cant_be_is_no_costs(bundle: Bundle, tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({**costs_of(bundle).to_dict(), **change}))
    assert costs.read_costs(path) is None


def test_measuring_writes_nothing_into_the_bundle(bundle: Bundle) -> None:
    before = files_of(bundle.path)
    costs_of(bundle)
    assert files_of(bundle.path) == before


def test_a_user_without_a_home_has_costs_measured_each_time(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert min(costs_of(bundle).forward_s) > 0


def no_home() -> Path:
    raise RuntimeError("no home")


def test_costs_that_cant_be_written_are_kept_in_memory(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(costs, "new_file", refuse)
    assert min(costs_of(bundle).forward_s) > 0
    assert not stored(bundle).exists()


def test_an_executor_without_a_library_is_measured_each_time(bundle: Bundle) -> None:
    found = forward_costs(bundle, load_executor("onnxruntime", bundle, threads=1))
    assert (found.library, len(found.forward_s)) == ("", MOST_ROWS)
    assert not stored(bundle, 1).exists()
