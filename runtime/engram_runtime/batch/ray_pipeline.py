"""A batch on several machines, as a pipeline of Ray Data."""

import asyncio
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engram_runtime.batch.answering import OpenResponder, Respond, answer_lines
from engram_runtime.batch.lines import LineIndex, lines_at
from engram_runtime.batch.request import MAX_LINE_BYTES
from engram_runtime.batch.result import Result
from engram_runtime.batch.results import Put
from engram_runtime.errors import EngramError, TargetError

try:
    import pyarrow
    import ray
    import ray.data
    from ray.exceptions import RayError
except ModuleNotFoundError as error:
    raise TargetError(f"batches on Ray need {error.name}: pip install 'engram-edge[ray,serve]'") from error

Columns = dict[str, Any]  # of a block, by name

LOCAL_STORE_BYTES = 80 << 20  # places of lines and answers pass through it, no weights; Ray takes no less
ROUNDS_OF_A_BLOCK = 4  # its answers are written together, and a worker has less and less to do towards its end
MOST_BLOCKS = 4096  # each takes some milliseconds before the first line is answered
OWN_ERROR = re.compile(rf"^{re.escape(EngramError.__module__)}\.\w+: (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where a batch is to run.

    Attributes:
        address: as Ray takes it, None for a cluster of this machine alone that ends with the batch.
        workers: how many hold the bundle, None for as many as there are cores for.
        threads: of each, and cores that are its own.
    """

    address: str | None
    workers: int | None
    threads: int


class Worker:
    """A bundle in a process of its own, which ends without closing it."""

    def __init__(self, open_responder: OpenResponder, path: Path, at_once: int) -> None:
        self._open = open_responder
        self._path = path
        self._at_once = at_once
        self._opened = ExitStack()

    @cached_property
    def _respond(self) -> Respond:
        """Loaded with the first block: Ray tells of what fails before in screens of stderr."""
        return self._opened.enter_context(self._open())

    def __call__(self, block: Columns) -> Columns:
        """Answer the lines at some places."""
        results: list[Result] = []
        lines = lines_at(self._path, block["number"].tolist(), block["start"].tolist(), MAX_LINE_BYTES)
        asyncio.run(answer_lines(lines, self._respond, results.append, at_once=self._at_once))
        rows = [asdict(result) for result in results]
        return {name: [row[name] for row in rows] for name in rows[0]}


def answer_on_ray(
    pending: LineIndex,
    put: Put,
    *,
    open_responder: OpenResponder,
    at_once: int,
    cluster: Cluster,
) -> None:
    """Answer lines on several workers, ``at_once`` on each, and put the answers as they come.

    Args:
        pending: of a file that every machine has at the same place, as it has the bundle.

    Raises:
        TargetError: there is no such cluster, it is too small, or a worker has failed.
    """
    try:
        with _joined(cluster) as workers:
            blocks = _blocks(pending, at_once, workers)
            answers = ray.data.from_arrow(blocks).map_batches(
                Worker,
                fn_constructor_args=(open_responder, pending.path.absolute(), at_once),
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks))),
                batch_size=None,
                num_cpus=cluster.threads,
            )
            for row in answers.iter_rows():
                put(Result(**row))
    except (ConnectionError, RayError) as error:
        raise TargetError(f"the batch on Ray can't go on: {_reason(error)}") from error


def _blocks(pending: LineIndex, at_once: int, workers: int) -> list[Any]:
    wanted = min(MOST_BLOCKS, -(-len(pending) // (ROUNDS_OF_A_BLOCK * at_once)))
    count = min(len(pending), max(workers, wanted))
    places = zip(np.array_split(pending.numbers, count), np.array_split(pending.starts, count), strict=True)
    return [pyarrow.table({"number": numbers, "start": starts}) for numbers, starts in places]


@contextmanager
def _joined(cluster: Cluster) -> Iterator[int]:
    """Be part of a cluster; yields how many workers there are to be."""
    where = _own_cluster(cluster) if cluster.address is None else {"address": cluster.address}
    try:
        ray.init(**where, logging_level=logging.CRITICAL, log_to_driver=False)
    except (ValueError, RuntimeError) as error:  # of an address that is none, or where nobody answers
        raise TargetError(f"the batch on Ray can't begin: {_reason(error)}") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield _workers(cluster, int(ray.cluster_resources().get("CPU", 0)))
    finally:
        ray.shutdown()


def _own_cluster(cluster: Cluster) -> dict[str, Any]:
    """Return how Ray is to make a cluster of this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else Ray reports to its makers
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"  # it calls an error what Ray Data does with every actor
    cores = {} if cluster.workers is None else {"num_cpus": cluster.workers * cluster.threads}
    return {"object_store_memory": LOCAL_STORE_BYTES, "include_dashboard": False, **cores}


def _workers(cluster: Cluster, cores: int) -> int:
    most = cores // cluster.threads
    wanted = cluster.workers or max(most, 1)
    if wanted > most:
        raise TargetError(
            f"the Ray cluster has {cores} cores, {wanted} workers of {cluster.threads} threads take "
            f"{wanted * cluster.threads}; give fewer --workers or --threads"
        )
    return wanted


def _reason(error: Exception) -> str:
    """Return what an error of ours said on a worker, of which Ray keeps the text, else what Ray says."""
    *_, last = ["", *OWN_ERROR.findall(str(error))]
    return last or str(error).partition("\n")[0]
