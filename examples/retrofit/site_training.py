"""Training of an Engram site: a frozen model, facts that are asked for, and text that should stay as it is."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.retrofit.backbone import Backbone
from examples.retrofit.documents import CachedDocument, OwnAnswer
from examples.retrofit.engram_site import RowTable, TrainableSite
from examples.retrofit.losses import cross_entropy, divergence, loudness

COMMON_IDS = 2048  # the first ids of a vocabulary: bytes, white space and frequent pieces
BIAS_RATE, GAIN_RATE = 5, 10  # of the gate's bias and of the query's gain, times the learning rate
RANDOM_IDS = 1024  # further wrong answers in each step
SORTED_BATCHES = 20  # batches whose documents are sorted by length before they are cut, so that little is padded


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How a site is trained.

    Attributes:
        passes: how often each fact is seen at most, each time in one of its wordings.
        batch: facts in a step.
        learning_rate: of projections and gate; rises for ``warm_up`` steps and falls linearly in the last
            ``wind_down`` steps, at most a third of all.
        row_learning_rate: of the rows, likewise.
        begun: terms in a step of whose answers the beginning alone is taught.
        own_answers: answers of the model itself in a step.
        own_weight: of their divergence.
        quiet_tokens: of quiet text in a step.
        quiet_weight: of its mean loudness.
        train_projections: False leaves all but the rows as they are: a cartridge for a site that exists.
    """

    passes: float
    batch: int = 24
    learning_rate: float = 2e-3
    row_learning_rate: float = 1.6e-2
    warm_up: int = 20
    wind_down: int = 250
    begun: int = 8
    own_answers: int = 9
    own_weight: float = 1.5
    quiet_tokens: int = 1536
    quiet_weight: float = 10.0
    train_projections: bool = True
    seed: int = 0

    def num_steps(self, num_facts: int) -> int:
        """Return the number of steps at most."""
        return max(1, round(self.passes * num_facts / self.batch))

    def fall(self, num_facts: int) -> int:
        """Return the number of steps at the end in which learning rates fall."""
        return max(1, min(self.wind_down, self.num_steps(num_facts) // 3))

    def rate(self, step: int, num_steps: int, num_facts: int) -> float:
        """Return what learning rates are multiplied with in a step, which counts from 0 to ``num_steps``."""
        return min((step + 1) / self.warm_up, 1, (num_steps - step) / self.fall(num_facts))


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


@dataclass(frozen=True, slots=True, eq=False)
class TrainingText:
    """What a site is trained on.

    Attributes:
        wordings: for each wording of the question, the same facts in the same order.
        begun: terms asked for in many wordings, of whose answers the beginning alone is taught.
        own: kinds of chats the model has answered itself, of each of which a step draws as many.
        quiet: kinds of quiet text, likewise.
    """

    wordings: Sequence[Sequence[CachedDocument]]
    begun: Sequence[CachedDocument]
    own: Sequence[Sequence[OwnAnswer]]
    quiet: Sequence[QuietText]

    @property
    def num_facts(self) -> int:
        """Facts of each wording."""
        return len(self.wordings[0])

    def read_by_answers(self) -> Tensor:
        """Return ``[N, C]`` rows that are read where facts' answers are predicted."""
        facts = [each for wording in self.wordings for each in wording]
        return torch.cat([each.row_ids[each.document.answer_start - 1 :] for each in facts])

    def opening_rows(self, tokens: int) -> list[int]:
        """Return the rows that are read from the end of a question to where the same tokens of all answers end."""
        fact = self.wordings[0][0]
        start = fact.document.answer_start - 1
        return sorted(set(fact.row_ids[start : start + tokens + 1].flatten().tolist()))

    def answer_ids(self) -> Tensor:
        """Return the distinct ids of all answers, ascending."""
        answers = torch.cat([answer_of(each) for each in self.wordings[0]])
        return torch.tensor(sorted(set(answers.tolist())))


@dataclass(frozen=True, slots=True)
class StepLosses:
    """What a step found before it changed anything: losses of answers in nats, mean loudness of quiet text."""

    answers: float
    own_answers: float
    loudness: float


class SiteTraining:
    """One training: what is learnt, from what, and how far it has come."""

    def __init__(
        self,
        backbone: Backbone,
        site: TrainableSite,
        table: RowTable,
        text: TrainingText,
        schedule: Schedule,
        fixed_rows: Sequence[int] = (),
    ) -> None:
        """Begin at step 0; rows that are fixed stay as they are."""
        self._backbone, self.site, self.table = backbone, site, table
        self._text, self._schedule = text, schedule
        self.num_steps = schedule.num_steps(text.num_facts)
        self.step_count = 0
        self._random, self._draws = random.Random(), torch.Generator()
        self._pass: tuple[int, list[list[int]]] = (-1, [])
        self._answer_ids = text.answer_ids()
        self._read_rows = torch.zeros(len(table.values), dtype=torch.bool)
        self._read_rows[text.read_by_answers().flatten()] = True
        self._taught_rows = self._read_rows.clone()
        self._taught_rows[list(fixed_rows)] = False
        site.requires_grad_(schedule.train_projections)
        self._optimiser = torch.optim.Adam(
            [
                {"params": [site.key_proj, site.value_proj], "factor": 1},
                {"params": [site.gate_bias], "factor": BIAS_RATE},
                {"params": [site.query_norm], "factor": GAIN_RATE},
            ],
            betas=(0.9, 0.98),
        )

    def step(self) -> StepLosses:
        """Train on one batch: facts, answers of the model itself, quiet tokens."""
        self._seed_draws()
        facts, own, quiet = self._draw_facts(), self._draw_own(), self._draw_quiet()
        taught = [*facts, *self._draw_begun()]
        documents = [*taught, *(each.cached for each in own)]
        stream = torch.cat([*(document.hidden for document in documents), quiet.hidden])
        read = torch.cat([*(document.row_ids for document in documents), quiet.row_ids])
        row_ids, rows, embedding = self.table.gather(read)
        update = self.site(stream, embedding)
        update = torch.where(self._in_question(taught, len(stream)), update.detach(), update)
        heard = len(stream) - len(quiet.hidden)
        states = self._states_of_answers(documents, stream[:heard] + update[:heard].to(stream.dtype))
        answers, unlike = self._answer_losses(documents, own, states)
        loud = loudness(update[heard:], quiet.hidden).mean()
        weights = self._schedule
        self._descend(answers + weights.own_weight * unlike + weights.quiet_weight * loud, row_ids, rows)
        return StepLosses(answers.item(), unlike.item(), loud.item())

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs; what goes on from it is the same as what was never interrupted."""
        return {
            "site": self.site.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "rows": (self.table.values, self.table.first, self.table.second),
            "steps": (self.step_count, self.num_steps),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.site.load_state_dict(state["site"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.table.values, self.table.first, self.table.second = state["rows"]
        self.step_count, self.num_steps = state["steps"]
        self.table.steps = self.step_count

    def wind_down(self) -> None:
        """End soon: let the learning rates fall from now on."""
        self.num_steps = min(self.num_steps, self.step_count + self._schedule.fall(self._text.num_facts))

    def finish(self) -> None:
        """Set rows that no answer reads to zero: they are no knowledge, and other text may read them."""
        self.table.values[~self._read_rows] = 0

    @staticmethod
    def _in_question(documents: Sequence[CachedDocument], length: int) -> Tensor:
        """Return ``[length, 1]``: where the streams one after another are before the last token of a question.

        Nothing is learnt there: rows of a question's n-grams would learn its wording, and no other would do.

        Args:
            documents: the first of the streams.
        """
        places = torch.zeros(length, 1, dtype=torch.bool)
        start = 0
        for document in documents:
            places[start : start + document.document.answer_start - 1] = True
            start += len(document.hidden)
        return places

    def _answer_losses(
        self, documents: Sequence[CachedDocument], own: Sequence[OwnAnswer], states: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return cross entropy and divergence over a part of the vocabulary: what is to be said, and other ids.

        Args:
            own: the last of the documents.
            states: of each document, what the output layer gets for the tokens of its answer.
        """
        given = [torch.tensor(document.document.taught, dtype=torch.int64) for document in documents]
        said = [torch.tensor(each.cached.document.token_ids[each.cached.document.own_from :]) for each in own]
        ids, places = self._with_wrong_answers(torch.cat(given), torch.cat(said))
        weight = self._backbone.output_weight[ids]
        taught = torch.cat([state[: len(labels)] for state, labels in zip(states, given, strict=True)])
        left = torch.cat([state[len(labels) :] for state, labels in zip(states, given, strict=True)])
        reference = torch.cat([each.states[each.cached.document.own_from - 1 : -1] for each in own])
        return cross_entropy(taught, weight, places), divergence(left, reference, weight)

    def _states_of_answers(self, documents: Sequence[CachedDocument], stream: Tensor) -> list[Tensor]:
        """Return what the output layer gets for the tokens of each answer, of the streams one after another."""
        lengths = [len(document.hidden) for document in documents]
        streams = list(torch.split(stream, lengths))
        states = self._backbone.upper(torch.nn.utils.rnn.pad_sequence(streams, batch_first=True))
        return [
            state[document.document.answer_start - 1 : length - 1]
            for state, document, length in zip(states, documents, lengths, strict=True)
        ]

    def _descend(self, loss: Tensor, row_ids: Tensor, rows: Tensor) -> None:
        rate = self._schedule.rate(self.step_count, self.num_steps, self._text.num_facts)
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        if self._schedule.train_projections:
            torch.nn.utils.clip_grad_norm_(self.site.parameters(), 1.0)
            for group in self._optimiser.param_groups:
                group["lr"] = group["factor"] * rate * self._schedule.learning_rate
            self._optimiser.step()
        assert rows.grad is not None
        gradient = rows.grad * self._taught_rows[row_ids, None]
        self.table.step(row_ids, gradient, rate * self._schedule.row_learning_rate)
        self.step_count += 1

    def _with_wrong_answers(self, labels: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids the output layer is evaluated for, and where among them the labels are.

        Args:
            said: ids the model says by itself, which are among them too.
        """
        some = self._answer_ids[torch.randint(len(self._answer_ids), (RANDOM_IDS,), generator=self._draws)]
        common = torch.arange(min(COMMON_IDS, self._backbone.vocab_size))
        ids, places = torch.unique(torch.cat([labels, said, common, some]), return_inverse=True)
        return ids, places[: len(labels)]

    def _draw_begun(self) -> list[CachedDocument]:
        return [self._random.choice(self._text.begun) for _ in range(self._schedule.begun * bool(self._text.begun))]

    def _draw_own(self) -> list[OwnAnswer]:
        kinds = self._text.own
        return [self._random.choice(kinds[number % len(kinds)]) for number in range(self._schedule.own_answers)]

    def _draw_quiet(self) -> QuietText:
        kinds = self._text.quiet
        drawn = [kind.draw(self._schedule.quiet_tokens // len(kinds), self._draws) for kind in kinds]
        return QuietText(torch.cat([kind.hidden for kind in drawn]), torch.cat([kind.row_ids for kind in drawn]))

    def _seed_draws(self) -> None:
        """Make what a step draws depend on its number alone."""
        self._random.seed(f"{self._schedule.seed} step {self.step_count}")
        self._draws.manual_seed(self._random.getrandbits(62))

    def _draw_facts(self) -> list[CachedDocument]:
        size = self._schedule.batch
        number, place = divmod(self.step_count, -(-self._text.num_facts // size))
        if self._pass[0] != number:
            self._pass = number, self._batches_of(number)
        return [self._random.choice(self._text.wordings)[fact] for fact in self._pass[1][place]]

    def _batches_of(self, number: int) -> list[list[int]]:
        """Return each fact once, in batches of facts of about one length, as they come in a pass from 0."""
        rng = random.Random(f"{self._schedule.seed} pass {number}")
        facts = rng.sample(range(self._text.num_facts), self._text.num_facts)
        lengths = [len(document.hidden) for document in self._text.wordings[0]]
        size = self._schedule.batch
        stretches = chunks(facts, size * SORTED_BATCHES)
        batches = [batch for each in stretches for batch in chunks(sorted(each, key=lengths.__getitem__), size)]
        return rng.sample(batches, len(batches))


def answer_of(document: CachedDocument) -> Tensor:
    """Return the ids of a document's answer."""
    return torch.tensor(document.document.token_ids[document.document.answer_start :])


def chunks(items: list[int], size: int) -> list[list[int]]:
    """Return items in their order, ``size`` at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]
