"""The bytes that tokens stand for."""

import json
from collections.abc import Iterator

from tokenizers import Tokenizer

from engram_runtime.detokenise import BYTE_TOKEN, decoder_steps

WORD_START = "\u2581"  # SentencePiece's space


class TokenBytes:
    """Tells what each token adds to a text, were it decoded without regard to its neighbours."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder = tokenizer.decoder
        steps = [] if decoder is None else list(decoder_steps(json.loads(decoder.__getstate__())))
        kinds = {step["type"] for step in steps}
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._characters = dict(_byte_characters()) if "ByteLevel" in kinds else {}
        self._holds_byte_tokens = "ByteFallback" in kinds

    def __call__(self, token_id: int) -> bytes:
        """Return a token's bytes, none where there is no such token."""
        token = self._added.get(token_id) or self._tokenizer.id_to_token(token_id) or ""
        if self._holds_byte_tokens and BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5].replace("+", "0"), 16)])
        if token_id not in self._added and all(character in self._characters for character in token):
            return bytes(self._characters[character] for character in token)
        return token.replace(WORD_START, " ").encode()


def _byte_characters() -> Iterator[tuple[str, int]]:
    """Yield the character by which byte-level vocabularies spell each byte: itself where it can be printed."""
    others = 0
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        yield chr(byte if printable else 256 + others), byte
        others += not printable
