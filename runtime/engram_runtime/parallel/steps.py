"""Steps over several sequences, on executors that run them at once and on those that don't."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import Batching, BatchInputs, BatchStep, Executor, State, Step, StepInputs


def bind_sequences(executor: Executor, states: Sequence[Mapping[str, State]]) -> list[tuple[BatchStep, slice]]:
    """Bind the decoder to the states of several sequences; returns steps and which of the sequences each runs."""
    sizes = executor.batches(len(states)) if isinstance(executor, Batching) else [1] * len(states)
    steps: list[tuple[BatchStep, slice]] = []
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        steps.append((_bind(executor, states[part]), part))
        start += size
    return steps


def _bind(executor: Executor, states: Sequence[Mapping[str, State]]) -> BatchStep:
    if len(states) > 1:
        assert isinstance(executor, Batching)
        return executor.bind_batch(states)
    return _AloneStep(executor.bind(states[0]))


class _AloneStep:
    """A step of one sequence as a batch."""

    def __init__(self, step: Step) -> None:
        self._step = step

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        return self._step.told

    def __call__(self, inputs: BatchInputs) -> NDArray[np.float32]:
        (position,) = inputs.positions.tolist()
        alone = StepInputs(
            token_ids=inputs.token_ids,
            position=position,
            logit_rows=np.zeros(1, dtype=np.int64),
            rows=inputs.rows,
            embeddings=inputs.embeddings,
        )
        return self._step(alone)
