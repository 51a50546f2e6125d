"""What every family's model is to the export: one forward pass over T tokens, with named states and table rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engram_export.rope import RotaryEmbedding
from engram_export.weight_map import ReadRows
from engram_runtime.manifest import StateSpec


@dataclass(frozen=True, slots=True)
class TableInput:
    """The rows ``[T, columns, row_dim]`` a site reads from its host table."""

    site: str
    columns: int
    row_dim: int


@dataclass(slots=True, eq=False)
class Step:
    """One forward pass: what every layer may read, and the states, which layers replace by their successors.

    Attributes:
        token_ids: ``[T]`` int64.
        position: ``[1]`` int64, tokens the states already hold.
        rows: ``[T, C, d]`` float32 by site.
        states: by name, in the shapes of their `StateSpec`.
        rotations: cosine and sine ``[S, rotary_dim / 2]`` by kind of attention.
        activity: what gated sites say of themselves, by site; see `GatedSite`.
        embeddings: ``[T, D]``, read where a token id is negative; None where all positions are tokens.
    """

    token_ids: Tensor
    position: Tensor
    rows: Mapping[str, Tensor]
    states: dict[str, Tensor]
    rotations: Mapping[str, tuple[Tensor, Tensor]]
    activity: dict[str, Tensor] = field(default_factory=dict)
    embeddings: Tensor | None = None


class Stateful(nn.Module):
    """A module that keeps states between passes."""

    state_specs: tuple[StateSpec, ...] = ()


class TableSite(Stateful):
    """A module that reads rows of a host table."""

    table_input: TableInput


class GatedSite(TableSite):
    """A site that gates its rows into G residual streams of D values, and says how far."""

    def tell(self, step: Step, *, streams: Tensor, update: Tensor, gate: Tensor) -> None:
        """Leave ``[T, G, 3]`` in ``step.activity``, the values of `engram_runtime.activity.SiteActivity`.

        Args:
            streams: ``[T, G * D]``, before the site.
            update: ``[T, G * D]``, all that the site adds to them.
            gate: ``[T, G]``.
        """
        parts = [gate.unsqueeze(-1), *(_stream_norms(x, gate.shape[-1]) for x in (update, streams))]
        step.activity[self.table_input.site] = torch.cat(parts, dim=-1)


def _stream_norms(x: Tensor, streams: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(torch.unflatten(x, -1, (streams, -1)), dim=-1, keepdim=True)
    return norms


class Rotation(nn.Module):
    """The cosines and sines of a rotary embedding, computed at export."""

    def __init__(self, embedding: RotaryEmbedding, positions: int) -> None:
        super().__init__()
        shape = (positions, len(embedding.inverse_frequencies))
        self.embedding = embedding
        self.cos = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.sin = nn.Parameter(torch.empty(shape), requires_grad=False)

    def cosines(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows of ``cos``."""
        return self.embedding.tables(start, stop)[0]

    def sines(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows of ``sin``."""
        return self.embedding.tables(start, stop)[1]


class Decoder(nn.Module, ABC):
    """A causal language model; families implement `hidden`, `normed` and `head`.

    Attributes:
        tells_hidden: whether `forward` returns what `normed` does, which a draft head or another sequence goes on from.
    """

    def __init__(self, context_length: int, rotations: Mapping[str, RotaryEmbedding]) -> None:
        super().__init__()
        self.tells_hidden = False
        self.rotations = nn.ModuleDict({kind: Rotation(rope, context_length) for kind, rope in rotations.items()})

    @abstractmethod
    def hidden(self, step: Step) -> Tensor:
        """Return the last residual stream ``[T, D]`` before the final norm."""

    @abstractmethod
    def normed(self, hidden: Tensor) -> Tensor:
        """Return what the head takes, ``[R, D]``, for ``hidden [R, D]``."""

    @abstractmethod
    def head(self, normed: Tensor) -> Tensor:
        """Return ``[R, V]`` for ``normed [R, D]``."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return ``[R, V]`` for ``hidden [R, D]``."""
        return self.head(self.normed(hidden))

    def state_specs(self) -> tuple[StateSpec, ...]:
        """Return the states in the order `forward` takes them."""
        return state_specs_of(self)

    def table_inputs(self) -> tuple[TableInput, ...]:
        """Return the table rows in the order `forward` takes them."""
        return tuple(module.table_input for module in self.modules() if isinstance(module, TableSite))

    def gated_sites(self) -> tuple[str, ...]:
        """Return the sites whose activity `forward` returns, in its order."""
        return tuple(module.table_input.site for module in self.modules() if isinstance(module, GatedSite))

    def rotation_tables(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return cosine and sine ``[S, rotary_dim / 2]`` by kind of attention."""
        return {kind: (rotation.cos, rotation.sin) for kind, rotation in self.rotations.items()}  # type: ignore[misc]

    def computed(self) -> dict[str, ReadRows]:
        """Return the parameters that no checkpoint holds, by name, to be computed a few rows at a time."""
        rows: dict[str, ReadRows] = {}
        for name, module in self.named_modules():
            if isinstance(module, Rotation):
                rows |= {f"{name}.cos": module.cosines, f"{name}.sin": module.sines}
        return rows

    def forward(
        self,
        token_ids: Tensor,
        position: Tensor,
        logit_rows: Tensor,
        rows: Sequence[Tensor],
        states: Sequence[Tensor],
        embeddings: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run T tokens after ``position [1]`` earlier ones.

        Args:
            token_ids: ``[T]`` int64.
            logit_rows: ``[R]`` int64, which of the T tokens get logits.
            rows: of each site, ``[T, C, d]`` float32, in the order of `table_inputs`.
            states: in the order of `state_specs`.
            embeddings: see `Step`.

        Returns:
            ``[R, V]`` logits, the activity ``[T, G, 3]`` of `gated_sites`, where `tells_hidden` the hidden states
            ``[T, D]`` after the final norm, and the next states.
        """
        specs = self.state_specs()
        step = Step(
            token_ids=token_ids,
            position=position,
            rows={table.site: values for table, values in zip(self.table_inputs(), rows, strict=True)},
            states={spec.name: state for spec, state in zip(specs, states, strict=True)},
            rotations=self.rotation_tables(),
            embeddings=embeddings,
        )
        hidden = self.hidden(step)
        told = [step.activity[site] for site in self.gated_sites()]
        if self.tells_hidden:
            normed = self.normed(hidden)
            logits = self.head(normed.index_select(0, logit_rows))
            told.append(normed)
        else:
            logits = self.logits(hidden.index_select(0, logit_rows))
        return logits, *told, *(step.states[spec.name] for spec in specs)


def state_specs_of(model: nn.Module) -> tuple[StateSpec, ...]:
    """Return the states of all modules, in their order."""
    return tuple(spec for module in model.modules() if isinstance(module, Stateful) for spec in module.state_specs)
