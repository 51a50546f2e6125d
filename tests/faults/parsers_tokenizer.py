"""A3: damaged tokenizers: tokenizer.json and what a bundle has beside it, read and then used as a server uses them."""

import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults.parsers_mutators import NUMBERS, TEXTS, damage_json
from tests.faults.parsers_survey import Parser, survey
from tests.faults.row import Outcome, Row
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engram_export.token_compression import compress_vocabulary
from engram_runtime.errors import BundleError, CheckpointError, RequestError
from engram_runtime.tokenizer import TextTokenizer

PROMPT = "aab ba\u00e9\U0001f600 <s>ab\n" + "^" * 200 + "a" * 60 + "!"
MESSAGES = [{"role": "user", "content": "ab ba"}]
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
GENERATION = {"eos_token_id": [1], "bos_token_id": 0, "temperature": 0.7, "top_k": 20}
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
SECOND = {"Sequence": {"id": "B", "type_id": 0}}
PARTS: Mapping[str, Sequence[Any]] = {
    "model": (
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
        {"type": "BPE", "vocab": {}, "merges": ["a b", "ab c"]},
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"},
        {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 0},
        {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1e308]], "unk_id": 7, "byte_fallback": True},
    ),
    "normalizer": (
        {"type": "Replace", "pattern": {"Regex": "(a*)*$"}, "content": "b"},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        {"type": "Prepend", "prepend": "a" * 1000},
        {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "StripAccents"}]},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ),
    "pre_tokenizer": (
        {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "always"},
        {"type": "FixedLength", "length": 0},
        {"type": "Digits", "individual_digits": True},
    ),
    "post_processor": (
        {"type": "TemplateProcessing", "single": [SECOND], "pair": [], "special_tokens": {}},
        {"type": "RobertaProcessing", "sep": ["a", 9], "cls": ["b", 9], "trim_offsets": True, "add_prefix_space": True},
        {"type": "BertProcessing", "sep": ["", 2**31], "cls": ["", 0]},
    ),
    "decoder": (
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "BPEDecoder", "suffix": ""},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "Strip", "content": " ", "start": 2**63, "stop": 0},
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "first"},
    ),
    "truncation": ({"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5},),
    "padding": ({"strategy": {"Fixed": 2**40}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": ""},),
    "added_tokens": tuple(
        [{"id": number, "content": text, **dict.fromkeys(FLAGS, True)}]
        for number, text in ((2**32 - 1, "a"), (0, ""), (5, "\u0301"))
    ),
}


@cache
def sound_tokenizer() -> bytes:
    """Return a byte-level tokenizer with merges and special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *letters, "ab", "ba", "aab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "a"), ("a", "ab")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    split = pre_tokenizers.Split(Regex(r"\s?\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    return tokenizer.to_str().encode()


def damaged(rng: random.Random) -> bytes:
    """Return a tokenizer with a part of another kind, or damaged values, or a damaged spelling."""
    if rng.random() < 0.5:
        return damage_json(rng, sound_tokenizer())
    document = json.loads(sound_tokenizer())
    for _ in range(rng.choice((1, 1, 2))):
        part = rng.choice(list(PARTS))
        document[part] = rng.choice(list(PARTS[part]))
    if rng.random() < 0.5:
        _change_vocabulary(rng, document)
    return damage_json(rng, json.dumps(document).encode()) if rng.random() < 0.3 else json.dumps(document).encode()


def _change_vocabulary(rng: random.Random, document: dict[str, Any]) -> None:
    model = document["model"]
    if isinstance(vocab := model.get("vocab"), dict) and vocab:
        vocab[rng.choice((*vocab, *TEXTS))] = rng.choice(NUMBERS)
    if merges := model.get("merges"):
        merges.append(rng.choice((rng.choice(merges), ["ab", "zz"], ["", ""], "a", "a b c", ["a", "b", "c"])))


def use_tokenizer(folder: Path) -> None:
    """Load a bundle's tokenizer, take a prompt and a chat, and write every token."""
    tokenizer = TextTokenizer.load(folder)
    tokenizer.encode_with_bytes(PROMPT)
    token_ids = tokenizer.encode(PROMPT)
    tokenizer.decode(token_ids)
    stream = tokenizer.stream(["stop"])
    for token_id in (*token_ids[:40], 10**6):
        stream.push(token_id)
        tokenizer.token_bytes(token_id)
    stream.finish()
    tokenizer.encode_chat(MESSAGES)


def _use_in_folder(name: str, path: Path) -> None:
    folder = path.parent / "bundle"
    if not folder.exists():
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(sound_tokenizer())
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / name).write_bytes(path.read_bytes())
    use_tokenizer(folder)


def _use_in_export(path: Path) -> None:
    compress_vocabulary(path.read_bytes())


TOKENIZER = Parser(
    name="tokenizer.json",
    damaged=damaged,
    use=lambda path: _use_in_folder("tokenizer.json", path),
    refusals=(BundleError, RequestError),
    sound=sound_tokenizer(),
)
EXPORTED = Parser(
    name="tokenizer.json at export",
    damaged=damaged,
    use=_use_in_export,
    refusals=(CheckpointError,),
    sound=sound_tokenizer(),
)


def _beside(name: str, content: Any) -> Parser:
    text = json.dumps(content).encode()
    return Parser(
        name=f"bundle's {name}",
        damaged=lambda rng: damage_json(rng, text),
        use=lambda path: _use_in_folder(name, path),
        refusals=(BundleError, RequestError),
        sound=text,
    )


BESIDE = (_beside("tokenizer_config.json", CONFIG), _beside("generation_config.json", GENERATION))


def tokenizers(count: int) -> Outcome:
    """Damage tokenizers, and a tenth as often what stands beside them and what an export reads."""
    return survey((TOKENIZER, count), *((parser, count // 10) for parser in (EXPORTED, *BESIDE)))


ROWS = (
    Row(
        name="A3 tokenizer",
        fault="tokenizer.json with damaged values or parts of other kinds; the configs beside it",
        expected="BundleError or RequestError, or prompts, chats and texts; at most 1 s and 64 MiB",
        quick=10_000,
        full=200_000,
        run=tokenizers,
    ),
)
