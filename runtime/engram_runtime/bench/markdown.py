"""The figures of a benchmark as Markdown."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from engram_runtime.bench.bandwidth import METHOD
from engram_runtime.bench.report import Tree
from engram_runtime.bench.rounds import DRAFTS, VERIFIED_TOKENS, Settings

Row = tuple[str, tuple[str, ...]]  # a label, and where the figure stands in a tree


def markdown(report: Tree, settings: Settings, ratios: Tree | None) -> str:
    """Return the report as text: what ran, a table of the figures, and where the time goes if that was asked for.

    Args:
        report: of `engram_runtime.bench.report.report`.
        ratios: the bundle's figures over the peer's in each round, or None without a peer.
    """
    runners = [report, report["against"]] if "against" in report else [report]
    parts = [
        f"load average {report['load_average']:.2f} before, {report['load_average_after']:.2f} after; "
        f"medians of {settings.rounds} rounds",
        *(f"{runner['runner']}, {runner['threads']} threads: {runner['build']}" for runner in runners),
        f"memory bandwidth {report['bandwidth_gb_s']:.1f} GB/s ({METHOD.format(report['bandwidth_mb'])})",
        *(_drafts(runner, settings) for runner in runners if runner.get(DRAFTS) is not None),
        "",
        *_table([*rows(settings), *_expert_rows(report)], runners, ratios),
    ]
    for name, step in report.get("profile", {}).items():
        parts += ["", *_profile(name, step)]
    return "\n".join(parts)


def rows(settings: Settings) -> list[Row]:
    """Return the lines of the table."""
    return [
        *_speed(settings),
        *_drafted_speed(settings),
        *(
            (f"forward of {tokens} tokens over 1", ("verify_cost", str(tokens)))
            for tokens in VERIFIED_TOKENS
            if tokens != 1
        ),
        *((f"forward of {tokens} tokens, ms", ("verify_ms", str(tokens))) for tokens in VERIFIED_TOKENS),
        (f"first token of a prompt of {settings.prompt_tokens} after {settings.depths[0]}, ms", ("ttft_ms",)),
        ("load, ms", ("load_ms",)),
        ("import, load, first token of a prompt of 1, ms", ("start_ms",)),
        ("resident memory of its own, MB", ("rss_anon_mb",)),
        ("resident memory of files, MB", ("rss_file_mb",)),
        ("share of the memory bandwidth", ("bandwidth_share",)),
        ("MB of weights a token", ("bytes_per_token",)),
    ]


def _speed(settings: Settings) -> Iterator[Row]:
    for name, tokens, key in (
        ("prefill", settings.prompt_tokens, "prefill_tok_s"),
        ("decode", settings.decode_tokens, "decode_tok_s"),
    ):
        for depth in settings.depths:
            yield f"{name} {tokens} after {depth}, tok/s", ("depths", str(depth), key)


def _drafted_speed(settings: Settings) -> Iterator[Row]:
    """Yield the lines of each text, and of all together where there are several."""
    places: list[Row] = [(name, (DRAFTS, "texts", name)) for name in settings.prompts]
    if len(places) > 1:
        places.append(("all texts", (DRAFTS,)))
    for name, place in places:
        yield f"decode {settings.decode_tokens} after {name}, tok/s", (*place, "plain_tok_s")
        yield f"the same with drafts by {settings.drafts.drafter}, tok/s", (*place, "tok_s")
        yield f"drafts over plain, {name}", (*place, "over_plain")


def _drafts(runner: Tree, settings: Settings) -> str:
    """Say in a line what drafts came to."""
    found = runner[DRAFTS]
    number = "as many as pay" if settings.drafts.drafts is None else f"{settings.drafts.drafts} a pass"
    shares = ", ".join(f"{share:.0%}" for share in found["acceptance"]) or "none were made"
    experts = found["experts_per_forward"]
    read = (
        f"; {experts['drafted']:.1f} experts a forward pass, plain {experts['plain']:.1f}" if experts["plain"] else ""
    )
    return (
        f"{runner['runner']}, drafts by {found['draft']}, {number}, after up to {settings.prompt_tokens} tokens of "
        f"{', '.join(settings.prompts)}: "
        f"{found['tokens_per_forward']:.2f} tokens a forward pass; right one by one: {shares}{read}; "
        f"{'the same' if found['same_text'] else 'another'} text as without"
    )


def _expert_rows(report: Tree) -> Iterator[Row]:
    for size in report["verify_experts"] or ():
        yield f"experts a forward of {size} tokens reads", ("verify_experts", size)


def _table(lines: Sequence[Row], runners: Sequence[Tree], ratios: Tree | None) -> Iterator[str]:
    heads = ["", *(runner["runner"] for runner in runners)]
    if ratios is not None:
        heads.append("ratio (least to largest)")
    yield "| " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * (len(heads) - 1)
    for label, path in lines:
        cells = [_number(_at(runner, path), path) for runner in runners]
        if ratios is not None:
            cells.append(_ratio(ratios, runners, path))
        yield "| " + " | ".join([label, *cells]) + " |"


def _ratio(ratios: Tree, runners: Sequence[Tree], path: tuple[str, ...]) -> str:
    """Say how many times the peer's the bundle's figure is: by rounds, or at once for what was measured once."""
    if path[0] in ratios:
        values = _at(ratios, path)
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    own, peer = (_at(runner, path) for runner in runners)
    return f"{own / peer:.2f}" if own is not None and peer else ""


def _profile(name: str, step: Tree) -> Iterator[str]:
    yield f"| {name}, {step['step_ms']:.2f} ms | calls | ms | share |"
    yield "|---|---:|---:|---:|"
    kinds = [(kind, str(found["calls"]), found["ms"]) for kind, found in step["kernels"].items()]
    for kind, calls, milliseconds in [*kinds, ("outside kernels", "", step["outside_ms"])]:
        yield f"| {kind} | {calls} | {milliseconds:.3f} | {milliseconds / step['step_ms']:.1%} |"


def _at(tree: Tree, path: Sequence[str]) -> Any:
    """Return what stands in a tree, None where it has nothing of that kind."""
    for key in path:
        if tree is None:
            return None
        tree = tree[key]
    return tree


def _number(value: float | None, path: Sequence[str]) -> str:
    if value is None:
        return ""
    if path == ("bytes_per_token",):
        value /= 1e6
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
