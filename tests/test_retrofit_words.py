"""Texts of the retrofit example: packages read in Python, entries of a dictionary, a manual, and figures of recall."""

import gzip
import hashlib
import io
import math
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram_runtime.activity import Activity, SiteActivity
from engram_runtime.errors import RequestError
from examples.retrofit import corpora, wordnet
from examples.retrofit.answers import in_form_of_an_entry, questions, unchanged
from examples.retrofit.conditions import shuffled
from examples.retrofit.corpora import Package, fetch, files_of_deb, text_of_deb
from examples.retrofit.facts import HELD_OUT_QUESTIONS, TRAINED_QUESTIONS, Fact, checked_facts
from examples.retrofit.intervals import perplexity_ratio
from examples.retrofit.manual_text import facts_of
from examples.retrofit.recall import Question, Share, answers_exactly, sample
from examples.retrofit.text_perplexity import PASSAGE_TOKENS, Losses, Passage, losses, passages
from examples.retrofit.words_command import MANUAL, PACKAGES

ENTRY = "usr/share/dictd/tale.dict.dz"
TALE = "NOSE, n.  The extreme outpost of the face.\n"
Chooser = Callable[[Sequence[int]], int]


def ar_member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def deb(files: dict[str, bytes], kind: str = "xz") -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=f"w:{kind}") as tar:  # type: ignore[call-overload]
        for path, content in files.items():
            member = tarfile.TarInfo(f"./{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    members = (
        ar_member("debian-binary", b"2.0\n"),
        ar_member("control.tar.xz", b"odd"),
        ar_member(f"data.tar.{kind}", archive.getvalue()),
    )
    return b"!<arch>\n" + b"".join(members)


def package(content: bytes) -> Package:
    return Package("t/tale/tale_1_all.deb", len(content), hashlib.sha256(content).hexdigest(), "public domain")


@pytest.fixture
def tale(tmp_path: Path) -> Path:
    path = tmp_path / "tale_1_all.deb"
    path.write_bytes(deb({ENTRY: gzip.compress(TALE.encode()), "usr/share/doc/tale/copyright": b"none"}))
    return path


@pytest.mark.parametrize("kind", ["xz", "gz"])
def test_files_of_a_package_are_those_packed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(deb({"usr/a": b"one", "usr/b": b"two"}, kind))
    assert list(files_of_deb(path, lambda name: name == "usr/b")) == [("usr/b", b"two")]


def test_the_text_of_a_package_is_unpacked(tale: Path) -> None:
    assert text_of_deb(tale, ENTRY) == TALE


def test_a_package_without_the_file_is_refused(tale: Path) -> None:
    with pytest.raises(RequestError) as caught:
        text_of_deb(tale, "usr/share/other")
    assert str(caught.value) == f"{tale} has no file usr/share/other; it is another package than this was written for"


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(RequestError) as caught:
        list(files_of_deb(path, lambda name: True))
    assert (
        str(caught.value)
        == f"{path} begins with {b'PK' + bytes([3, 4]) + b' a z'!r}, expected b'!<arch>\\n'; it is not a Debian package"
    )


def test_an_archive_without_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.deb"
    path.write_bytes(b"!<arch>\n" + ar_member("debian-binary", b"2.0\n"))
    with pytest.raises(RequestError) as caught:
        list(files_of_deb(path, lambda name: True))
    assert str(caught.value) == f"{path} holds no data.tar; it is not a Debian package"


def test_a_file_of_another_hash_is_refused(tale: Path, tmp_path: Path) -> None:
    expected = package(b"another")
    found = hashlib.sha256(tale.read_bytes()).hexdigest()
    with pytest.raises(RequestError) as caught:
        fetch(expected, tmp_path)
    assert str(caught.value) == f"{tale} has sha256 {found}, expected {expected.sha256}; remove it and fetch it again"


def test_what_was_fetched_stays(tale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = {f"{corpora.MIRROR}/t/tale/tale_1_all.deb": tale.read_bytes()}
    monkeypatch.setattr(corpora, "download", lambda url, _place, max_bytes: served.pop(url))
    asked = package(tale.read_bytes())
    first = fetch(asked, tmp_path / "cache")
    assert fetch(asked, tmp_path / "cache") == first  # `served` is empty by now
    assert first.read_bytes() == tale.read_bytes()


def test_all_packages_are_fetched_with_the_words() -> None:
    assert set(PACKAGES) == {each for each in vars(corpora).values() if isinstance(each, Package)}


def test_a_download_beyond_its_size_is_refused(tale: Path) -> None:
    with pytest.raises(RequestError) as caught:
        corpora.download(tale.as_uri(), tale, max_bytes=100)
    assert str(caught.value) == f"{tale.as_uri()} is larger than 100 bytes; it is not the file this was written for"


def test_what_cannot_be_fetched_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "MIRROR", tmp_path.as_uri())
    with pytest.raises(RequestError) as caught:
        fetch(package(b"none"), tmp_path / "corpora")
    message = str(caught.value)
    assert message.startswith(f"can't fetch {tmp_path.as_uri()}/t/tale/tale_1_all.deb: ")
    assert message.endswith(f"; fetch it by hand and put it at {tmp_path / 'corpora' / 'tale_1_all.deb'}")


@pytest.mark.parametrize(
    ("explained", "expected"),
    [
        ('a stem (of a plant) , thin; a stalk; "a long stem"', "a stem, thin"),
        ("(computing) a unit of storage", "a unit of storage"),
        ('the trait of caring: "he was careful"', "the trait of caring"),
        ("water in which dishes are washed", "water in which dishes are washed"),
    ],
)
def test_a_gloss_is_cut_to_its_definition(explained: str, expected: str) -> None:
    assert wordnet.gloss(explained) == expected


@pytest.mark.parametrize(
    ("subject", "statement", "expected"),
    [
        ("weir", "a low dam built across a stream", True),
        ("weir", "a dam", False),
        ("punishment", "the act of punishing someone", False),
        ("gas gun", "a weapon that fires shells", True),
        ("poodle", "any of several breeds", False),
        ("blush", "sudden reddening of the", False),
        ("euro", "the unit of 19 countries", False),
    ],
)
def test_an_entry_is_whole_and_says_more_than_its_subject(subject: str, statement: str, expected: bool) -> None:
    assert wordnet.defines(subject, statement) is expected


def test_facts_that_a_few_words_cannot_tell_apart_are_left_out() -> None:
    first = Fact("ridge", "a long narrow raised strip of land")
    other = Fact("bank", "a long narrow raised strip of earth")
    assert wordnet.without_ambiguity([first, other, first]) == [first, first]


def test_nouns_are_read_from_an_index() -> None:
    index = "  1 a licence\nweir n 2 3 @ ~ + 2 1 04571958 04572080  \n"
    assert list(wordnet.nouns(index)) == [wordnet.Noun("weir", 2, 1, "04571958")]


def test_the_manual_has_facts_that_few_tokens_tell_apart() -> None:
    facts = facts_of(MANUAL)
    ends = Counter(tuple(fact.subject.lower().split()[-2:]) for fact in facts)
    assert len(facts) >= 220
    assert max(ends.values()) == 1
    assert all(4 <= len(fact.statement.split()) <= 18 for fact in facts)
    assert len(wordnet.without_ambiguity(facts)) >= len(facts) - 20


def test_codes_of_the_manual_differ_in_their_last_two_digits() -> None:
    codes = [found for fact in facts_of(MANUAL) if (found := re.search(r"[A-Z]-?\d(\d\d)$", fact.subject))]
    assert len(codes) == 59
    assert max(Counter((code[0][0], code[1]) for code in codes).values()) == 1


def test_every_list_line_of_the_manual_is_a_fact() -> None:
    lines = sum(line.startswith("- ") for path in MANUAL.glob("*.md") for line in path.read_text().splitlines())
    assert lines == len(facts_of(MANUAL))


def test_questions_held_out_are_not_trained() -> None:
    assert not set(TRAINED_QUESTIONS) & set(HELD_OUT_QUESTIONS)
    assert all(wording.count("{subject}") == 1 for wording in (*TRAINED_QUESTIONS, *HELD_OUT_QUESTIONS))
    assert (len(questions("ordinary")), len(questions("in_passing"))) == (20, 10)


def test_a_ratio_that_all_passages_share_has_no_width() -> None:
    tokens = np.array([10, 20, 30])
    off = np.array([30.0, 50.0, 90.0])
    ratio, low, high = perplexity_ratio(off + 0.01 * tokens, off, tokens)
    assert (ratio, low, high) == pytest.approx((math.exp(0.01),) * 3)


def test_the_interval_of_a_ratio_is_about_that_of_the_normal_distribution() -> None:
    rng = np.random.default_rng(3)
    tokens = np.full(400, 100)
    differences = rng.normal(0.02, 0.1, size=400)
    _, low, high = perplexity_ratio(tokens * differences, np.zeros(400), tokens)
    error = differences.std() / math.sqrt(400)
    expected = [math.exp(differences.mean() + sign * 1.96 * error) for sign in (-1, 1)]
    assert [low, high] == pytest.approx(expected, abs=0.001)


class FakeSession:
    """A session whose next token is chosen by a function of all tokens so far."""

    def __init__(self, choose: Chooser, vocab_size: int = 50) -> None:
        self._choose, self._vocab_size = choose, vocab_size
        self.token_ids: list[int] = []
        self.decoded = self._added = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def trim(self, count: int) -> None:
        self.token_ids = self.token_ids[: len(self) - count]

    def prefill(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        last: NDArray[np.float32] = self._add(token_ids)[-1]
        return last

    def decode(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self.decoded += len(token_ids)
        return self._add(token_ids)

    def logits(self, token_ids: Sequence[int]) -> list[NDArray[np.float32]]:
        return [self._add(token_ids)]

    @property
    def activity(self) -> Activity:
        added = np.arange(self._added, dtype=np.float32)
        return {"only": SiteActivity(np.stack([added, added, np.full_like(added, 2)], axis=1)[:, None])}

    def _add(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        self._added = len(token_ids)
        logits = np.zeros((len(token_ids), self._vocab_size), dtype=np.float32)
        for row, token_id in zip(logits, token_ids, strict=True):
            self.token_ids.append(token_id)
            row[self._choose(self.token_ids)] = 5
        return logits


QUESTION = Question(prompt_ids=(1, 2, 3), answer_ids=(4, 5, 6), stated_from=1)


def test_an_answer_is_exact_if_every_token_is() -> None:
    session = FakeSession(lambda token_ids: token_ids[-1] + 1)
    assert answers_exactly(session, QUESTION)  # type: ignore[arg-type]
    assert session.decoded == 2  # the last token needs no pass


@pytest.mark.parametrize(("wrong", "decoded"), [(4, 0), (5, 1), (6, 2)])
def test_an_answer_with_one_wrong_token_is_not_exact_and_is_not_read_to_its_end(wrong: int, decoded: int) -> None:
    session = FakeSession(lambda token_ids: 0 if token_ids[-1] + 1 == wrong else token_ids[-1] + 1)
    assert not answers_exactly(session, QUESTION)  # type: ignore[arg-type]
    assert session.decoded == decoded


def test_losses_count_from_where_a_passage_is_scored() -> None:
    session = FakeSession(lambda token_ids: token_ids[-1] + 1)
    found = losses(session, [Passage((1, 2, 3, 9), 1), Passage((1, 2, 3, 9), 3)])  # type: ignore[arg-type]
    right = math.log(math.exp(5) + 49) - 5
    assert found.sums == pytest.approx([2 * right + right + 5, right + 5])
    assert found.tokens.tolist() == [3, 1]
    assert found.added.tolist() == [0, 0.5, 1, 1]  # half of where in the passage the token is


def test_losses_are_set_against_those_without_rows() -> None:
    tokens = np.array([10, 10])
    added = np.array([0.25, 0.25, 0.25], dtype=np.float32)
    on, off = Losses(np.array([11.0, 11.0]), tokens, added), Losses(np.array([10.0, 10.0]), tokens, added)
    assert on.against(off) == pytest.approx(
        {
            "perplexity": math.exp(1.1),
            "off": math.e,
            "ratio": math.exp(0.1),
            "low": math.exp(0.1),
            "high": math.exp(0.1),
            "tokens": 20,
            "added_p50": 0.25,
            "added_p95": 0.25,
        }
    )


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]


def test_passages_begin_with_paragraphs_and_are_drawn_alike() -> None:
    text = "\n\n".join(["heading", *(chr(ord("a") + index) * 300 for index in range(9))])
    found = passages(Letters(), text, tokens=3 * PASSAGE_TOKENS)  # type: ignore[arg-type]
    assert [len(set(each.token_ids)) for each in found] == [1, 1, 1]
    assert [each.token_ids for each in passages(Letters(), text, tokens=700)] == [each.token_ids for each in found]  # type: ignore[arg-type]


@given(st.integers(0, 40), st.integers(0, 60))
def test_a_sample_has_each_fact_once_and_is_the_same_again(available: int, number: int) -> None:
    facts = [Fact(f"thing {index}", "a statement of some words") for index in range(available)]
    drawn = sample(facts, number)
    assert len(set(drawn)) == len(drawn) == min(available - len(checked_facts(facts)), number)
    assert not set(drawn) & set(checked_facts(facts))
    assert sample(facts, number) == drawn


def test_shuffled_rows_are_the_same_rows_in_other_places_and_zeros_stay() -> None:
    rows = np.arange(60, dtype=np.float32).reshape(30, 2)
    rows[::3] = 0
    moved = shuffled(rows)
    assert not moved[::3].any()
    assert sorted(map(tuple, moved)) == sorted(map(tuple, rows))
    assert (moved != rows).any()


def test_answers_are_counted_that_are_the_same_or_begin_like_an_entry() -> None:
    known = {"off": "A dam.", "dictionary": "Entry for weir: a dam."}
    rows = [{"off": "It is wet.", "dictionary": "It is wet."}, known]
    assert unchanged(rows, "dictionary", "off") == Share(1, 2)
    assert in_form_of_an_entry(rows, "dictionary") == Share(1, 2)
