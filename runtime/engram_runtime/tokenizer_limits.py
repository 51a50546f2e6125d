"""What a tokenizer.json of a stranger may ask for: how much longer it makes a text, and how long its expressions are.

The tokenizers library ends the process where memory runs out, and a text that is doubled at each of a hundred steps
takes all there is.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from engram_runtime.errors import BundleError

MOST_GROWTH = 1024  # those of published models make at most some hundreds of a byte
MOST_GROWN_CHARS = 64 << 20  # of a prompt when it has grown as much as it can
MOST_EXPRESSION_BYTES = 64 << 10  # all together: published ones have 500, and compiling takes 500 times their memory
NESTED = ("normalizers", "pretokenizers", "decoders", "processors")
TRIE_SIZE_BYTES = 4  # of a table of SentencePiece: then the trie, then the texts that replace others
_KEY = "".join(rf"(?:{letter}|\\u{ord(letter):04x})" for letter in "Regex")  # however JSON spells it
EXPRESSION = re.compile(rf'"{_KEY}"\s*:\s*"((?:[^"\\]|\\.)*)', re.DOTALL)

Step = Mapping[str, Any]


def check_expressions(tokenizer_json: str) -> None:
    """Refuse a tokenizer, before it is compiled, whose regular expressions are too long; raises BundleError."""
    size = sum(len(found[1].encode("utf-8", "surrogatepass")) for found in EXPRESSION.finditer(tokenizer_json))
    if size > MOST_EXPRESSION_BYTES:
        raise BundleError(
            f"tokenizer.json has regular expressions of {size} bytes, at most {MOST_EXPRESSION_BYTES} are allowed; "
            f"give the model's own tokenizer.json"
        )


def text_growth(tokenizer: Tokenizer) -> float:
    """Return how many bytes a tokenizer could make of one of a text.

    Raises:
        BundleError: more than `MOST_GROWTH`, or it could write so many for one of a token.
    """
    taking = [tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor]
    growths = []
    for name, parts in (("take", taking), ("write", [tokenizer.decoder])):
        steps = [step for part in parts if part is not None for step in _steps(json.loads(part.__getstate__()))]
        growths.append(math.prod(_growth(step) for step in steps))
        if growths[-1] > MOST_GROWTH:
            raise BundleError(
                f"tokenizer.json has {len(steps)} steps to {name} a text that can make a byte into {growths[-1]:.3g}, "
                f"at most {MOST_GROWTH} are allowed; give the model's own tokenizer.json"
            )
    return growths[0]


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
