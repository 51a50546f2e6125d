"""The thread pool of compiled libraries: every task once, errors handed on, nested and concurrent launches, fork."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tests.workshop import Workshop, bundle_logits, random_ids

from engram_compilers.kernels import loops, portable
from engram_compilers.linking import link
from engram_runtime import LLM
from engram_runtime.cpu import available_cores, machine
from engram_runtime.errors import CompileError
from engram_runtime.executor import load_executor

NATIVE = f"{machine()}-linux-gnu"
EXTENT, COUNTS = 1000, (1, 2, 3, 4)

# count(cells, n, extent) adds 1 to every cell n times, each time by a launch of its own; nested(outer, inner) launches
# from within a task. lambda_of is what the compiler makes of a parallel loop: it takes the num_task-th part of it.
LAUNCHES = """
#include <stdint.h>
#include <tvm/ffi/c_api.h>

typedef struct { void *sync_handle; int32_t num_task; } Env;
typedef int (*Lambda)(int task, Env *env, void *closure);
extern int (*__TVMBackendParallelLaunch)(Lambda lambda, void *closure, int num_task);

typedef struct { int32_t *cells; int32_t extent; int32_t failing; } Loop;

static int add_one(int task, Env *env, void *closure) {
  Loop *loop = closure;
  int32_t stride = (loop->extent + env->num_task - 1) / env->num_task;
  for (int32_t i = task * stride; i < (task + 1) * stride && i < loop->extent; ++i) {
    if (i == loop->failing) {
      TVMFFIErrorSetRaisedFromCStr("ValueError", "cell refused");
      return -1;
    }
    ++loop->cells[i];
  }
  return 0;
}

int launches(int32_t *cells, int32_t extent, int32_t failing, int32_t times) {
  Loop loop = {cells, extent, failing};
  int status = 0;
  for (int32_t i = 0; i < times; ++i) status |= __TVMBackendParallelLaunch(add_one, &loop, 0);
  return status;
}

int __tvm_ffi_fail(void *handle, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  int32_t cells[1000] = {0};
  return launches(cells, 1000, (int32_t)args[0].v_int64, 1);
}

static int add_row(int task, Env *env, void *closure) {
  Loop *loop = closure;
  int32_t stride = (loop->extent + env->num_task - 1) / env->num_task;
  int status = 0;
  for (int32_t i = task * stride; i < (task + 1) * stride && i < loop->extent; ++i)
    status |= launches(loop->cells + i * loop->extent, loop->extent, -1, 1);
  return status;
}

int nested(int32_t *cells, int32_t extent) {
  Loop loop = {cells, extent, -1};
  return __TVMBackendParallelLaunch(add_row, &loop, 0);
}
"""


class Library:
    """A library of loops written in C, linked as compiled ones are."""

    def __init__(self, path: Path) -> None:
        module = tvm_ffi.load_module(str(path))
        self.use_threads, self.fail = module["use_threads"], module["fail"]
        self.path, self.c = path, ctypes.CDLL(str(path))

    def count(self, times: int, extent: int = EXTENT) -> NDArray[np.int32]:
        """Return how often each cell was visited in as many launches."""
        cells = np.zeros(extent, np.int32)
        assert self.c.launches(cells.ctypes.data_as(ctypes.c_void_p), extent, -1, times) == 0
        return cells

    def count_nested(self, extent: int) -> NDArray[np.int32]:
        """Return how often each cell was visited by launches from within the tasks of one."""
        cells = np.zeros((extent, extent), np.int32)
        assert self.c.nested(cells.ctypes.data_as(ctypes.c_void_p), extent) == 0
        return cells


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A library that is linked and opened once."""
    folder = tmp_path_factory.mktemp("pool")
    source = folder / "launches.c"
    source.write_text(LAUNCHES)
    link(str(folder / "model.so"), [str(source)], mtriple=NATIVE)
    return Library(folder / "model.so")


def visits(cells: NDArray[np.int32]) -> tuple[int, int]:
    return int(cells.min()), int(cells.max())


@pytest.mark.parametrize("threads", COUNTS)
def test_every_launch_runs_the_whole_loop_once(library: Library, threads: int) -> None:
    library.use_threads(threads)
    assert visits(library.count(20_000)) == (20_000, 20_000)


@pytest.mark.parametrize("extent", [1, 2, 7, 16, 17])
def test_loops_shorter_than_there_are_tasks(library: Library, extent: int) -> None:
    library.use_threads(3)
    assert visits(library.count(500, extent)) == (500, 500)


def test_the_number_of_threads_may_change_between_launches(library: Library) -> None:
    found = []
    for step in range(200):
        library.use_threads(COUNTS[step % 4])
        found.append(visits(library.count(5)))
    assert found == [(5, 5)] * 200


def test_workers_that_sleep_are_woken(library: Library) -> None:
    library.use_threads(3)
    found = []
    for _ in range(20):
        threading.Event().wait(0.002)  # forty times as long as workers spin
        found.append(visits(library.count(1)))
    assert found == [(1, 1)] * 20


@pytest.mark.parametrize("threads", COUNTS)
@pytest.mark.parametrize("cell", [0, 500, 999])
def test_an_error_of_any_task_reaches_the_caller(library: Library, threads: int, cell: int) -> None:
    library.use_threads(threads)
    for _ in range(50):  # whoever claims the task
        with pytest.raises(ValueError, match=r"^cell refused$"):
            library.fail(cell)
    assert visits(library.count(10)) == (10, 10)


@pytest.mark.parametrize("threads", COUNTS)
def test_a_launch_from_within_a_task_runs_there(library: Library, threads: int) -> None:
    library.use_threads(threads)
    assert visits(library.count_nested(100)) == (1, 1)


def in_threads(work: Callable[[], Any], count: int) -> list[Any]:
    """Return what ``work`` gives in each of several Python threads at once."""
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(work())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_callers_at_once_do_not_disturb_each_other(library: Library) -> None:
    """ctypes lets go of the interpreter's lock, so they do run at once."""
    library.use_threads(3)
    assert in_threads(lambda: visits(library.count(5_000)), 4) == [(5_000, 5_000)] * 4


def fork(work: Callable[[], bool]) -> int:
    """Return the exit code of a forked child: 0 if ``work`` is true there."""
    child = os.fork()
    if child == 0:
        os._exit(not work())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_a_forked_child_can_launch(library: Library, threads: int | None) -> None:
    library.use_threads(3)
    library.count(10)

    def work() -> bool:
        if threads is not None:
            library.use_threads(threads)
        return visits(library.count(1000)) == (1000, 1000)

    assert fork(work) == 0
    assert visits(library.count(1000)) == (1000, 1000)


CLOSING = """
import sys, tvm_ffi
for _ in range(20):
    module = tvm_ffi.load_module(sys.argv[1], keep_module_alive=False)
    module["use_threads"](4)
    del module
    assert sys.argv[1] not in open("/proc/self/maps").read()
tvm_ffi.load_module(sys.argv[1])["use_threads"](3)
"""


def test_closing_a_library_ends_its_threads(library: Library) -> None:
    """A worker left behind would run code that is no longer there."""
    subprocess.run([sys.executable, "-c", CLOSING, str(library.path)], check=True)


def test_an_llm_runs_in_any_thread(workshop: Workshop) -> None:
    """On the library whose kernels are all parallel; one thread after another uses the sequence another one began."""
    bundle, token_ids = workshop.ready(), random_ids(12)
    expected = bundle_logits(bundle, token_ids, "tvm", threads=1)
    with LLM(bundle.path, threads=2) as llm:
        found = [in_threads(partial(llm.session.decode, [token_id]), 1)[0] for token_id in token_ids]
    assert np.array_equal(np.concatenate(found), expected)


def test_llms_of_one_library_run_at_once_in_two_threads(workshop: Workshop) -> None:
    bundle, token_ids = workshop.ready(), random_ids(12)
    expected = bundle_logits(bundle, token_ids, "tvm", threads=1)

    def logits() -> NDArray[np.float32]:
        with LLM(bundle.path, threads=2) as llm:
            return np.concatenate([llm.session.decode([token_id]) for token_id in token_ids * 1])

    assert [np.array_equal(found, expected) for found in in_threads(logits, 3)] == [True] * 3


@pytest.mark.parametrize(("asked", "used"), [(None, 3), (1, 1)])
def test_threads_are_those_asked_for_else_the_profiles(workshop: Workshop, asked: int | None, used: int) -> None:
    bundle = workshop.compiled(workshop.uncompiled(), threads=3)
    assert load_executor("tvm", bundle, threads=asked).threads == used


def test_threads_are_one_per_core_where_the_profile_says_auto(workshop: Workshop) -> None:
    assert load_executor("tvm", workshop.ready(), threads=None).threads == available_cores()


@pytest.mark.slow
def test_a_library_for_another_architecture_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler of the package ziglang, with a parallel loop that launches."""
    monkeypatch.setattr(loops, "PARALLEL_FROM_US", 0.0)
    mtriple = "aarch64-linux-gnu"
    target = tvm.target.Target({"kind": "llvm", "mtriple": mtriple, "mcpu": "cortex-a76"})
    kernel = portable.linear_int8(1, 64, 64, 2).with_attr("global_symbol", "linear")
    compiled = tvm.compile(tvm.IRModule({"linear": kernel}), target)
    path = tmp_path / "model.so"
    compiled.export_library(str(path), fcompile=partial(link, mtriple=mtriple))
    content = path.read_bytes()
    assert (content[:4], content[18]) == (b"\x7fELF", 183)  # EM_AARCH64
    assert [name in content for name in (b"__tvm_ffi_use_threads", b"__tvm_ffi_linear")] == [True] * 2


def test_a_triple_no_compiler_links_for_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CompileError) as caught:
        link(str(tmp_path / "model.so"), [], mtriple="s390x-linux-gnu")
    assert (
        str(caught.value)
        == "no C compiler to link with for s390x-linux-gnu: install gcc or clang, or pip install ziglang"
    )
