"""Decode with a large table: on disk within a tenth of its memory, held in memory, and without the site at all.

    python benchmarks/big_table.py build/site --gib 6 --smollm2
    engram-export SMOLLM2.gguf -o build/big.engram --engram build/site --tables reference
    engram-export SMOLLM2.gguf -o build/plain.engram
    engram compile build/big.engram && engram compile build/plain.engram
    python benchmarks/table_decode.py build/big.engram build/plain.engram

Three processes take turns. Each decodes the same random tokens one by one, other ones in every round, so that rows have
not been read before; whether logits are equal bit by bit is checked.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from engram_runtime import Bundle, Session
from engram_runtime.bench.cgroup import memory_group
from engram_runtime.bench.process import Worker
from engram_runtime.bench.rounds import SETTLE_S
from engram_runtime.bench.tables_cache import cached_share, evict, fill
from engram_runtime.bench.tables_worker import serve
from engram_runtime.executor import load_executor
from engram_runtime.tables.options import MMAP, RESIDENT, TABLE_IO, TableOptions

CAPPED, IN_MEMORY, PLAIN = "table on disk, capped", "table in memory", "without the site"
CAP_SHARE = 10
PROMPT = 16
SMAPS = Path("/proc/self/smaps")

Answer = dict[str, Any]


class Decoding:
    """A session in a process of its own."""

    def __init__(self) -> None:
        self._session: Session | None = None

    def __call__(self, do: str, **details: Any) -> Answer:
        """Answer a request: load, fill, decode or memory."""
        if do == "load":
            return self.load(**details)
        answers: dict[str, Callable[..., Answer]] = {"fill": self.fill, "decode": self.decode, "memory": self.memory}
        return answers[do](**details)

    def load(self, model: str, executor: str, io: str) -> Answer:
        """Open a bundle."""
        self._bundle = Bundle.open(Path(model))
        self._executor = load_executor(executor, self._bundle, threads=None)
        self._session = Session.open(self._bundle, self._executor, options=TableOptions(io=io))
        return {"threads": self._executor.threads}

    def fill(self, path: str, num_bytes: int) -> Answer:
        """Fill the cap with pages of the table."""
        fill(Path(path), num_bytes)
        return {}

    def decode(self, seed: int, tokens: int) -> Answer:
        """Decode random tokens one by one after a short prompt; returns seconds and a digest of all logits."""
        session = self._session
        assert session is not None
        session.trim(len(session))
        vocabulary = self._bundle.manifest.model.vocab_size
        ids: list[int] = np.random.default_rng(seed).integers(0, vocabulary, size=PROMPT + tokens).tolist()
        session.prefill(ids[:PROMPT])
        waited, logits, started = self.waited(), [], time.perf_counter()
        for token_id in ids[PROMPT:]:
            logits.append(session.decode([token_id]))
        seconds = time.perf_counter() - started
        digest = hashlib.sha256(np.concatenate(logits).tobytes()).hexdigest()
        return {"seconds": seconds, "waited": self.waited() - waited, "digest": digest}

    def waited(self) -> float:
        """Return the seconds that rows were waited for so far."""
        assert self._session is not None
        return sum(counters.wait_s for counters in self._session.counters.values())

    def memory(self) -> Answer:
        """Return resident MB by what they hold."""
        tables = {str(path.resolve()) for path in table_files(self._bundle)}
        sizes = resident_bytes(SMAPS.read_text(), tables, str(self._bundle.path.resolve()))
        states = self.state_bytes()
        sizes = {**sizes, "states": states, "anonymous": sizes["anonymous"] - states}
        return {name: round(size / 1e6, 1) for name, size in sizes.items()}

    def state_bytes(self) -> int:
        """Return the bytes of the pages of the caches that the sequence has touched."""
        assert self._session is not None
        total = 0
        for spec in self._bundle.manifest.decoder.states:
            positions = len(self._session) if spec.rolls_back else spec.shape[-2]
            item = 2 if spec.name in self._executor.float16_states else 4
            pages = -(-positions * spec.shape[-1] * item // mmap.PAGESIZE)
            total += math.prod(spec.shape[:-2]) * pages * mmap.PAGESIZE
        return total


def table_files(bundle: Bundle) -> set[Path]:
    """Return the files that hold rows."""
    return {bundle.table_path(rows) for table in bundle.manifest.tables for rows in table.ranges}


def kind_of(path: str, tables: set[str], bundle: str) -> str:
    """Say what a mapped file holds."""
    if path in tables:
        return "table"
    return "weights" if path.startswith(f"{bundle}/") and not path.endswith(".so") else "code"


def resident_bytes(smaps: str, tables: set[str], bundle: str) -> dict[str, int]:
    """Sum the resident bytes of a process: its own, and those of table files, of weights and of other files."""
    sizes = dict.fromkeys(("anonymous", "table", "weights", "code"), 0)
    kind = "code"
    for line in smaps.splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):  # a map begins: addresses, rights, offset, device, inode, path
            kind = kind_of("".join(rest.split(maxsplit=4)[4:]), tables, bundle)
        elif head == "Rss:":
            sizes[kind] += 1024 * int(rest.split()[0])
        elif head == "Anonymous:":
            own = 1024 * int(rest.split()[0])
            sizes["anonymous"] += own
            sizes[kind] -= own
    return sizes


@contextlib.contextmanager
def contestants(big: Path, plain: Path, executor: str, io: str, cap: int) -> Iterator[dict[str, Worker]]:
    """Start and load the three processes."""
    line = (sys.executable, __file__, "--serve")
    with contextlib.ExitStack() as opened:
        group = opened.enter_context(memory_group(str(os.getpid()), cap))
        workers = {
            name: opened.enter_context(Worker(name, command))
            for name, command in ((CAPPED, group.command(line)), (IN_MEMORY, line), (PLAIN, line))
        }
        workers[CAPPED].ask("load", model=str(big), executor=executor, io=io)
        workers[IN_MEMORY].ask("load", model=str(big), executor=executor, io=RESIDENT)
        workers[PLAIN].ask("load", model=str(plain), executor=executor, io=io)
        yield workers


def empty_cache(bundle: Bundle) -> Path:
    """Drop the pages of the table that loading it has left; returns its largest file."""
    for path in table_files(bundle):
        evict(path)
    largest = max(table_files(bundle), key=lambda path: path.stat().st_size)
    click.echo(f"{cached_share(largest):.2%} of the table's pages in memory at the beginning")
    return largest


def measure(workers: Mapping[str, Worker], rounds: int, tokens: int) -> dict[str, list[Answer]]:
    """Let all decode in turn; the first round isn't counted."""
    answers: dict[str, list[Answer]] = {name: [] for name in workers}
    with click.progressbar(range(1 + rounds), label="rounds") as bar:
        for seed in bar:
            for name, worker in workers.items():
                time.sleep(SETTLE_S)
                answer = worker.ask("decode", seed=seed, tokens=tokens)
                if seed:
                    answers[name].append(answer)
    return answers


def ratio(own: Sequence[Answer], other: Sequence[Answer]) -> str:
    """Say how many times the other's speed it is, in each round."""
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(own, other, strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def report(answers: Mapping[str, list[Answer]], memory: Mapping[str, Answer], tokens: int) -> None:
    """Print speeds, ratios, whether logits are equal, and memory."""
    for name, own in answers.items():
        speed = statistics.median(tokens / answer["seconds"] for answer in own)
        waited = 1e6 * statistics.median(answer["waited"] for answer in own) / tokens
        click.echo(
            f"{name}: {speed:.1f} tok/s, waited {waited:.0f} us a token for rows; MB resident: "
            f"{json.dumps(memory[name])}"
        )
    for name, other in ((CAPPED, IN_MEMORY), (CAPPED, PLAIN), (IN_MEMORY, PLAIN)):
        click.echo(f"{name} over {other}: {ratio(answers[name], answers[other])}")
    pairs = list(zip(answers[CAPPED], answers[IN_MEMORY], strict=True))
    equal = sum(one["digest"] == other["digest"] for one, other in pairs)
    click.echo(f"logits of {CAPPED} and {IN_MEMORY} equal bit by bit: {equal} of {len(pairs)} rounds")


@click.command()
@click.argument("big", type=click.Path(path_type=Path), required=False)
@click.argument("plain", type=click.Path(path_type=Path), required=False)
@click.option("--executor", default="tvm", show_default=True)
@click.option("--table-io", type=click.Choice(TABLE_IO), default=MMAP, show_default=True, help="Of the capped process.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Decoded in each round.")
@click.option("--serve", "serving", is_flag=True, hidden=True)
def main(
    big: Path | None, plain: Path | None, executor: str, table_io: str, rounds: int, tokens: int, serving: bool
) -> None:
    """Measure BIG, whose site has a large table, against PLAIN, the same model without it."""
    if serving:
        serve(Decoding())
        return
    if big is None or plain is None:
        raise click.UsageError("give two bundles: one with a large table and the same model without it")
    bundle = Bundle.open(big)
    cap = sum(table.num_rows * table.record.record_bytes for table in bundle.manifest.tables) // CAP_SHARE
    click.echo(
        f"{platform.machine()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.2f}; cap {cap >> 20} MiB"
    )
    with contestants(big, plain, executor, table_io, cap) as workers:
        path = empty_cache(bundle)
        workers[CAPPED].ask("fill", path=str(path), num_bytes=cap)
        answers = measure(workers, rounds, tokens)
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
    report(answers, memory, tokens)
    click.echo(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
