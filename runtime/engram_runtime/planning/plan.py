"""The plan of a model on a machine: what it takes, what it gives, whether it fits, and what to type next."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engram_runtime.planning.machine import Machine, telling
from engram_runtime.planning.money import NO_PRICES, Prices
from engram_runtime.planning.need import (
    FITS,
    FROM_DISK,
    TABLES_ONLY,
    WONT_FIT,
    Need,
    Verdict,
    experts_on_disk,
    judge_memory,
    memory_need,
)
from engram_runtime.planning.next_steps import commands
from engram_runtime.planning.outline import Outline, Table
from engram_runtime.planning.speed import Storage, decode_s, prefill_s
from engram_runtime.sizes import format_size
from engram_runtime.tables.options import RESIDENT, TableOptions
from engram_runtime.tables.policy import TableChoice, choose, table_room

PAGE_BYTES = 4096  # what a disk reads at least
PROMPT_TOKENS = 2048  # of the prefill whose waits are told
TYPICAL_DEPTH = 512  # tokens before, of the rate that prices go by


@dataclass(frozen=True, slots=True, kw_only=True)
class TableWait:
    """What a table's rows cost where nothing of them is in memory; None where the disk isn't known.

    Attributes:
        pages: a token reads.
        token_s, prompt_s: until the rows of a token and of `PROMPT_TOKENS` are there.
        token_wait_s, prompt_wait_s: how much of it the layers before the site leave to wait for.
    """

    choice: TableChoice
    pages: float
    token_s: float | None
    token_wait_s: float | None
    prompt_s: float | None
    prompt_wait_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Predicted tokens a second: of decoding by the tokens before, of prompts; 0 and None where they can't be told."""

    decode: Mapping[int, float]
    prefill: float | None
    experts_on_disk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All of it; ``positions`` is the length of text that was asked for."""

    outline: Outline
    machine: Machine
    positions: int
    need: Need
    tables: Sequence[TableWait]
    rates: Rates | None
    prices: Mapping[str, float]
    verdict: Verdict
    commands: Sequence[str]


def make_plan(outline: Outline, machine: Machine, *, positions: int, prices: Prices = NO_PRICES) -> Plan:
    """Work out a plan; nothing is read."""
    choices = choose_tables(outline, machine, positions)
    resident = sum(choice.table_bytes for choice in choices if choice.io == RESIDENT)
    need = memory_need(outline, positions, resident)
    storage = _storage(need, machine)
    rates = _rates(outline, machine, positions, storage) if outline.runs else None
    verdict = judge(outline, machine, need, rates)
    return Plan(
        outline=outline,
        machine=machine,
        positions=positions,
        need=need,
        tables=[
            _wait(table, choice, outline, machine, storage)
            for table, choice in zip(outline.tables, choices, strict=True)
        ],
        rates=rates,
        prices=_prices(prices, rates),
        verdict=verdict,
        commands=[] if verdict.kind == WONT_FIT else commands(outline, machine),
    )


def choose_tables(outline: Outline, machine: Machine, positions: int) -> list[TableChoice]:
    """Decide how each table would be read there, as a session decides it."""
    model = memory_need(outline, positions, 0)
    room = table_room(TableOptions(), machine.memory, model.total)
    choices = []
    for table in outline.tables:
        choice = choose(table.facts, TableOptions(), room, telling(machine.disk))
        room = dataclasses.replace(room, taken=room.taken + choice.table_bytes * (choice.io == RESIDENT))
        choices.append(choice)
    return choices


def judge(outline: Outline, machine: Machine, need: Need, rates: Rates | None) -> Verdict:
    """Say whether it fits in memory and, where it is to be written here, on the disk."""
    if outline.export is not None and machine.free_disk_bytes is not None:
        wanted = outline.export.disk_bytes
        if wanted > machine.free_disk_bytes:
            free = format_size(machine.free_disk_bytes)
            return Verdict(kind=WONT_FIT, reason=f"it writes {format_size(wanted)}, {free} of disk are free here")
    if rates is None:
        return Verdict(kind=TABLES_ONLY, reason=f"of {outline.family} only tables and their sites can be exported")
    rate = rates.decode[0] or None
    return judge_memory(need, machine.memory.num_bytes, rate)


def _storage(need: Need, machine: Machine) -> Storage:
    disk = machine.disk.facts
    share = experts_on_disk(need, machine.memory.num_bytes)
    return Storage(share=share, bytes_per_s=None if disk is None else disk.bytes_per_s)


def _rates(outline: Outline, machine: Machine, positions: int, storage: Storage) -> Rates:
    depths = sorted({0, min(TYPICAL_DEPTH, positions), positions})
    prompt = min(PROMPT_TOKENS, positions)
    seconds = prefill_s(outline, machine, prompt, storage)
    return Rates(
        decode={depth: 1 / decode_s(outline, machine, depth, storage) for depth in depths},
        prefill=None if seconds is None or math.isinf(seconds) else prompt / seconds,
        experts_on_disk=storage.share,
    )


def pages_of(table: Table) -> float:
    """Return the pages a token's rows lie on: each row on one, and on a second one as often as it straddles two."""
    part_bytes = table.record_bytes / table.parts
    straddling = 0.0 if PAGE_BYTES % part_bytes == 0 else (part_bytes - 1) / PAGE_BYTES
    return table.rows * table.parts * (1 + straddling)


def _wait(table: Table, choice: TableChoice, outline: Outline, machine: Machine, storage: Storage) -> TableWait:
    pages, disk = pages_of(table), machine.disk.facts
    if choice.io == RESIDENT:
        return TableWait(choice=choice, pages=0.0, token_s=0.0, token_wait_s=0.0, prompt_s=0.0, prompt_wait_s=0.0)
    if disk is None:
        return TableWait(choice=choice, pages=pages, token_s=None, token_wait_s=None, prompt_s=None, prompt_wait_s=None)
    token_s = disk.reads_s(round(pages))
    prompt_s = PROMPT_TOKENS * pages / disk.reads_per_s
    return TableWait(
        choice=choice,
        pages=pages,
        token_s=token_s,
        token_wait_s=max(token_s - _token_window(table, outline, machine, storage), 0.0),
        prompt_s=prompt_s,
        prompt_wait_s=max(prompt_s - _prompt_window(table, outline, machine, storage), 0.0),
    )


def _token_window(table: Table, outline: Outline, machine: Machine, storage: Storage) -> float:
    """Return how long the layers before a site take for a token."""
    return table.layers_before * decode_s(outline, machine, 0, storage) if outline.runs else 0.0


def _prompt_window(table: Table, outline: Outline, machine: Machine, storage: Storage) -> float:
    """Return the part of a prefill that rows may take unnoticed: those of a pass are fetched during the one before."""
    seconds = prefill_s(outline, machine, PROMPT_TOKENS, storage) if outline.runs else None
    passes = math.ceil(PROMPT_TOKENS / machine.chunk)
    return 0.0 if seconds is None else seconds * (passes - 1 + table.layers_before) / passes


def _prices(prices: Prices, rates: Rates | None) -> Mapping[str, float]:
    if rates is None or not prices.known:
        return {}
    depth = min(rates.decode, key=lambda each: abs(each - TYPICAL_DEPTH))
    found = {"generated": rates.decode[depth], "of prompts": rates.prefill}
    return {words: prices.per_million(rate) for words, rate in found.items() if rate}


def fits(plan: Plan) -> bool:
    """Whether the model, or what of it can be exported, has its place there."""
    return plan.verdict.kind in (FITS, FROM_DISK, TABLES_ONLY)
