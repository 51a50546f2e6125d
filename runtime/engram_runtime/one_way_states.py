"""States that can't step back, and what they were at one length, from where tokens can be computed again."""

from collections.abc import Sequence

from engram_runtime.executor import State


class OneWayStates:
    """The windows and recurrent states of a sequence; of those with an entry per position there is nothing to keep."""

    def __init__(self, states: Sequence[State]) -> None:
        """Take states that hold no tokens."""
        self._states = states
        self._copies: Sequence[State] = ()  # made with the first checkpoint: most sequences never step back
        self._length = 0  # tokens that the copies hold; 0 is what zeros hold

    def save(self, length: int) -> None:
        """Copy the states, which hold ``length`` tokens, in place of the copy before."""
        if not self._states or self._length == length:
            return
        self._copies = self._copies or [state.copy() for state in self._states]
        self._length = 0  # until all is copied: it may be interrupted
        for copy, state in zip(self._copies, self._states, strict=True):
            copy[...] = state
        self._length = length

    def step_back(self, length: int) -> int:
        """Make the states hold no more than the first ``length`` tokens; returns how many they hold."""
        if not self._states:
            return length
        if self._length > length:  # of tokens that are no longer
            self._length = 0
        for index, state in enumerate(self._states):
            state[...] = self._copies[index] if self._length else 0
        return self._length
