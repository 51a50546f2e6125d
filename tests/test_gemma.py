"""Gemma 3n and Gemma 4 compute what transformers does, as a module, as a graph and compiled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.tiny_gemma import CONFIGS, CONTEXT, VOCAB, save_gemma
from transformers import AutoModelForCausalLM

from engram_export.checkpoint import Checkpoint, open_checkpoint
from engram_export.decoder import Decoder
from engram_export.families import read_architecture
from engram_export.families.gemma import GemmaArchitecture
from engram_export.formats import FLOAT
from engram_export.weight_map import WeightSource

FLOAT_TOLERANCE = 1e-4
GRAPH_TOLERANCE = 1e-3


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gemma")
    return {name: save_gemma(root / name, name) for name in CONFIGS}


def architecture_of(checkpoint: Checkpoint) -> GemmaArchitecture:
    architecture = read_architecture(checkpoint)
    assert isinstance(architecture, GemmaArchitecture)
    return architecture


def loaded_module(checkpoint: Checkpoint) -> Decoder:
    """Build the float module and fill it from the checkpoint."""
    architecture = architecture_of(checkpoint)
    module = architecture.build(CONTEXT, FLOAT, ())
    computed = module.computed()
    parameters = dict(module.named_parameters())
    wanted = {name: tuple(values.shape) for name, values in parameters.items() if name not in computed}
    weights = WeightSource(checkpoint.tensors, wanted, architecture.name_map(), ignored=architecture.ignored)
    for name, parameter in parameters.items():
        values = computed[name] if name in computed else weights.read(name)
        parameter.data = torch.from_numpy(values)
    return module


def table_rows(checkpoint: Checkpoint, token_ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
    """Return the rows ``[T, 1, d]`` of every table; ids a table doesn't know read row 0."""
    return [
        checkpoint.tensors.read(table.tensor)[np.where(token_ids < table.num_rows, token_ids, 0)][:, None]
        for table in architecture_of(checkpoint).tables()
    ]


def module_logits(checkpoint: Checkpoint, token_ids: NDArray[np.int64], *, step: int) -> NDArray[np.float32]:
    """Run our module over a text, ``step`` tokens at a time."""
    module = loaded_module(checkpoint)
    states = [torch.zeros(spec.shape) for spec in module.state_specs()]
    found = []
    for start in range(0, len(token_ids), step):
        part = token_ids[start : start + step]
        rows = [torch.from_numpy(values) for values in table_rows(checkpoint, part)]
        with torch.no_grad():
            logits, *states = module(
                torch.from_numpy(part), torch.tensor([start]), torch.arange(len(part)), rows, states
            )
        found.append(logits.numpy())
    return np.concatenate(found)


def expected_logits(path: Path, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(token_ids)[None]).logits[0].numpy()
    return logits


def random_ids(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(count).integers(0, VOCAB, size=count)


@pytest.mark.parametrize("length", [1, 7, 64, 300])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_pass_gives_transformers_logits(checkpoints: dict[str, Path], name: str, length: int) -> None:
    token_ids = random_ids(length)
    found = module_logits(open_checkpoint(checkpoints[name]), token_ids, step=length)
    np.testing.assert_allclose(found, expected_logits(checkpoints[name], token_ids), atol=FLOAT_TOLERANCE)
