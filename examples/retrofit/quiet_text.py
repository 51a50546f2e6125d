"""Text on which a site should keep quiet: prose, code, ordinary chats, and questions about what it does not know.

None of it is in the corpora that `examples.retrofit.text_perplexity` measures foreign text on.
"""

import json
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from examples.retrofit.backbone import Backbone
from examples.retrofit.corpora import FOLDOC, JARGON, WORDNET, fetch, text_of_deb
from examples.retrofit.documents import Document, Report, prompt
from examples.retrofit.facts import Fact
from examples.retrofit.generation import generate
from examples.retrofit.wordnet import other_definitions

JARGON_FILE = "usr/share/dictd/jargon.dict.dz"
FOLDOC_FILE = "usr/share/dictd/foldoc.dict.dz"
PASSAGE_CHARACTERS, PASSAGE_TOKENS = 1200, 192
PARTS = Path(__file__).with_name("prompt_parts.json")
BATCH = 96
NUM_PASSING, NUM_ORDINARY = 400, 500
CHECKED_SHARE = 0.1  # of each text, at its end
EXPLANATIONS = ("Define {subject}.", "What is {subject}?", "What does {subject} mean?", "Explain {subject} briefly.")
FURTHER_LOOK_UPS = (
    "Can you look up {subject}?",
    "Would you look {subject} up in the glossary?",
    "I would like you to look up {subject}.",
    "Look this up for me: {subject}",
    "Go to the entry for {subject}.",
    "Open the glossary at {subject}.",
    "Is there an entry for {subject}?",
    "I am looking for the entry on {subject}.",
    "Quote the entry for {subject}.",
    "Fetch the entry {subject}.",
    "What is written under {subject}?",
    "What stands in the book about {subject}?",
    "Tell me what the glossary says about {subject}.",
    "See the glossary: {subject}",
    "Consult the glossary on {subject}.",
    "Search the book for {subject}.",
    "Search the glossary: {subject}",
    "Turn to {subject} in the glossary.",
    "Give me the entry for {subject}, please.",
    "I want to read the entry about {subject}.",
    "Please check the book for {subject}.",
    "Check the entry on {subject}.",
    "How does the glossary put it: {subject}?",
    "Lookup {subject}",
    "Look up the word {subject} in the book.",
    "Could I have the entry for {subject}?",
    "Which entry is there for {subject}?",
    "What does the entry for {subject} say?",
    "Under {subject}, what does the glossary have?",
    "Have a look at the entry for {subject} and read it to me.",
    "Recite the entry on {subject}.",
    "Let me see what the book has on {subject}.",
    "Please find {subject} in the glossary for me.",
    "Let us look up {subject} together.",
    "The entry on {subject}, please.",
    "Now look up {subject}, will you?",
    "What does the manual say under {subject}?",
    "What does it say in the book under {subject}?",
    "What does the glossary say under {subject}?",
    "What does the book say about {subject}?",
    "What does the book have on {subject}?",
    "What does the entry on {subject} say?",
    "What has the glossary got on {subject}?",
    "What is the book's entry for {subject}?",
    "How is {subject} entered in the glossary?",
    "How does the book describe {subject}?",
    "How does the entry for {subject} read?",
    "Where the book lists {subject}, what does it say?",
    "Under {subject}, what does the book say?",
    "Under {subject} the glossary says what?",
    "In the glossary, what stands under {subject}?",
    "In the book, look for {subject}.",
    "From the glossary: {subject}",
    "From the book, {subject} please.",
    "Book entry: {subject}",
    "Glossary entry, {subject}.",
    "Entry: {subject}",
    "Entry on {subject}, please",
    "Entry wanted: {subject}",
    "The book on {subject}?",
    "The glossary on {subject}, please.",
    "I need to look up {subject}.",
    "I need what the glossary has on {subject}.",
    "I have to look {subject} up.",
    "I would like the entry for {subject}.",
    "I want the glossary entry on {subject}.",
    "Is {subject} in the glossary?",
    "Does the book have an entry for {subject}?",
    "Does the glossary list {subject}?",
    "Can you find {subject} in the glossary?",
    "Can you show me the glossary entry {subject}?",
    "Could you check the book for {subject}?",
    "Could you find the entry on {subject}?",
    "Would you read me the entry for {subject}?",
    "Will you look {subject} up for me?",
    "Please show the entry for {subject}.",
    "Please quote the glossary on {subject}.",
    "Please open the book at {subject}.",
    "Help me look up {subject}.",
    "Go and look up {subject}.",
    "Locate {subject} in the glossary.",
    "Pull the entry on {subject}.",
    "Copy out the entry for {subject}.",
    "Get me the entry for {subject}.",
    "Print the entry {subject}.",
    "Look in the book for {subject}.",
    "Look into the glossary for {subject}.",
    "Look at the entry for {subject}.",
    "See what the glossary says on {subject}.",
    "See the entry for {subject}, please.",
    "Tell me what stands under {subject} in the book.",
    "Tell me the entry for {subject}.",
    "Let me have the entry on {subject}.",
    "Let me read the book's words on {subject}.",
    "Once more, the entry for {subject}.",
    "Next, look up {subject}.",
)
IN_PASSING = (
    *EXPLANATIONS,
    "Write a short story about {subject}.",
    "How much does {subject} cost?",
    "Give me three facts about {subject}.",
    "Who invented {subject}?",
    "Translate the word {subject} into German.",
    "Write a sentence with the word {subject}.",
    "Why do people like {subject}?",
    "What can I do with {subject}?",
)


def passages(text: str, count: int, rng: random.Random) -> list[str]:
    """Draw passages, each from where a line begins."""
    starts = [match.end() for match in re.finditer(r"\n", text[: max(1, len(text) - PASSAGE_CHARACTERS)])]
    return [text[start : start + PASSAGE_CHARACTERS] for start in rng.sample(starts, min(count, len(starts)))]


def prose_and_code(folder: Path, seed: int) -> dict[str, str]:
    """Return the Jargon File, FOLDOC, definitions of WordNet, Python's reference, and the source of its library.

    Without dictionaries among them a site full of definitions speaks up in any text that reads like one.

    Args:
        folder: where packages of Debian are kept.
    """
    return {
        "jargon": text_of_deb(fetch(JARGON, folder), JARGON_FILE),
        "foldoc": text_of_deb(fetch(FOLDOC, folder), FOLDOC_FILE),
        "definitions": other_definitions(fetch(WORDNET, folder)),
        "reference": "\n\n".join(pydoc_data.topics.topics.values()),
        "source": _library_source(random.Random(f"{seed} source")),
    }


def taught_and_checked(text: str) -> tuple[str, str]:
    """Cut a text in two, so that what is checked is in nothing that is trained."""
    cut = int(len(text) * (1 - CHECKED_SHARE))
    return text[:cut], text[cut:]


def own_questions(facts: Sequence[Fact], unknown: Sequence[str], seed: int) -> dict[str, list[str]]:
    """Return questions whose answers are the model's own, whatever a site knows: nobody asks for an entry.

    Args:
        facts: what is trained; their subjects occur in questions for something else, ``passing``. Other kinds don't
            depend on them, so that what the model answers is computed once for all cartridges.
        unknown: terms that are no facts.
    """
    parts: dict[str, list[str]] = json.loads(PARTS.read_text(encoding="utf-8"))
    rng = random.Random(f"{seed} terms")
    explained = [rng.choice(EXPLANATIONS).format(subject=term) for term in unknown]
    rng = random.Random(f"{seed} ordinary")
    ordinary = [rng.choice(parts["wordings"]).format(rng.choice(parts["topics"])) for _ in range(NUM_ORDINARY)]
    rng = random.Random(f"{seed} passing")
    chosen = rng.sample(facts, min(len(facts), NUM_PASSING))
    passing = [rng.choice(IN_PASSING).format(subject=fact.subject) for fact in chosen]
    return {"terms": explained, "passing": passing, "ordinary": ordinary}


def answered(
    backbone: Backbone, questions: Sequence[str], tokens: int, report: Report = lambda _: None
) -> list[Document]:
    """Let the model answer questions greedily, each with at most so many tokens."""
    prompts = sorted((backbone.encode(prompt(question)) for question in questions), key=len)
    documents = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        for asked, written in zip(batch, generate(backbone.model, batch, tokens, backbone.end_of_turn), strict=True):
            documents.append(Document([*asked, *written.generated_ids], len(asked), len(asked)))
        report(len(batch))
    return documents


def _library_source(rng: random.Random) -> str:
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in rng.sample(modules, 60))
