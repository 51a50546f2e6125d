"""How much memory an export takes: what bounds it, and what it comes to for a model of given sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from engram_export import weight_map
from engram_runtime.manifest import StateSpec

VERIFY_TOKENS = 256
LOGITS_BYTES = 64 << 20  # of float32 logits in an array; comparing takes about six of them
WINDOW = 256  # tokens of a window of calibration, or the context of the model if that is shorter
MAX_WINDOWS = 20

# Of the peak, as measured by benchmarks/export_memory.py.
TRACING_BYTES, LAYER_BYTES = 120 << 20, 5 << 19  # what tracing takes, and the graph of a layer
SLICE_COPIES, EXPERT_COPIES = 4, 2.5  # of a float32 slice while it is quantised, less of a larger expert
LOGITS_COPIES = 6  # while they are compared
FLOAT_COPIES, PRODUCT_COPIES = 5, 4  # of a layer, and of the products of one linear layer's inputs, by calibration
TOKENIZER_COPIES = 10  # of tokenizer.json, once it is parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSizes:
    """What the memory of an export goes by.

    Attributes:
        shapes: of the weights that get a format: linear layers, embeddings and experts.
        states: with ``context_length`` positions.
        tokenizer_bytes: of tokenizer.json.
    """

    shapes: Sequence[tuple[int, ...]]
    states: Sequence[StateSpec]
    vocab_size: int
    hidden_size: int
    num_layers: int
    context_length: int
    tokenizer_bytes: int


def compared_rows(vocab_size: int, tokens: int) -> int:
    """Return how many of a text's last positions have their logits compared: all unless the vocabulary is large."""
    return min(tokens, max(1, LOGITS_BYTES // (4 * vocab_size)))


def peak_memory(sizes: ExportSizes) -> int:
    """Predict the bytes of anonymous memory an export takes at most, above the interpreter and its imports."""
    slices = [min(prod(shape), max(weight_map.SLICE_BYTES // 4, prod(shape[1:]))) * 4 for shape in sizes.shapes]
    tokens = min(VERIFY_TOKENS, sizes.context_length)
    logits = compared_rows(sizes.vocab_size, tokens) * sizes.vocab_size * 4
    used = [tokens / state.shape[-2] if state.rolls_back else 1 for state in sizes.states]
    states = sum(prod(state.shape) * 4 * share for state, share in zip(sizes.states, used, strict=True))
    scales = max(prod(shape) for shape in sizes.shapes) // 32 * 4  # onnxruntime decodes them a layer at a time
    verifying = LOGITS_COPIES * logits + 2 * states + 3 * scales + 2 * max(slices)
    encoding = max(SLICE_COPIES * min(max(slices), weight_map.SLICE_BYTES), EXPERT_COPIES * max(slices))
    always = TRACING_BYTES + LAYER_BYTES * sizes.num_layers + TOKENIZER_COPIES * sizes.tokenizer_bytes
    return always + int(max(encoding, verifying))


def calibration_memory(sizes: ExportSizes, layer: Sequence[tuple[int, ...]]) -> int:
    """Predict the same of calibrating int4: one layer's weights, the products of its inputs and the streams.

    Args:
        layer: shapes of the first layer's int4 weights.
    """
    products = [inputs * inputs * 8 for _, inputs in layer]
    tokens = WINDOW * MAX_WINDOWS * (1 + len(layer))  # every format of every role has a stream of the held-out windows
    logits = compared_rows(sizes.vocab_size, WINDOW) * sizes.vocab_size * 4
    matrices = FLOAT_COPIES * sum(map(prod, layer)) * 4 + 2 * sum(products) + PRODUCT_COPIES * max(products)
    return TRACING_BYTES + matrices + tokens * sizes.hidden_size * 4 + LOGITS_COPIES * logits
