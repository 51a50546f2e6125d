"""Forward passes over several sequences, on executors that run them at once and on those that don't."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import Batching, BatchInputs, BatchStep, Executor, State, Step, StepInputs


class JointStep:
    """The decoder bound to the states of several sequences, for any number of rows of theirs."""

    def __init__(self, executor: Executor, states: Sequence[Mapping[str, State]]) -> None:
        """Bind it, but to each sequence alone only when a row of it first runs alone."""
        self._executor = executor
        self._states = states
        self._batch = executor.bind_batch(states) if isinstance(executor, Batching) else None
        self._alone: dict[int, Step] = {}
        self._last: Step | BatchStep | None = None

    @property
    def told(self) -> Mapping[str, NDArray[np.float32]]:
        """What the last pass said of its R rows beside the logits; see `Step.told`."""
        return self._last.told if self._last else {}

    def parts(self, count: int) -> Iterator[slice]:
        """Split ``count`` rows into those of each pass."""
        start = 0
        for size in self._executor.batches(count) if isinstance(self._executor, Batching) else [1] * count:
            yield slice(start, start + size)
            start += size

    def __call__(self, inputs: BatchInputs) -> NDArray[np.float32]:
        """Run the rows of one of `parts`; see `BatchStep`."""
        if len(inputs.token_ids) > 1:
            assert self._batch is not None
            self._last = self._batch
            return self._batch(inputs)
        (sequence,), (position,) = inputs.sequences, inputs.positions.tolist()
        if sequence not in self._alone:
            self._alone[sequence] = self._executor.bind(self._states[sequence])
        alone = StepInputs(
            token_ids=inputs.token_ids,
            position=position,
            logit_rows=np.zeros(1, dtype=np.int64),
            rows=inputs.rows,
            embeddings=inputs.embeddings,
        )
        self._last = step = self._alone[sequence]
        return step(alone)
