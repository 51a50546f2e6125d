"""Dictionary entries from WordNet: nouns in ordinary use with the definition of their most frequent sense.

Entries are chosen by rules that can be read here and a fixed seed, not by looking at what a model recalls.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.retrofit.corpora import files_of_deb
from examples.retrofit.facts import Fact

SEED = 20_061_206  # the day WordNet 3.0 came out
NUM_ENTRIES, NUM_UNTRAINED = 2_400, 1_600
FOLDER = "usr/share/wordnet/"
MIN_WORDS, MAX_WORDS = 3, 16
MAX_SENSES = 2  # of words with more, the first sense is rarely what a reader has in mind
CONTEXT_WORDS = 4  # about what n-grams of order 5 see: words here are 1.3 tokens
TERM = re.compile(r"[a-z]{3,}(_[a-z]+){0,2}")
GLOSS = re.compile(r"[a-z][A-Za-z ,'-]*[a-z]")
UNSUITABLE = re.compile(r"slur|offensive|disparag|obscen|vulgar|derogat|sexual|prostitut|genital|reproductive|Negro")
NO_DEFINITION = re.compile(r"(any|one|either|some) of |distinguished |used |as |in |of |for |when |from ")
CUT_OFF = re.compile(r" (of|in|to|the|a|an|or|and|for|with|by|as|on|that|which|is|etc)$")


@dataclass(frozen=True, slots=True)
class Noun:
    """A line of ``index.noun``: how many senses a term has, how many are in the tagged texts, where the first is."""

    term: str
    senses: int
    tagged_senses: int
    synset: str


def dictionary(package: Path) -> tuple[list[Fact], list[Fact]]:
    """Choose entries from Debian's package of WordNet; returns those to train and as many others as controls."""
    folder = read_folder(package)
    facts = list({fact.statement: fact for fact in candidates(folder)}.values())  # of synonyms one
    random.Random(SEED).shuffle(facts)
    chosen = without_ambiguity(facts)
    return chosen[:NUM_ENTRIES], chosen[NUM_ENTRIES : NUM_ENTRIES + NUM_UNTRAINED]


def other_terms(package: Path, number: int) -> list[str]:
    """Return nouns that `dictionary` can't choose: what a model is asked for that must not answer like an entry."""
    terms = [noun.term for noun in nouns(read_folder(package)["index.noun"]) if noun.tagged_senses == 0]
    return random.Random(SEED).sample([term.replace("_", " ") for term in terms if TERM.fullmatch(term)], number)


def other_definitions(package: Path) -> str:
    """Return all definitions of nouns that `dictionary` can't choose, as lines of a plain dictionary."""
    folder = read_folder(package)
    synsets = dict(_synsets(folder["data.noun"]))
    others = [noun for noun in nouns(folder["index.noun"]) if noun.tagged_senses == 0]
    random.Random(SEED).shuffle(others)
    return "\n".join(f"{noun.term.replace('_', ' ')}: {gloss(synsets[noun.synset][1])}." for noun in others)


def read_folder(package: Path) -> dict[str, str]:
    """Return the files of WordNet's folder by name."""
    files = files_of_deb(package, lambda path: path.startswith(FOLDER))
    return {path.removeprefix(FOLDER): content.decode("ascii") for path, content in files}


def candidates(folder: Mapping[str, str]) -> Iterator[Fact]:
    """Yield all entries that read as a dictionary's, in the order of ``index.noun``."""
    synsets = dict(_synsets(folder["data.noun"]))
    others = [_tagged(folder[name]) for name in ("index.verb", "index.adj")]
    for noun in nouns(folder["index.noun"]):
        spellings, explained = synsets[noun.synset]
        common = all(tagged.get(noun.term, 0) <= noun.tagged_senses for tagged in others)
        if not (common and noun.tagged_senses > 0 and noun.senses <= MAX_SENSES and TERM.fullmatch(noun.term)):
            continue
        subject, statement = noun.term.replace("_", " "), gloss(explained)
        if noun.term in spellings and not UNSUITABLE.search(subject + explained) and defines(subject, statement):
            yield Fact(subject, statement)


def gloss(explained: str) -> str:
    """Return the definition without remarks in brackets, further definitions and examples.

    >>> gloss('a stem (of a plant) , thin; a stalk; "a long stem"')
    'a stem, thin'
    """
    definition = re.split(r'[;:"]', re.sub(r"\([^()]*\)", " ", explained))[0]
    return re.sub(r"\s+", " ", definition).replace(" ,", ",").strip(" .,")


def defines(subject: str, statement: str) -> bool:
    """Whether a gloss is whole, of a length to learn, and says more than the words of its subject."""
    if not MIN_WORDS <= len(statement.split()) <= MAX_WORDS or not GLOSS.fullmatch(statement):
        return False
    stems = (word[: max(4, len(word) - 4)] for word in subject.split() if len(word) > 3)
    repeats = any(stem in statement.lower() for stem in stems)
    return not (repeats or NO_DEFINITION.match(statement) or CUT_OFF.search(statement))


def without_ambiguity(facts: Iterable[Fact]) -> list[Fact]:
    """Leave out facts in which words that a fact before them has are followed by something else.

    n-grams of few tokens can't tell such places apart. Subjects are part of the words, so most are left in.
    """
    followed: dict[tuple[str, ...], str] = {}
    kept = []
    for fact in facts:
        words = [*("",) * CONTEXT_WORDS, *f"{fact.subject}: {fact.statement}.".lower().split(), "<end>"]
        starts = range(len(fact.subject.split()), len(words) - CONTEXT_WORDS)
        places = {tuple(words[start : start + CONTEXT_WORDS]): words[start + CONTEXT_WORDS] for start in starts}
        if all(followed.get(context, word) == word for context, word in places.items()):
            followed |= places
            kept.append(fact)
    return kept


def nouns(index: str) -> Iterator[Noun]:
    """Yield the lines of an index file; format: wndb(5WN)."""
    for line in index.splitlines():
        if not line.startswith(" "):  # the licence
            fields = line.split()
            senses = int(fields[2])
            yield Noun(fields[0], senses, int(fields[-senses - 1]), fields[-senses])


def _tagged(index: str) -> dict[str, int]:
    return {noun.term: noun.tagged_senses for noun in nouns(index)}


def _synsets(data: str) -> Iterator[tuple[str, tuple[list[str], str]]]:
    """Yield the offset, the spellings and the gloss of each synset of a data file, named entities left out."""
    for line in data.splitlines():
        if not line.startswith(" "):
            head, _, explained = line.partition(" | ")
            fields = head.split()
            spellings = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield fields[0], ([] if "@i" in fields else spellings, explained)
