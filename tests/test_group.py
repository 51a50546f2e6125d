"""Sequences of a group have the bits of sessions that are alone, share memory, and leave one another in peace."""

import contextlib
import dataclasses
import errno
import itertools
import mmap
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.test_compile import assert_same_bits
from tests.tiny import CONTEXT, VOCAB, TinyModel
from tests.tiny_families import FAMILIES
from tests.tiny_gemma import save_gemma
from tests.workshop import THREADS, Workshop, open_session, random_ids

from engram_runtime.bundle import Bundle
from engram_runtime.cpu import cpu_flags
from engram_runtime.errors import RequestError
from engram_runtime.executor import allocate_states
from engram_runtime.executors.tvm_batch import batch_sizes
from engram_runtime.manifest import StateSpec
from engram_runtime.memory import FreeMemory
from engram_runtime.parallel import group as groups
from engram_runtime.parallel.group import Group, require_memory
from engram_runtime.parallel.shared_states import SharedStates
from engram_runtime.session import Session

NATIVE = "avx512_vnni" if "avx512_vnni" in cpu_flags() else "portable"
PROMPT = 21
COUNT = 7  # batches of 4 and 3, the latter on the function for 4
EXECUTORS = ["tvm", "onnxruntime"]
# A session that steps back computes several tokens at once, which changes no bit of tvm's logits, but onnxruntime's.
STEP_BACK_TOLERANCE = {"tvm": 0.0, "onnxruntime": 0.1}


def family(name: str) -> Callable[[Workshop, Path], Bundle]:
    def make(workshop: Workshop, folder: Path) -> Bundle:
        bundle = workshop.bundle(workshop.family(FAMILIES[name][0]), quant="int8")
        return workshop.compiled(bundle, NATIVE)

    return make


def gemma(workshop: Workshop, folder: Path) -> Bundle:
    """Return layers that attend over the caches of others, and per-layer inputs."""
    return workshop.compiled(workshop.bundle(save_gemma(folder / "gemma3n", "gemma3n")), NATIVE)


def narrow(workshop: Workshop, folder: Path) -> Bundle:
    bundle = workshop.bundle(workshop.checkpoint(TinyModel(family="qwen3", head_dim=32)))
    return workshop.compiled(bundle, NATIVE, cache_dtype="float16")


BUNDLES: dict[str, Callable[[Workshop, Path], Bundle]] = {
    "int8-window": lambda workshop, folder: workshop.ready(),
    "float16-cache": narrow,
    "gemma3n": gemma,
    **{name: family(name) for name in ("mixtral", "qwen3_5_moe", "qwen4_exp")},
}

POSITIONAL = ("float16-cache", "gemma3n")  # without windows and recurrent states
QUICK = ("int8-window", "qwen4_exp")  # of the default run: windows, caches, blocks of keys, recurrent states, experts


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in QUICK)) for name in BUNDLES],
)
def bundle(request: pytest.FixtureRequest, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return BUNDLES[request.param](workshop, tmp_path_factory.mktemp(request.param))


@pytest.fixture(
    scope="module",
    params=["positional", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in POSITIONAL)],
)
def positional(request: pytest.FixtureRequest, workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle all of whose states roll back."""
    if request.param == "positional":
        return workshop.positional()
    return BUNDLES[request.param](workshop, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let the process open few files more than it has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 64, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(params=EXECUTORS)
def session(request: pytest.FixtureRequest, workshop: Workshop) -> Iterator[Session]:
    with open_session(workshop.ready(), request.param) as session:
        session.prefill(random_ids(PROMPT))
        yield session


def tokens(count: int, seed: int) -> list[int]:
    return random_ids(count, seed)


def alone(bundle: Bundle, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Return the logits ``[B, V]`` after texts of a session that takes what comes after the prompt token by token."""
    logits = []
    with open_session(bundle, "tvm", threads=1) as session:
        for text in texts:
            session.trim(len(session))
            session.prefill(text[:PROMPT])
            logits.append([session.decode([token_id])[-1] for token_id in text[PROMPT:]][-1])
    return np.stack(logits)


def texts_of(group: Group) -> list[Sequence[int]]:
    return [group.token_ids(index) for index in range(len(group))]


@pytest.mark.parametrize("threads", [1, THREADS])
def test_each_sequence_has_the_bits_of_a_session_that_is_alone(bundle: Bundle, threads: int) -> None:
    with open_session(bundle, "tvm", threads=threads) as session:
        session.prefill(random_ids(PROMPT))
        with Group(session, COUNT) as group:
            for seed in range(2):
                logits = group.step(tokens(COUNT, seed))
            assert_same_bits(logits, alone(bundle, texts_of(group)))
            group.keep([6, 1, 1])
            for seed in range(2):
                logits = group.step(tokens(3, seed + 10))
            assert_same_bits(logits, alone(bundle, texts_of(group)))
            assert_same_bits(session.decode([5]), alone(bundle, [[*random_ids(PROMPT), 5]]))


@pytest.mark.exhaustive
def test_every_step_of_every_sequence_has_the_bits_of_its_session(bundle: Bundle) -> None:
    steps = [tokens(3, seed) for seed in range(70)]  # past the first block of 64 keys
    with open_session(bundle, "tvm") as session, open_session(bundle, "tvm", threads=1) as lonely:
        session.prefill(random_ids(PROMPT))
        with Group(session, 3) as group:
            found = np.stack([group.step(token_ids) for token_ids in steps])  # [steps, 3, V]
        for index in range(3):
            lonely.trim(len(lonely))
            lonely.prefill(random_ids(PROMPT))
            expected = [lonely.decode([token_ids[index]])[-1] for token_ids in steps]
            assert_same_bits(found[:, index], np.stack(expected))


def test_a_group_on_any_executor_has_the_logits_of_its_sequences(session: Session) -> None:
    with Group(session, 3) as group:
        group.step([1, 2, 3])
        found = group.step([4, 5, 6])
    prompt = random_ids(PROMPT)
    for index, continuation in enumerate(([1, 4], [2, 5], [3, 6])):
        session.trim(len(session))
        session.prefill(prompt)
        assert_same_bits(found[index], [session.decode([token_id])[-1] for token_id in continuation][-1])


def test_a_session_that_goes_on_does_not_disturb_its_group(session: Session) -> None:
    with Group(session, 2) as group, Group(session, 2) as undisturbed:
        group.step([1, 2])
        undisturbed.step([1, 2])
        session.decode(tokens(9, 3))
        session.trim(len(session))
        session.prefill(tokens(30, 4))
        found = group.step([3, 4])
        assert_same_bits(found, undisturbed.step([3, 4]))


def test_a_group_does_not_disturb_its_session(session: Session) -> None:
    tolerance = STEP_BACK_TOLERANCE[session.executor.name]
    expected = session.decode([9])
    session.trim(1)
    with Group(session, 4) as group:
        for seed in range(5):
            group.step(tokens(4, seed))
        assert session.token_ids == random_ids(PROMPT)
        np.testing.assert_allclose(session.decode([9]), expected, rtol=0, atol=tolerance)
    session.trim(1)
    np.testing.assert_allclose(session.decode([9]), expected, rtol=0, atol=tolerance)


def test_sequences_can_be_forked_dropped_and_reordered(session: Session) -> None:
    with Group(session, 3) as group, Group(session, 5) as plain:
        group.step([1, 2, 3])
        group.keep([2, 0, 2, 2])
        group.step([4, 5, 6, 7])
        group.keep([3, 1, 1, 0, 0])
        found = group.step([8, 9, 10, 11, 12])
        for step in zip([3, 7, 8], [1, 5, 9], [1, 5, 10], [3, 4, 11], [3, 4, 12], strict=True):
            expected = plain.step(step)
        assert [list(group.token_ids(i)[PROMPT:]) for i in range(5)] == [
            [3, 7, 8],
            [1, 5, 9],
            [1, 5, 10],
            [3, 4, 11],
            [3, 4, 12],
        ]
        assert_same_bits(found, expected)


def test_a_group_of_a_session_with_tables_off_reads_none(workshop: Workshop) -> None:
    with open_session(workshop.ready(), "tvm", tables_on=False) as session:
        session.prefill(random_ids(PROMPT))
        with Group(session, 2) as group:
            found = group.step([1, 2])
        assert_same_bits(found[:1], session.decode([1]))
        assert session.counters["layer_1"].rows == 0


def test_a_row_that_several_sequences_read_is_asked_for_once(session: Session) -> None:
    before = session.counters["layer_1"]
    with Group(session, COUNT) as group:
        group.step([7] * COUNT)
        same = session.counters["layer_1"] - before
        group.step(range(COUNT))
        others = session.counters["layer_1"] - before - same
    columns = same.rows // COUNT
    assert same.unique == columns
    assert others.unique > columns


@pytest.mark.parametrize("threads", [1, THREADS])
def test_blocks_of_tokens_have_the_bits_of_sessions_that_take_them_one_by_one(positional: Bundle, threads: int) -> None:
    with open_session(positional, "tvm", threads=threads) as session:
        session.prefill(random_ids(PROMPT))
        with Group(session, 3) as group:
            for seed, sizes in enumerate([(1, 1, 1), (6, 1, 3), (1, 2, 1), (2, 5, 9), (30, 33, 1)]):
                texts = [list(text) for text in texts_of(group)]
                blocks = [tokens(size, 10 * seed + index) for index, size in enumerate(sizes)]
                wrong = [tokens(size, 10 * seed + index + 5) for index, size in enumerate(sizes)]
                group.extend(wrong)
                group.trim(sizes)
                assert [list(text) for text in texts_of(group)] == texts
                found = group.extend(blocks)
                for text, block, logits in zip(texts, blocks, found, strict=True):
                    ends = range(1, len(block) + 1)
                    assert_same_bits(logits, alone(positional, [[*text, *block[:end]] for end in ends]))
            group.trim([3, 0, 1])
            group.keep([2, 0, 0, 1])
            logits = group.step(tokens(4, 7))
            assert_same_bits(logits, alone(positional, texts_of(group)))


def test_rows_that_a_pass_has_to_spare_are_told(positional: Bundle) -> None:
    with open_session(positional, "tvm") as session, Group(session, 9) as group:
        spare = []
        while len(group):
            spare.append(group.spare)
            group.keep(range(len(group) - 1))
    assert spare == [0, 0, 1, 0, 0, 0, 1, 0, 0]  # on functions of 1, 2 and 4 rows


def test_states_that_can_not_step_back_take_one_token_at_a_time(session: Session) -> None:
    with Group(session, 3) as group:
        assert group.spare == 0
        with pytest.raises(RequestError) as caught:
            group.extend([[1], [2, 3], [4]])
        assert str(caught.value) == (
            "2 tokens were given to a sequence, expected one, as not all of its states roll back"
        )
        group.step([1, 2, 3])
        with pytest.raises(RequestError) as caught:
            group.trim([0, 1, 0])
    assert str(caught.value) == "can't trim [0, 1, 0] tokens of sequences that can forget up to [0, 0, 0]"


def test_tokens_of_the_session_are_not_trimmed(positional: Bundle) -> None:
    with open_session(positional, "tvm") as session:
        session.prefill(random_ids(PROMPT))
        with Group(session, 2) as group:
            with pytest.raises(RequestError, match="0 tokens were given to a sequence, expected at least one"):
                group.extend([[1], []])
            group.extend([[1, 2], [3]])
            for counts in ([2, 2], [-1, 0], [0]):
                with pytest.raises(RequestError) as caught:
                    group.trim(counts)
                assert str(caught.value) == f"can't trim {counts} tokens of sequences that can forget up to [2, 1]"
            assert [list(text[PROMPT:]) for text in texts_of(group)] == [[1, 2], [3]]


def test_many_sequences_need_no_file_each(positional: Bundle, few_files: None) -> None:
    with open_session(positional, "tvm") as session:
        session.prefill(random_ids(PROMPT))
        with Group(session, 200) as group:
            logits = group.step([5] * 200)
            assert_same_bits(logits, np.repeat(session.decode([5]), 200, axis=0))


def test_wrong_tokens_are_refused_and_change_nothing(session: Session) -> None:
    with Group(session, 2) as group, Group(session, 2) as plain:
        with pytest.raises(RequestError, match=re.escape("tokens were given for 1 sequences, there are 2")):
            group.step([1])
        with pytest.raises(RequestError, match=f"token id {VOCAB} is outside the vocabulary of {VOCAB}"):
            group.step([1, VOCAB])
        assert_same_bits(group.step([1, 2]), plain.step([1, 2]))


@pytest.mark.parametrize("index", [-1, 2])
def test_a_sequence_that_is_not_there_can_not_be_kept(session: Session, index: int) -> None:
    with Group(session, 2) as group, Group(session, 2) as plain:
        with pytest.raises(RequestError) as caught:
            group.keep([0, index])
        assert str(caught.value) == f"there is no sequence {index} to keep among 2, which count from 0"
        assert_same_bits(group.step([1, 2]), plain.step([1, 2]))


def test_a_group_that_is_closed_again_closes_no_file_of_others(session: Session, tmp_path: Path) -> None:
    group = Group(session, 2)
    group.close()
    with contextlib.ExitStack() as opened:
        # More of them than the group had, so one has the number of its file.
        others = [opened.enter_context((tmp_path / "other").open("w")) for _ in range(16)]
        group.close()
        assert [os.fstat(other.fileno()).st_size for other in others] == [0] * 16


def test_a_group_needs_memory_for_the_positions_it_adds_and_all_of_the_other_states(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [(spec.rolls_back, session.states[spec.name].nbytes) for spec in session.state_specs]
    assert {rolls_back for rolls_back, _ in states} == {True, False}
    needed = 3 * sum(num_bytes * 5 // CONTEXT if rolls_back else num_bytes for rolls_back, num_bytes in states)
    monkeypatch.setattr(groups, "free_memory", lambda: FreeMemory(num_bytes=needed))
    require_memory(session, 3, 5)
    monkeypatch.setattr(groups, "free_memory", lambda: FreeMemory(num_bytes=needed - 1))
    with pytest.raises(RequestError, match="the states of 3 sequences of 5 tokens need "):
        require_memory(session, 3, 5)


def test_a_full_context_takes_no_more_tokens(session: Session) -> None:
    session.prefill(random_ids(CONTEXT - 1 - PROMPT, seed=5))
    with Group(session, 2) as group:
        assert group.room == 1
        group.step([1, 2])
        assert group.room == 0
        with pytest.raises(RequestError, match=f"a sequence fills the context of {CONTEXT}; keep the others"):
            group.step([1, 2])


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (8, [8]), (9, [8, 1]), (23, [8, 8, 7])])
def test_sequences_are_split_into_as_few_batches_as_hold_them(count: int, sizes: list[int]) -> None:
    assert batch_sizes(count, 8) == sizes


def physical_bytes() -> int:
    """Return the memory of this process, a page that it maps several times once."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Pss:"))
    return int(line.split()[1]) << 10


def test_forks_take_memory_for_what_they_change_alone() -> None:
    size, page = 4 << 20, os.sysconf("SC_PAGESIZE")
    specs = [StateSpec(name=f"key.{i}", dtype="float32", shape=(1, 2, 8192, 64), kind="positional") for i in range(2)]
    states = allocate_states(specs)
    for state in states.values():
        state[...] = 1
    before = physical_bytes()
    shared = SharedStates(specs, states, 8192)
    forks = [shared.fork() for _ in range(8)]
    assert [float(state.sum()) for fork in forks for state in fork.values()] == [float(size // 4)] * 16
    assert physical_bytes() - before < size // 4
    for fork in forks:
        fork["key.0"][0, 0, 0] = 2
    assert physical_bytes() - before < size // 4 + 8 * page
    assert [float(fork["key.0"][0, 0, 0, 0]) for fork in forks] == [2.0] * 8
    assert (float(states["key.0"][0, 0, 0, 0]), float(forks[0]["key.1"][0, 0, 0, 0])) == (1.0, 1.0)
    shared.close()


def test_only_the_positions_in_use_are_copied() -> None:
    spec = StateSpec(name="key.0", dtype="float32", shape=(1, 2, 32, 4), kind="positional")
    window = dataclasses.replace(spec, name="window", shape=(3, 4), kind="window")
    states = allocate_states([spec, window])
    for state in states.values():
        state[...] = 7
    shared = SharedStates([spec, window], states, 5)
    fork = shared.fork()
    shared.close()
    assert fork["key.0"][0, 0, :, 0].tolist() == [7.0] * 5 + [0.0] * 27
    assert fork["window"].tolist() == [[7.0] * 4] * 3


def test_more_sequences_than_the_system_maps_are_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    made = itertools.count()
    original = mmap.mmap

    def few(*arguments: Any, **options: Any) -> mmap.mmap:
        if next(made) > 4:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return original(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", few)
    with pytest.raises(RequestError) as caught:
        Group(session, 9)
    assert str(caught.value) == "no memory for one more sequence: Cannot allocate memory; ask for fewer"
