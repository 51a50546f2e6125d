"""Texts whose continuations are drafted: random tokens would never come again, nor could a head foresee them."""

_CODE = '''\
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Numbers from ``start`` up to ``stop``, which is none of them."""

    start: float
    stop: float

    def __contains__(self, number: float) -> bool:
        return self.start <= number < self.stop

    def overlaps(self, other: "Interval") -> bool:
        return self.start < other.stop and other.start < self.stop
'''
PROMPTS = {
    "prose": (
        "The harbour lies in the mouth of the river, where the tide comes in twice a day and carries the boats up to "
        "the town. In the morning, before the fog has lifted, the fishermen bring their baskets to the market, and the "
        "children run down to the water to see what the night has left on the sand. That day"
    ),
    "code": f"```python\n{_CODE}\n    def length(self) -> float:\n",
    "copy": f"A file:\n```python\n{_CODE}```\n\nThe same file once more:\n```python\n{_CODE[:90]}",
}
