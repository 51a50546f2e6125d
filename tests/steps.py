"""Steps of executors that tests make up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engram_runtime.executor import StepInputs


@dataclass(frozen=True, slots=True)
class FunctionStep:
    """A function as an executor's step."""

    run: Callable[[StepInputs], NDArray[np.float32]]
    activity: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __call__(self, inputs: StepInputs) -> NDArray[np.float32]:
        return self.run(inputs)
