"""What the header of a GGUF file says of its size: bytes a token reads, and the types of its tensors."""

from collections import Counter
from pathlib import Path

from engram_export.gguf_header import read_gguf_header

EXPERTS, EMBEDDING, HEAD = "_exps.", "token_embd.weight", "output.weight"  # in tensors' names


def weight_bytes_of_a_token(path: Path) -> int:
    """Return the bytes of weights of a GGUF file that one token reads: not the rows of the embedding, and its experts.

    Raises:
        CheckpointError: the file is no GGUF or is damaged.
    """
    header = read_gguf_header(path)
    architecture = header.require("general.architecture", str)
    count, used = (header.get(f"{architecture}.expert_{name}", int) for name in ("count", "used_count"))
    total = 0
    for name, tensor in header.tensors.items():
        if name == EMBEDDING and HEAD in header.tensors:
            continue
        total += tensor.num_bytes * used // count if EXPERTS in name and used and count else tensor.num_bytes
    return total


def types_of_tensors(path: Path) -> str:
    """Return how many tensors of each type a GGUF file has, as ``Q4_0 x 120, F32 x 45``, the most first.

    Raises:
        CheckpointError: the file is no GGUF or is damaged.
    """
    counts = Counter(tensor.type.name for tensor in read_gguf_header(path).tensors.values())
    return ", ".join(f"{name} x {count}" for name, count in counts.most_common())
