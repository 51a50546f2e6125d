"""Row D7: characters that are split between tokens, cut by limits and stop strings, or broken from the start."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from tests.faults.row import Outcome, Row
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engram_runtime.generation import Generation, GrowingText
from engram_runtime.openai_api.answer import Choice, Json
from engram_runtime.openai_api.chat_choice import ChatChoice
from engram_runtime.openai_api.completion_choice import CompletionChoice
from engram_runtime.serving.events import Finished, Token
from engram_runtime.tokenizer import TextTokenizer

# Of one to four bytes, joined, right to left, with U+FFFD itself and a byte order mark among them.
CHARACTERS = "aZ 0<>\n\té߿߀ßשﷺ日本€\ufffd\ufeff\u200d🏳🌈👩‍👩‍👧\U0010ffff\U00010000e\u0301"
BROKEN = [
    b"\x80",
    b"\xbf",
    b"\xc3",
    b"\xe2\x82",
    b"\xf0\x9f",
    b"\xf0\x9f\x8f",
    b"\xc0\xaf",
    b"\xed\xa0\x80",
    b"\xf5\xff",
]
PARTS, PART_BYTES = 3000, 6
END = 0


@dataclass(frozen=True, slots=True)
class Spelling:
    """A tokenizer, the bytes of its tokens, and what text a sequence of them is by what Python says.

    Attributes:
        by_bytes: token ids by what they spell.
    """

    tokenizer: TextTokenizer
    by_bytes: dict[bytes, int]
    decode: Callable[[Sequence[bytes]], str]

    def split(self, random: Random, text: bytes) -> list[bytes]:
        """Cut bytes into tokens, anywhere."""
        parts, at = [], 0
        while at < len(text):
            sizes = [size for size in range(1, PART_BYTES + 1) if text[at : at + size] in self.by_bytes]
            size = min(random.choice(sizes), len(text) - at)
            parts.append(text[at : at + size])
            at += size
        return parts


def byte_level() -> Spelling:
    """Return a tokenizer whose tokens are any bytes, as GPT-2's."""
    spelled = _characters_of_bytes()
    random = Random("D7 tokens")
    tokens = {bytes([byte]) for byte in range(256)}
    while len(tokens) < PARTS:
        text = "".join(random.choices(CHARACTERS, k=4)).encode() + random.choice(BROKEN)
        start = random.randrange(len(text))
        tokens.add(text[start : start + random.randint(2, PART_BYTES)])
    names = ["".join(spelled[byte] for byte in token) for token in sorted(tokens)]
    tokenizer = Tokenizer(models.BPE({name: END + 1 + index for index, name in enumerate(names)} | {"<end>": END}, []))
    tokenizer.decoder = decoders.ByteLevel()
    by_bytes = {token: END + 1 + index for index, token in enumerate(sorted(tokens))}
    return Spelling(_wrapped(tokenizer), by_bytes, lambda tokens: b"".join(tokens).decode("utf-8", "replace"))


def byte_fallback() -> Spelling:
    """Return a tokenizer of whole characters with tokens for single bytes beside them, as Llama's."""
    tokens = [*sorted({character.encode() for character in CHARACTERS if character != " "} | {b"ab", b" "})]
    names = [token.decode().replace(" ", "▁") for token in tokens]
    vocab = {f"<0x{byte:02X}>": END + 1 + byte for byte in range(256)}
    vocab |= {name: END + 257 + index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab | {"<end>": END}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    by_bytes = {bytes([byte]): END + 1 + byte for byte in range(256)}
    by_bytes |= {token: END + 257 + index for index, token in enumerate(tokens) if len(token) > 1}
    return Spelling(_wrapped(tokenizer), by_bytes, _decode_fallback)


def _decode_fallback(tokens: Sequence[bytes]) -> str:
    """Decode each run of single bytes together; one that isn't UTF-8 is as many U+FFFD."""
    text, run = "", b""
    for token in (*tokens, b""):
        if len(token) == 1:
            run += token
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        text, run = text + token.decode(), b""
    return text


def _wrapped(tokenizer: Tokenizer) -> TextTokenizer:
    return TextTokenizer(tokenizer, config={}, generation_config={"eos_token_id": END}, template_source=None)


def _characters_of_bytes() -> list[str]:
    """Return how byte-level vocabularies spell each byte, as the library itself does."""
    letters = iter(sorted(letter for letter in pre_tokenizers.ByteLevel.alphabet() if ord(letter) >= 256))
    own = set(pre_tokenizers.ByteLevel.alphabet())
    return [chr(byte) if chr(byte) in own else next(letters) for byte in range(256)]


def texts(count: int) -> Outcome:
    """Generate so many texts; a number repeats one."""
    spellings = [byte_level(), byte_fallback()]
    failures = []
    for number in range(count):
        fault = _fault(spellings[number % 2], Random(f"D7 {number}"))
        if fault is not None:
            failures.append(f"text {number}: {fault}")
    return Outcome(tried=count, survived=count - len(failures), figure="2 tokenizers", failures=tuple(failures[:10]))


def _fault(spelling: Spelling, random: Random) -> str | None:
    text = _random_bytes(random)
    tokens = spelling.split(random, text)
    limit = random.choice((len(tokens), random.randint(1, len(tokens))))
    stop = _stops(random, spelling.decode(tokens))
    wanted = _cut(spelling.decode(tokens[:limit]), stop)
    choice = _choice(spelling.tokenizer, random)
    deltas = _deltas(spelling, choice, tokens, limit, stop)
    told = json.loads(json.dumps(choice.whole()))
    whole = told["text"] if "text" in told else told["message"]["content"]
    if (joined := "".join(deltas)) == whole == wanted:
        return None
    return f"{tokens} to {limit}, stop {stop!r}: deltas {joined!r}, whole {whole!r}, wanted {wanted!r}"


def _random_bytes(random: Random) -> bytes:
    parts = [character.encode() for character in random.choices(CHARACTERS, k=random.randint(1, 12))]
    if random.random() < 0.4:
        for _ in range(random.randint(1, 3)):
            parts.insert(random.randrange(len(parts) + 1), random.choice(BROKEN))
    if random.random() < 0.3:
        parts[-1] = parts[-1][: random.randint(1, 3)]
    return b"".join(parts)


def _stops(random: Random, text: str) -> list[str]:
    """Return stop strings: parts of the text, some of them changed at their end."""
    stops = []
    for _ in range(random.choice((0, 0, 1, 1, 2, 3))):
        start = random.randrange(len(text))
        part = text[start : start + random.randint(1, 5)]
        stops.append(part if random.random() < 0.7 else part[:-1] + "q")
    return stops


def _cut(text: str, stop: Sequence[str]) -> str:
    """Cut a text before the stop string that is complete first, of two that end together the longer one."""
    found = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    return text[: min(found)[1]] if found else text


def _choice(tokenizer: TextTokenizer, random: Random) -> Choice:
    if random.random() < 0.4:
        return CompletionChoice(tokenizer, echoed="", logprobs=False, activity=False)
    return ChatChoice(tokenizer, call_id="c", calls=random.random() < 0.5, logprobs=False, activity=False)


def _deltas(spelling: Spelling, choice: Choice, tokens: Sequence[bytes], limit: int, stop: Sequence[str]) -> list[str]:
    """Have a choice told of tokens as the engine does; returns the text of each of its chunks, by way of its bytes."""
    growing = GrowingText(spelling.tokenizer, stop, limit)
    entries = choice.open()
    for token in tokens:
        token_id = spelling.by_bytes[token]
        entries += choice.push(Token(token_id=token_id, piece=growing.push(token_id)))
        if growing.finish_reason is not None:
            break
    piece = growing.finish()
    entries += choice.finish(Finished(piece=piece, generation=_generation(growing), queued_s=0.0))
    sent = [json.loads(json.dumps(entry, ensure_ascii=False).encode("utf-8")) for entry in entries]
    return [_text(entry) for entry in sent]


def _text(entry: Json) -> str:
    text: str = entry["text"] if "text" in entry else entry["delta"].get("content", "")
    return text


def _generation(growing: GrowingText) -> Generation:
    return Generation(
        text=growing.text,
        token_ids=tuple(growing.token_ids),
        finish_reason=growing.finish_reason or "context",
        prompt_tokens=1,
        prefilled_tokens=1,
        prefill_s=0.0,
        ttft_s=0.0,
        decode_s=0.0,
        tables={},
    )


ROWS = (
    Row(
        name="D7",
        fault="characters of 1 to 4 bytes split between tokens, invalid bytes, limits and stop strings within",
        expected="deltas add up to the whole text, which is what Python decodes; always UTF-8",
        quick=40_000,
        full=1_000_000,
        run=texts,
    ),
)
