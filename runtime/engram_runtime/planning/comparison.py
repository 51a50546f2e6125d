"""What was predicted of a bundle beside what a benchmark measured."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from engram_runtime.bench.bandwidth import read_bandwidth, working_set
from engram_runtime.bench.bundle_runner import TVM
from engram_runtime.bench.report import bytes_of_a_token, report
from engram_runtime.bench.rounds import Contestant, Settings, measure
from engram_runtime.bundle import Bundle
from engram_runtime.memory import FreeMemory
from engram_runtime.planning.bundle_outline import outline_bundle
from engram_runtime.planning.machine import Disk, Machine
from engram_runtime.planning.need import memory_need
from engram_runtime.planning.outline import Outline
from engram_runtime.planning.speed import decode_s, prefill_s
from engram_runtime.planning.targets import read_target
from engram_runtime.tables.options import RESIDENT

Figures = dict[str, float | None]
Compared = dict[str, dict[str, float | None]]  # predicted, measured and their ratio by what it is
MB = 10**6
CHECK_ROUNDS, CHECK_TOKENS, CHECK_PROMPT = 3, 32, 256


def compare(bundle: Bundle, found: Mapping[str, Any], settings: Settings) -> Compared:
    """Return what was to be expected of a benchmark on tvm beside what it found.

    Args:
        found: of `engram_runtime.bench.report.report`; its memory bandwidth is what predictions go by.
    """
    outline = outline_bundle(bundle)
    assert outline.target is not None  # it has just run
    target = read_target(outline.target)
    machine = Machine(
        memory=FreeMemory(num_bytes=0),
        bandwidth_gb_s=found["bandwidth_gb_s"],
        measured_bandwidth=True,
        threads=found["threads"],
        target=target.name,
        kernels=target.kernels,
        chunk=target.chunk,
        disk=Disk(facts=None, words=""),
        free_disk_bytes=None,
    )
    resident = sum(table["table_bytes"] for table in found["tables"] if table["io"] == RESIDENT)
    predicted = expected(outline, machine, settings, resident_bytes=resident)
    return {words: _row(value, _measured(found, settings)[words]) for words, value in predicted.items()}


def expected(outline: Outline, machine: Machine, settings: Settings, *, resident_bytes: int) -> Figures:
    """Return what a benchmark of these sizes should find."""
    prompt_s = prefill_s(outline, machine, settings.prompt_tokens) if settings.depths[0] == 0 else None
    middle = settings.decode_tokens // 2
    return {
        **{f"decode after {depth}, tok/s": 1 / decode_s(outline, machine, depth + middle) for depth in settings.depths},
        f"prefill {settings.prompt_tokens}, tok/s": None if prompt_s is None else settings.prompt_tokens / prompt_s,
        "resident memory, MB": memory_need(outline, settings.positions, resident_bytes).total / MB,
    }


def _measured(found: Mapping[str, Any], settings: Settings) -> Figures:
    return {
        **{f"decode after {depth}, tok/s": found["depths"][str(depth)]["decode_tok_s"] for depth in settings.depths},
        f"prefill {settings.prompt_tokens}, tok/s": found["prefill_tok_s"],
        "resident memory, MB": found["rss_anon_mb"] + found["rss_file_mb"],
    }


def _row(predicted: float | None, measured: float | None) -> dict[str, float | None]:
    ratio = None if predicted is None or not measured else _rounded(predicted / measured)
    return {
        "predicted": None if predicted is None else _rounded(predicted),
        "measured": measured,
        "predicted_over_measured": ratio,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def compared_text(compared: Compared) -> str:
    """Return the comparison as lines."""
    return "\n".join(_lines(compared))


def _lines(compared: Compared) -> Iterator[str]:
    yield f"{'':28}{'predicted':>12}{'measured':>12}{'ratio':>8}"
    for words, row in compared.items():
        if row["predicted_over_measured"] is not None:
            ratio = f"{row['predicted_over_measured']:.2f}"
            yield f"{words:28}{row['predicted']:12,.4g}{row['measured']:12,.4g}{ratio:>8}"


def check(bundle: Bundle, threads: int | None, progress: Callable[[], None], settings: Settings) -> Compared:
    """Run a bundle for some seconds in a process of its own and return what was predicted beside what was measured.

    Raises:
        EngramError: as the run itself.
    """
    results = measure([Contestant(runner=TVM, model=str(bundle.path))], settings, threads=threads, progress=progress)
    read = working_set(bytes_of_a_token(results[0], settings))
    bandwidth = read_bandwidth(results[0].facts["threads"], read)
    return compare(bundle, report(results, settings, bandwidth, (0.0, 0.0)), settings)


def check_settings(context_length: int) -> Settings:
    """Return the sizes of a short run.

    Raises:
        RequestError: the context is too short to tell anything.
    """
    prompt = min(CHECK_PROMPT, context_length // 4)
    settings = Settings(
        prompt_tokens=max(prompt, 1),
        decode_tokens=min(CHECK_TOKENS, max(prompt // 2, 1)),
        depths=(0, prompt),
        rounds=CHECK_ROUNDS,
        tables_on=True,
        profile=False,
    )
    settings.check_context(context_length)
    return settings
