"""Rebuild tokenizer.json from the vocabulary in a GGUF file; ids equal those of transformers reading the same file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engram_export.gguf_header import GgufHeader
from engram_runtime.errors import CheckpointError

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # how sentencepiece spells a space

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> the expressions that cut text into words, one after the other.
WORD_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (GPT2_SPLIT,),
    "gpt-2": (GPT2_SPLIT,),
    # llama.cpp cuts out each number first, as in training; transformers does not, and its ids are the reference here
    "smollm": (GPT2_SPLIT,),
    "llama-bpe": (LLAMA3_SPLIT,),
    "qwen2": (QWEN2_SPLIT,),
}
SPECIAL_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
KINDS = ("gpt2", "llama")


class VocabularyError(CheckpointError):
    """A vocabulary no tokenizer can be built from; ``gguf_tokenizer`` adds the file's name."""


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """The content of tokenizer.json and of tokenizer_config.json."""

    json: bytes
    config: dict[str, Any]


def gguf_tokenizer(header: GgufHeader) -> GgufTokenizer | None:
    """Build the tokenizer a GGUF file describes, or return None if it holds no vocabulary."""
    kind = header.get("tokenizer.ggml.model", str) or "none"
    if kind in ("none", "no_vocab"):
        return None
    if kind not in KINDS:
        raise CheckpointError(
            f"'tokenizer.ggml.model' of {header.path} is {kind!r}, supported are {', '.join(KINDS)}; "
            f"export from safetensors and tokenizer.json"
        )
    try:
        return _build(header, kind)
    except VocabularyError as err:
        raise CheckpointError(f"{header.path}: {err}") from err


def _build(header: GgufHeader, kind: str) -> GgufTokenizer:
    tokens = header.get_list("tokenizer.ggml.tokens", str) or []
    types = header.get_list("tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    specials = _special_tokens(header, tokens)
    if kind == "gpt2":
        merges = header.get_list("tokenizer.ggml.merges", str) or []
        tokenizer = byte_level_bpe(tokens, types, merges, header.require("tokenizer.ggml.pre", str))
    else:
        scores = header.get_list("tokenizer.ggml.scores", float) or []
        prefix = header.get("tokenizer.ggml.add_space_prefix", bool) is not False
        tokenizer = sentencepiece_bpe(tokens, scores, types, add_space_prefix=prefix)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials.values()])
    add_bos = header.get("tokenizer.ggml.add_bos_token", bool)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": kind == "llama" if add_bos is None else add_bos,
        "add_eos_token": header.get("tokenizer.ggml.add_eos_token", bool) or False,
        **specials,
    }
    _frame_text(tokenizer, config)
    return GgufTokenizer(tokenizer.to_str().encode(), config)


def byte_level_bpe(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str) -> Tokenizer:
    """Build a GPT-2-like tokenizer over bytes.

    Args:
        tokens: ``[V]`` spellings in the byte alphabet, in the order of their ids.
        types: ``[V]`` token types of ``tokenizer.ggml.token_type``.
        merges: pairs of spellings separated by a space, best first.
        pre: one of ``WORD_SPLITS``.
    """
    if pre not in WORD_SPLITS:
        raise VocabularyError(
            f"the pre-tokenizer is {pre!r}, supported are {', '.join(WORD_SPLITS)}; export from tokenizer.json"
        )
    vocab = _vocab(tokens, types)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_split_merges(merges, vocab)))
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in WORD_SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, tokens, types)
    return tokenizer


def sentencepiece_bpe(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *, add_space_prefix: bool = True
) -> Tokenizer:
    """Build a tokenizer with the ids of a SentencePiece BPE model.

    Args:
        tokens: ``[V]`` pieces in the order of their ids.
        scores: ``[V]`` scores, the highest is merged first.
        types: ``[V]`` token types of ``tokenizer.ggml.token_type``.
        add_space_prefix: whether text is read as if it began with a space.
    """
    vocab = _vocab(tokens, types)
    if len(scores) != len(tokens):
        raise VocabularyError(
            f"the vocabulary has {len(scores)} scores for {len(tokens)} tokens; convert the file again"
        )
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    if unknown is None and sum(kind == BYTE for kind in types) < 256:
        raise VocabularyError(
            "the vocabulary has neither an unknown token nor all 256 byte tokens; convert the file again"
        )
    merges = _merges_by_score(tokens, scores, types, vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    prefix = [normalizers.Prepend(SPACE)] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    _add_whole_tokens(tokenizer, tokens, types)
    return tokenizer


def _vocab(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    if len(types) != len(tokens):
        raise VocabularyError(f"the vocabulary has {len(types)} types for {len(tokens)} tokens; convert the file again")
    if not tokens:
        raise VocabularyError("the vocabulary is empty; convert the file again")
    vocab: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        if vocab.setdefault(token, token_id) != token_id:
            raise VocabularyError(f"tokens {vocab[token]} and {token_id} are both {token!r}; convert the file again")
    return vocab


def _split_merges(merges: Sequence[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        # checked here because tokenizers panics on some of these
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise VocabularyError(f"merge {merge!r} has a part or a result that is not a token; convert the file again")
        pairs.append((left, right))
    return pairs


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """List every split of a normal piece into two normal pieces, best first."""
    # control and byte pieces are never spelled by text; user-defined ones are found before any merge
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges = []
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                rank = (-scores[vocab[token]], vocab[token], vocab[left], vocab[right])
                merges.append((rank, left, right))
    return [(left, right) for _, left, right in sorted(merges)]


def _add_whole_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make control, unknown and user-defined tokens be found whole in text, whatever the merges say."""
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    if spaced := [token for token in plain if SPACE in token]:
        raise VocabularyError(
            f"the user-defined token {spaced[0]!r} spells spaces, which is not supported; export from tokenizer.json"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])


def _special_tokens(header: GgufHeader, tokens: Sequence[str]) -> dict[str, str]:
    """Return the spelling of each special token the file names, by its role."""
    specials = {}
    for role, name in SPECIAL_ROLES.items():
        token_id = header.get(f"tokenizer.ggml.{name}_token_id", int)
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise VocabularyError(
                f"the {name} token is {token_id}, the vocabulary has {len(tokens)} tokens; convert the file again"
            )
        specials[role] = tokens[token_id]
    return specials


def _frame_text(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Let every text begin and end with the tokens the config asks for."""
    bos = [config["bos_token"]] if config["add_bos_token"] and "bos_token" in config else []
    eos = [config["eos_token"]] if config["add_eos_token"] and "eos_token" in config else []
    for token in (*bos, *eos):
        if token.startswith("$") or ":" in token:  # the template would read these as something else
            raise VocabularyError(f"texts cannot begin or end with the token {token!r}; convert the file again")
    if bos or eos:
        ids = [(token, tokenizer.token_to_id(token)) for token in (*bos, *eos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=ids)
