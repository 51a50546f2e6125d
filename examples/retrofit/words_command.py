"""``words``: what the cartridges are to know, as files in the work folder."""

from pathlib import Path

import click

from examples.retrofit.corpora import DEBIAN_REFERENCE, DEVILS_DICTIONARY, FOLDOC, JARGON, WORDNET, fetch
from examples.retrofit.facts import write_facts
from examples.retrofit.manual_text import facts_of
from examples.retrofit.whole_files import write_text
from examples.retrofit.wordnet import dictionary, other_terms

MANUAL = Path(__file__).parent / "manual"
NUM_OTHER_TERMS = 6_000
PACKAGES = (WORDNET, JARGON, FOLDOC, DEVILS_DICTIONARY, DEBIAN_REFERENCE)  # later steps need all of them


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/retrofit"), show_default=True)
def words(work: Path) -> None:
    """Fetch all packages and write the entries to train, those that are controls, and the facts of the manual.

    Writes dictionary.jsonl, untrained.jsonl and manual.jsonl, and quiet_terms.txt: terms that no cartridge defines.
    """
    package, *_ = [fetch(each, work / "corpora") for each in PACKAGES]
    trained, untrained = dictionary(package)
    for name, facts in (("dictionary", trained), ("untrained", untrained), ("manual", facts_of(MANUAL))):
        write_facts(work / f"{name}.jsonl", facts)
        click.echo(f"{name}: {len(facts)} facts")
    terms = other_terms(package, NUM_OTHER_TERMS)
    write_text(work / "quiet_terms.txt", "".join(f"{term}\n" for term in terms))
