"""How much longer a tokenizer can make a text: one from a stranger could double it at each of a hundred steps.

The tokenizers library ends the process where memory runs out, so such a tokenizer is refused when it is opened.
"""

import base64
import binascii
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from engram_runtime.errors import BundleError

MOST_GROWTH = 4096  # those of published models make at most some hundreds of a byte
NESTED = ("normalizers", "pretokenizers", "decoders", "processors")
TRIE_SIZE_BYTES = 4  # of a table of SentencePiece: then the trie, then the texts that replace others

Step = Mapping[str, Any]


def check_growth(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that could make one byte of a text, or of tokens, into more than `MOST_GROWTH`.

    Raises:
        BundleError: naming the parts and by how much.
    """
    encoding = [tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor]
    for name, parts in (("take", encoding), ("write", [tokenizer.decoder])):
        steps = [step for part in parts if part is not None for step in _steps(json.loads(part.__getstate__()))]
        growth = math.prod(_growth(step) for step in steps)
        if growth > MOST_GROWTH:
            raise BundleError(
                f"tokenizer.json has {len(steps)} steps to {name} a text that can make a byte into {growth:.3g}, at "
                f"most {MOST_GROWTH} are allowed; give the model's own tokenizer.json"
            )


def _steps(step: Step) -> Iterator[Step]:
    yield step
    for name in NESTED:
        for part in step.get(name, ()):
            yield from _steps(part)


def _growth(step: Step) -> float:
    return max(1.0, GROWTHS.get(step.get("type", ""), _unchanged)(step))


def _unchanged(step: Step) -> float:
    return 1


def _replace(step: Step) -> float:
    content = len(step["content"].encode())
    pattern = step["pattern"].get("String")
    return content / len(pattern.encode()) if pattern else 1 + content  # an expression may match between all bytes


def _table(step: Step) -> float:
    """Return the length of the longest text that a table of SentencePiece puts for a byte."""
    try:
        table = base64.b64decode(step.get("precompiled_charsmap") or "")
    except binascii.Error:
        return 1  # which the library has refused
    trie_bytes = int.from_bytes(table[:TRIE_SIZE_BYTES], "little")
    return max(map(len, table[TRIE_SIZE_BYTES + trie_bytes :].split(b"\0")))


def _template(step: Step) -> float:
    return len(step.get("single", ()))


GROWTHS: Mapping[str, Callable[[Step], float]] = {
    "Replace": _replace,
    "Precompiled": _table,
    "TemplateProcessing": _template,
    **dict.fromkeys(("NFKC", "NFKD"), lambda step: 11),  # of U+FDFA
    **dict.fromkeys(("NFC", "NFD"), lambda step: 3),
    **dict.fromkeys(("ByteLevel", "Lowercase", "BertNormalizer"), lambda step: 2),
    **dict.fromkeys(("Metaspace",), lambda step: 4),  # three bytes for a space, and as many before each word
}
