"""The weights and states of a decoder as an export writes them, collected layer by layer."""

from collections.abc import Callable
from math import prod

from engram_export.quantise import ALWAYS_INT8, BLOCK, num_blocks
from engram_runtime.manifest import StateSpec
from engram_runtime.planning.outline import DENSE, EMBEDDING, EXPERTS, HEAD, ROTATIONS, Part

FLOAT, HALF = 4, 2
Bytes = tuple[int, int]  # in the graph, and packed
Format = Callable[[str, int, int], Bytes]  # of (name, outputs, inputs)


def int8_bytes(name: str, outputs: int, inputs: int) -> Bytes:
    """Return the bytes of codes and a scale of each output."""
    size = outputs * (num_blocks(name, inputs) * BLOCK + FLOAT)
    return size, size


def int4_bytes(name: str, outputs: int, inputs: int) -> Bytes:
    """Return the bytes of halves, a multiplier and half a zero of each block, packed into one, and a scale."""
    blocks = num_blocks(name, inputs)
    packed = outputs * (blocks * BLOCK // 2 + blocks + FLOAT)
    return packed + outputs * ((blocks + 1) // 2), packed


def float_bytes(name: str, outputs: int, inputs: int) -> Bytes:
    """Return the bytes of float32."""
    size = outputs * inputs * FLOAT
    return size, size


def bfloat16_bytes(name: str, outputs: int, inputs: int) -> Bytes:
    """Return the bytes of float32 weights that are packed as bfloat16, which they are exactly."""
    return outputs * inputs * FLOAT, outputs * inputs * HALF


def int4_or_int8_bytes(name: str, outputs: int, inputs: int) -> Bytes:
    """Return those of int4 but for layers that are never below int8."""
    wanted = int4_bytes if ALWAYS_INT8.isdisjoint(name.split(".")) else int8_bytes
    return wanted(name, outputs, inputs)


class Inventory:
    """Collects ``parts`` and ``states``; ``shapes`` are those of the weights that get a format."""

    def __init__(self, quant: str, context_length: int, *, bfloat16: bool) -> None:
        """Start with nothing.

        Args:
            quant: ``none``, ``int8`` or ``int4``.
            bfloat16: whether the checkpoint's weights are.
        """
        self.quant = quant
        self.context_length = context_length
        self.parts: list[Part] = []
        self.states: list[StateSpec] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._float: Format = bfloat16_bytes if bfloat16 else float_bytes
        self._linear: Format = {"none": self._float, "int8": int8_bytes, "int4": int4_or_int8_bytes}[quant]
        self._embedding: Format = self._float if quant == "none" else int8_bytes
        self._experts: Format = {"none": self._float, "int8": int8_bytes, "int4": int4_bytes}[quant]

    def embedding(self, vocab_size: int, hidden_size: int, *, tied: bool) -> None:
        """Add the embedding, and a head of its own unless it is tied."""
        role = HEAD if tied else EMBEDDING
        self._add("embedding", role, vocab_size, hidden_size, self._embedding)
        if not tied:
            self._add("lm_head", HEAD, vocab_size, hidden_size, self._linear)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        """Add a linear layer."""
        self._add(name, DENSE, outputs, inputs, self._linear)

    def float_linear(self, name: str, inputs: int, outputs: int) -> None:
        """Add a linear layer that is float32 in every format."""
        self._add(name, DENSE, outputs, inputs, self._float)

    def experts(self, name: str, inputs: int, outputs: int, count: int, top_k: int) -> None:
        """Add a linear layer of so many experts, of which a token reads ``top_k``."""
        stored, packed = self._experts(name, outputs, inputs)
        self.shapes[name] = (count, outputs, inputs)
        self.parts.append(
            Part(
                name=name,
                role=EXPERTS,
                outputs=outputs,
                inputs=inputs,
                stored_bytes=count * stored,
                packed_bytes=count * packed,
                copies=count,
                chosen=top_k,
            )
        )

    def plain(self, name: str, *shape: int) -> None:
        """Add float32 values."""
        size = prod(shape) * FLOAT
        self._part(name, DENSE, shape[0], prod(shape[1:]), (size, size))

    def rotation(self, kind: str, rotary_dim: int) -> None:
        """Add the cosines and sines of a kind of attention."""
        size = self.context_length * rotary_dim // 2 * FLOAT
        for table in ("cos", "sin"):
            self._part(f"rotations.{kind}.{table}", ROTATIONS, self.context_length, rotary_dim // 2, (size, size))

    def cache(self, name: str, heads: int, dim: int) -> None:
        """Add a state with an entry for each position."""
        self._state(name, (1, heads, self.context_length, dim), "positional")

    def window(self, name: str, *shape: int) -> None:
        """Add the last steps of a convolution."""
        self._state(name, shape, "window")

    def recurrent(self, name: str, *shape: int) -> None:
        """Add the state of a linear attention."""
        self._state(name, shape, "recurrent")

    def _add(self, name: str, role: str, outputs: int, inputs: int, encoded: Format) -> None:
        self.shapes[name] = (outputs, inputs)
        self._part(name, role, outputs, inputs, encoded(name, outputs, inputs))

    def _part(self, name: str, role: str, outputs: int, inputs: int, size: Bytes) -> None:
        stored, packed = size
        self.parts.append(
            Part(name=name, role=role, outputs=outputs, inputs=inputs, stored_bytes=stored, packed_bytes=packed)
        )

    def _state(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        self.states.append(StateSpec(name=name, dtype="float32", shape=shape, kind=kind))
