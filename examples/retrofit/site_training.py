"""Training of an Engram site: a frozen model, facts that are asked for, and text on which the site should keep quiet."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.retrofit.backbone import Backbone
from examples.retrofit.documents import CachedDocument
from examples.retrofit.engram_site import RowTable, TrainableSite
from examples.retrofit.losses import cross_entropy, loudness

COMMON_IDS = 2048  # the first ids of a vocabulary: bytes, white space and frequent pieces
RANDOM_IDS = 1024  # further wrong answers in each step
BATCHES_SORTED = 20  # batches whose documents are sorted by length before they are cut, so that little is padded
NO_LABEL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a site is trained; the defaults are those of the weights in ``assets/``.

    Attributes:
        passes: how often each fact is seen, each time in one of its wordings.
        batch: facts in a step.
        learning_rate: of projections and gate; falls linearly after ``warm_up`` steps.
        row_learning_rate: of the rows, likewise.
        quiet_weight: of the mean loudness on quiet text.
        quiet_tokens: of quiet text in a step.
        train_projections: False leaves all but the rows as they are: a cartridge for a site that exists.
    """

    passes: float = 10
    batch: int = 24
    learning_rate: float = 2e-3
    row_learning_rate: float = 1.6e-2
    warm_up: int = 20
    quiet_weight: float = 20.0
    quiet_tokens: int = 1024
    train_projections: bool = True
    seed: int = 0

    def num_steps(self, num_facts: int) -> int:
        """Return the number of steps."""
        return max(1, round(self.passes * num_facts / self.batch))

    def rate(self, step: int, num_facts: int) -> float:
        """Return what learning rates are multiplied with in a step from 0."""
        return min((step + 1) / self.warm_up, 1 - step / self.num_steps(num_facts))


@dataclass(frozen=True, slots=True, eq=False)
class QuietText:
    """Tokens the site should leave alone: the stream ``hidden [N, D]`` there and ``row_ids [N, C]``."""

    hidden: Tensor
    row_ids: Tensor

    @classmethod
    def of(cls, documents: Sequence[CachedDocument]) -> "QuietText":
        """Take all tokens but the first of each document: its stream is many times as large as all others."""
        return cls(
            torch.cat([document.hidden[1:] for document in documents]),
            torch.cat([document.row_ids[1:] for document in documents]),
        )

    def draw(self, count: int, rng: torch.Generator) -> "QuietText":
        """Draw tokens."""
        chosen = torch.randint(len(self.hidden), (count,), generator=rng)
        return QuietText(self.hidden[chosen], self.row_ids[chosen])


@dataclass(frozen=True, slots=True)
class StepLosses:
    """What a step found before it changed anything: cross entropy of answers in nats, mean loudness of quiet text."""

    answers: float
    loudness: float


class SiteTraining:
    """One training: what is learnt, from what, and how far it has come."""

    def __init__(
        self,
        backbone: Backbone,
        site: TrainableSite,
        table: RowTable,
        wordings: Sequence[Sequence[CachedDocument]],
        quiet: Sequence[QuietText],
        schedule: Schedule,
    ) -> None:
        """Begin at step 0.

        Args:
            wordings: for each wording of the question the same facts in the same order.
            quiet: kinds of quiet text, of each of which a step draws as much.
        """
        self._backbone, self.site, self.table = backbone, site, table
        self._wordings, self._quiet, self._schedule = wordings, quiet, schedule
        self._num_facts = len(wordings[0])
        self.num_steps = schedule.num_steps(self._num_facts)
        self.step_count = 0
        self._random, self._draws = random.Random(schedule.seed), torch.Generator().manual_seed(schedule.seed)
        self._batches = self._endless_batches()
        self._labels = answer_ids(wordings)
        site.requires_grad_(schedule.train_projections)
        self._optimiser = torch.optim.Adam(site.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98))

    def step(self) -> StepLosses:
        """Train on one batch of facts and as many quiet tokens as the schedule says."""
        documents, quiet = next(self._batches), self._draw_quiet()
        read = torch.cat([*(document.row_ids for document in documents), quiet.row_ids])
        row_ids, rows, embedding = self.table.gather(read)
        stream = torch.cat([*(document.hidden for document in documents), quiet.hidden])
        update = self.site(stream, embedding)
        heard = len(stream) - len(quiet.hidden)
        answers = self._answer_loss(documents, stream[:heard] + update[:heard].to(stream.dtype))
        loud = loudness(update[heard:], quiet.hidden).mean()
        self._descend(answers + self._schedule.quiet_weight * loud, row_ids, rows)
        return StepLosses(answers.item(), loud.item())

    def finish(self) -> None:
        """Set rows that no fact reads to zero: they are no knowledge, and other text may read them."""
        self.table.keep_only(torch.cat([each.row_ids for wording in self._wordings for each in wording]))

    def _descend(self, loss: Tensor, row_ids: Tensor, rows: Tensor) -> None:
        rate = self._schedule.rate(self.step_count, self._num_facts)
        self._optimiser.zero_grad()
        loss.backward()
        if self._schedule.train_projections:
            torch.nn.utils.clip_grad_norm_(self.site.parameters(), 1.0)
            self._optimiser.param_groups[0]["lr"] = rate * self._schedule.learning_rate
            self._optimiser.step()
        assert rows.grad is not None
        self.table.step(row_ids, rows.grad, rate * self._schedule.row_learning_rate)
        self.step_count += 1

    def _answer_loss(self, documents: Sequence[CachedDocument], stream: Tensor) -> Tensor:
        """Return the mean loss of all answers' tokens, of the streams of all documents one after another."""
        lengths = [len(document.hidden) for document in documents]
        padded = torch.nn.utils.rnn.pad_sequence(list(stream.split(lengths)), batch_first=True)
        labels = torch.full(padded.shape[:2], NO_LABEL)
        for row, document in enumerate(documents):
            answer = document.document.token_ids[document.document.answer_start :]
            labels[row, document.document.answer_start - 1 : lengths[row] - 1] = torch.tensor(answer)
        answered = labels != NO_LABEL
        ids, places = self._with_wrong_answers(labels[answered])
        return cross_entropy(self._backbone.upper(padded)[answered], self._backbone.output_weight[ids], places)

    def _with_wrong_answers(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids the output layer is evaluated for, and where among them the labels are."""
        some = self._labels[torch.randint(len(self._labels), (RANDOM_IDS,), generator=self._draws)]
        common = torch.arange(min(COMMON_IDS, self._backbone.vocab_size))
        ids, places = torch.unique(torch.cat([labels, common, some]), return_inverse=True)
        return ids, places[: len(labels)]

    def _draw_quiet(self) -> QuietText:
        count = self._schedule.quiet_tokens // len(self._quiet)
        drawn = [text.draw(count, self._draws) for text in self._quiet]
        return QuietText(torch.cat([text.hidden for text in drawn]), torch.cat([text.row_ids for text in drawn]))

    def _endless_batches(self) -> Iterator[list[CachedDocument]]:
        while True:
            for batch in self._batches_of_a_pass():
                yield [self._random.choice(self._wordings)[fact] for fact in batch]

    def _batches_of_a_pass(self) -> list[list[int]]:
        """Return each fact once, in batches of facts of about one length."""
        size = self._schedule.batch
        facts = self._random.sample(range(self._num_facts), self._num_facts)
        stretches = [
            facts[start : start + size * BATCHES_SORTED] for start in range(0, len(facts), size * BATCHES_SORTED)
        ]
        sorted_facts = [sorted(stretch, key=lambda fact: len(self._wordings[0][fact].hidden)) for stretch in stretches]
        batches = [stretch[start : start + size] for stretch in sorted_facts for start in range(0, len(stretch), size)]
        return self._random.sample(batches, len(batches))


def answer_ids(wordings: Sequence[Sequence[CachedDocument]]) -> Tensor:
    """Return the distinct ids of all answers, ascending."""
    documents = [document.document for document in wordings[0]]
    return torch.unique(torch.tensor([id_ for each in documents for id_ in each.token_ids[each.answer_start :]]))
