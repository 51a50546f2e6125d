"""Text to train and to measure on: WordNet's glosses and FOLDOC's entries, split into documents and tokenised."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram_export.token_compression import compress_vocabulary
from engram_runtime.new_file import new_file
from examples.retrofit.corpora import FOLDOC, WORDNET, fetch, files_of_deb, text_of_deb

SEED = 0
END = "<end>"  # before the first document and after each
TOKENIZER_DOCUMENTS = 40_000  # what the vocabulary is learned from
VALIDATION_PART = 25  # one document in so many
HEADWORD = re.compile(r"^(?=\S)", re.MULTILINE)  # entries of a dictd file are indented below their headword
WORDNET_DATA = re.compile(r"usr/share/wordnet/data\.(noun|verb|adj|adv)")
FOLDOC_TEXT = "usr/share/dictd/foldoc.dict.dz"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokens of all documents, one after another, each ended by ``end_id``.

    Attributes:
        training: ``[N]`` int32.
        validation: ``[M]`` int32, of other documents.
        token_map: ``[V]`` int64 raw id -> compressed id: what the table's keys are hashed from.
        end_id: raw id of the end of a document.
        bytes_per_token: of the validation text in UTF-8.
    """

    training: NDArray[np.int32]
    validation: NDArray[np.int32]
    token_map: NDArray[np.int64]
    end_id: int
    bytes_per_token: float


def read_corpus(folder: Path, vocab_size: int) -> Corpus:
    """Return the corpus, which is fetched and tokenised the first time and kept in ``folder``.

    Raises:
        RequestError: a package can't be fetched.
    """
    place = folder / f"corpus-{vocab_size}.npz"
    if not place.is_file():
        parts = _make_corpus(folder, vocab_size)
        with new_file(place, replace=True) as file:
            np.savez_compressed(file, allow_pickle=False, **parts)
    with np.load(place) as parts:
        end_id, bytes_per_token = int(parts["end_id"]), float(parts["bytes_per_token"])
        return Corpus(parts["training"], parts["validation"], parts["token_map"], end_id, bytes_per_token)


def _make_corpus(folder: Path, vocab_size: int) -> dict[str, NDArray[np.generic]]:
    documents = [*wordnet_glosses(fetch(WORDNET, folder)), *foldoc_entries(fetch(FOLDOC, folder))]
    random.Random(SEED).shuffle(documents)
    held_out = len(documents) // VALIDATION_PART
    validation, training = documents[:held_out], documents[held_out:]
    tokenizer = train_tokenizer(training[:TOKENIZER_DOCUMENTS], vocab_size)
    num_bytes = sum(len(document.encode()) for document in validation)
    tokens = tokenise(tokenizer, validation)
    return {
        "training": tokenise(tokenizer, training),
        "validation": tokens,
        "token_map": compress_vocabulary(tokenizer.to_str().encode()).astype(np.int64),
        "end_id": np.array(tokenizer.token_to_id(END)),
        "bytes_per_token": np.array(num_bytes / (len(tokens) - len(validation) - 1)),
    }


def wordnet_glosses(package: Path) -> Iterator[str]:
    """Yield one document per synset, ``spelling, spelling: gloss``; format: wndb(5WN)."""
    for _, content in files_of_deb(package, lambda path: WORDNET_DATA.fullmatch(path) is not None):
        for line in content.decode("ascii").splitlines():
            if not line.startswith(" "):  # the licence
                head, _, gloss = line.partition(" | ")
                fields = head.split()
                spellings = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                yield f"{', '.join(spellings).replace('_', ' ')}: {gloss.strip()}"


def foldoc_entries(package: Path) -> Iterator[str]:
    """Yield one document per entry, the headword on its first line."""
    entries = HEADWORD.split(text_of_deb(package, FOLDOC_TEXT))
    yield from (entry.strip() for entry in entries if "\n" in entry.strip())


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE of so many entries, `END` the first of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def tokenise(tokenizer: Tokenizer, documents: Sequence[str]) -> NDArray[np.int32]:
    """Return the documents' tokens in one line, `END` before the first and after each."""
    end_id = tokenizer.token_to_id(END)
    ids = [end_id]
    for encoding in tokenizer.encode_batch(documents):
        ids.extend([*encoding.ids, end_id])
    return np.array(ids, dtype=np.int32)
