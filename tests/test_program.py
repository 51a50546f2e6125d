"""Straight-line programs compute the bits of the compiled library, in scratch memory that is used again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.program_runner import Interpreter, Passes, ProgramExecutor, lower_bundle
from tests.test_compile import assert_same_bits
from tests.tiny_families import FAMILIES
from tests.tiny_gemma import save_gemma
from tests.workshop import Workshop, bundle_logits, random_ids

from engram_compilers.scratch_plan import Lifetime, plan_scratch
from engram_runtime.bundle import Bundle
from engram_runtime.executor import Executor, allocate_states
from engram_runtime.session import Session, close_sites, open_sites

TOKENS = 9
PASSES: Passes = [(1, 1), (4, 4), (4, 1)]  # a text is 4 + 4 + 1 tokens


def llama(workshop: Workshop) -> Bundle:
    return workshop.uncompiled()


def mixtral(workshop: Workshop) -> Bundle:
    return workshop.bundle(workshop.family(FAMILIES["mixtral"][0]), quant="int4")


def recurrent(workshop: Workshop) -> Bundle:
    return workshop.bundle(workshop.family(FAMILIES["qwen4_exp"][0]), quant="int8")


def gemma(workshop: Workshop) -> Bundle:
    checkpoint = workshop._once("gemma3n of programs", "checkpoint", lambda folder: save_gemma(folder, "gemma3n"))
    return workshop.bundle(checkpoint, quant="int8")


MODELS: dict[str, Callable[[Workshop], Bundle]] = {
    "llama": llama,
    "mixtral": mixtral,
    "recurrent": recurrent,
    "gemma": gemma,
}


EVERY_MODEL = ["llama", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS if name != "llama")]


def library_of(workshop: Workshop, bundle: Bundle) -> Bundle:
    """Return a bundle with a library of the portable kernels for `PASSES`."""
    return workshop.compiled(bundle, decode_tokens=(1,), prefill_tokens=(4,))


def program_logits(bundle: Bundle, executor: Executor, token_ids: list[int]) -> NDArray[np.float32]:
    sites = open_sites(bundle)
    try:
        with Session(bundle, executor, sites) as session:
            return np.concatenate(list(session.logits(token_ids)))
    finally:
        close_sites(sites)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_program_gives_the_bits_of_the_library(workshop: Workshop, name: str, tmp_path: Path) -> None:
    bundle = MODELS[name](workshop)
    executor = ProgramExecutor(bundle, lower_bundle(bundle, tmp_path, PASSES), PASSES)
    ids = random_ids(TOKENS)
    expected = bundle_logits(library_of(workshop, bundle), ids, "tvm")
    assert_same_bits(program_logits(bundle, executor, ids), expected)


@pytest.mark.exhaustive
def test_a_program_of_two_sequences_gives_the_bits_of_each(workshop: Workshop, tmp_path: Path) -> None:
    bundle = llama(workshop)
    lowered = lower_bundle(bundle, tmp_path, [(1, 1)], batches=[2])
    run = Interpreter(lowered).run
    of = lowered.programs.of

    def states() -> dict[str, Any]:
        return allocate_states(bundle.manifest.decoder.states)

    def inputs(*token_ids: int) -> dict[str, NDArray[Any]]:
        count = len(token_ids)
        table = bundle.manifest.tables[0]
        return {
            "token_ids": np.array(token_ids),
            "position": np.zeros(count, dtype=np.int64),
            "logit_rows": np.arange(count),
            f"rows.{table.site}": np.empty((count, table.keyer.columns, table.record.columns), dtype=np.float32),
        }

    def fill(site: int, rows: NDArray[Any]) -> None:
        rows[...] = 0.25

    both = run(of["batch_2"], inputs(5, 200), [states(), states()], fill)[0]
    alone = [run(of["forward_1_1"], inputs(token), [states()], fill)[0] for token in (5, 200)]
    assert_same_bits(both, np.concatenate(alone))


def test_a_chain_of_buffers_takes_the_memory_of_two() -> None:
    offsets, size = plan_scratch(Lifetime(100, call, call + 1) for call in range(5))
    assert (offsets, size) == ([0, 128, 0, 128, 0], 256)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_buffers_that_live_at_once_lie_apart(drawn: list[tuple[int, int, int]]) -> None:
    lifetimes = sorted((Lifetime(size, min(a, b), max(a, b)) for size, a, b in drawn), key=lambda each: each.first)
    offsets, size = plan_scratch(lifetimes)
    placed = list(zip(offsets, lifetimes, strict=True))
    assert all(offset % 64 == 0 and offset + buffer.bytes <= size for offset, buffer in placed)
    assert not [
        (a, b)
        for i, (at, a) in enumerate(placed)
        for to, b in placed[:i]
        if a.first <= b.last and b.first <= a.last and at < to + b.bytes and to < at + a.bytes
    ]
