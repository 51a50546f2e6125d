"""A plan as text."""

from collections.abc import Iterator

from engram_runtime.planning.figures import weights
from engram_runtime.planning.outline import EXPERTS, Outline
from engram_runtime.planning.plan import PROMPT_TOKENS, Plan, TableWait
from engram_runtime.sizes import format_seconds, format_size

WIDTH = 26


def plan_text(plan: Plan) -> str:
    """Return a plan in lines."""
    parts = (_model, _weights, _tables, _export, _memory, _rates, _prices, _verdict)
    return "\n".join(line for part in parts for line in part(plan))


def _model(plan: Plan) -> Iterator[str]:
    outline = plan.outline
    yield f"{outline.model}: {outline.family}, {outline.parameters / 1e6:,.1f}M parameters, {outline.quantisation}"
    size = "of unknown size" if outline.source_bytes is None else format_size(outline.source_bytes)
    yield f"  {outline.path}, {size}; told by {outline.read_from}"


def _weights(plan: Plan) -> Iterator[str]:
    outline = plan.outline
    yield _columns("weights", "in the graph", "packed")
    for row in weights(outline):
        yield _columns(f"  {row['weights']}", format_size(row["stored_bytes"]), format_size(row["packed_bytes"]))
    for words, size in outline.foreign.items():
        yield _columns(f"  {words}", format_size(size), "not exported")
    yield _columns("  together", format_size(outline.stored()), format_size(outline.packed()))
    if experts := list(outline.of(EXPERTS)):
        first = experts[0]
        yield (
            f"  a token reads {first.chosen} of {first.copies} experts in each layer, "
            f"{format_size(outline.expert_bytes)} of them, and {format_size(outline.whole_bytes)} besides"
        )
    elif outline.runs:
        yield f"  a token reads {format_size(outline.whole_bytes)}"
    if outline.runs:
        yield _line("cache", f"{format_size(outline.cache_bytes(1))} a token, {_at_context(plan)}")
    if outline.state_bytes:
        yield _line("states", format_size(outline.state_bytes))


def _at_context(plan: Plan) -> str:
    size = format_size(plan.outline.cache_bytes(plan.positions))
    return f"{size} at {plan.positions:,} of {plan.outline.context_length:,} tokens"


def _tables(plan: Plan) -> Iterator[str]:
    for table, wait in zip(plan.outline.tables, plan.tables, strict=True):
        yield f"table {table.site}: {table.num_rows:,} rows of {table.record_bytes} bytes, {table.rows} a token"
        yield f"  {wait.choice.io}, {format_size(table.num_bytes)}: {wait.choice.reason}"
        if wait.token_s:
            yield from _waits(wait, plan.outline)
    if any(wait.token_s != 0 for wait in plan.tables):
        yield f"  disk: {plan.machine.disk.words}"


def _waits(wait: TableWait, outline: Outline) -> Iterator[str]:
    assert wait.token_s is not None
    assert wait.token_wait_s is not None
    assert wait.prompt_s is not None
    assert wait.prompt_wait_s is not None
    left = f", {format_seconds(wait.token_wait_s)} of it waited for" if outline.runs else ""
    yield f"  cold rows of a token: {wait.pages:.1f} pages, {format_seconds(wait.token_s)}{left}"
    left = f", {format_seconds(wait.prompt_wait_s)} of it waited for" if outline.runs else ""
    yield f"  cold rows of {PROMPT_TOKENS:,} tokens: {format_seconds(wait.prompt_s)}{left}"


def _export(plan: Plan) -> Iterator[str]:
    export = plan.outline.export
    if export is None:
        return
    if export.peak_bytes is not None:
        yield _line("peak at export", f"{format_size(export.peak_bytes)} above the libraries")
    free = plan.machine.free_disk_bytes
    here = "" if free is None else f", {format_size(free)} free here"
    yield _line("disk it takes", f"{format_size(export.disk_bytes)}{here}")


def _memory(plan: Plan) -> Iterator[str]:
    if not plan.outline.runs:
        return
    yield _line("memory to run", format_size(plan.need.total))
    for words, size in plan.need.rows().items():
        yield _line(f"  {words}", format_size(size))


def _rates(plan: Plan) -> Iterator[str]:
    if plan.rates is None:
        return
    machine = plan.machine
    how = "measured here" if machine.measured_bandwidth else "as given"
    yield _line(
        "predicted", f"{machine.target}, {machine.threads} threads, {machine.bandwidth_gb_s:.1f} GB/s of memory, {how}"
    )
    for depth, rate in plan.rates.decode.items():
        told = f"{rate:.3g} tok/s" if rate else "unknown, as the disk is not known"
        yield _line(f"  decode after {depth:,}", told)
    prompt = min(PROMPT_TOKENS, plan.positions)
    told = (
        f"kernels of {machine.kernels} were never timed"
        if plan.rates.prefill is None
        else f"{plan.rates.prefill:.3g} tok/s"
    )
    yield _line(f"  prefill of {prompt:,}", told)


def _prices(plan: Plan) -> Iterator[str]:
    for words, price in plan.prices.items():
        yield _line("price", f"{price:.4g} a million tokens {words}")


def _verdict(plan: Plan) -> Iterator[str]:
    yield f"{plan.verdict.kind}: {plan.verdict.reason}"
    yield from (f"  $ {command}" for command in plan.commands)


def _line(label: str, value: str) -> str:
    return f"{label:{WIDTH}}{value}"


def _columns(label: str, *cells: str) -> str:
    return f"{label:{WIDTH}}" + "".join(f"{cell:>14}" for cell in cells)
