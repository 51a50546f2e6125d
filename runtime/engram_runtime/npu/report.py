"""What an accelerator took of a phase of a text, as JSON values and as lines."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engram_runtime.npu.device import Cost, Geometry
from engram_runtime.npu.ledger import LayerCost, Ledger, RowsWaits

Figures = dict[str, Any]


def phase_figures(ledger: Ledger, geometry: Geometry, tokens: int) -> Figures:
    """Return figures of ``tokens`` tokens that a ledger was kept of.

    ``ms`` and ``tok_s`` are the accelerator's, simulated, the host taking no time; ``host_ms`` is this machine's part,
    measured. ``array_use`` is the multiply-accumulates done of those that could be, ``dma_use`` the share of cycles in
    which weights or inputs come in, ``traffic`` the bytes moved for each that had to be.
    """
    whole = LayerCost()
    for layer in ledger.layers.values():
        _add(whole, layer)
    seconds = whole.cost.cycles / geometry.clock_hz
    return {
        "tokens": tokens,
        "passes": ledger.passes,
        "ms": 1e3 * seconds,
        "tok_s": tokens / seconds,
        "host_ms": 1e3 * ledger.host_s,
        **_figures(whole, geometry),
        "rows": _rows(ledger.waits),
        "layers": {name: _figures(layer, geometry) for name, layer in ledger.layers.items() if layer.runs},
    }


def _add(total: LayerCost, layer: LayerCost) -> None:
    total.cost += layer.cost
    total.runs += layer.runs
    total.compulsory_bytes += layer.compulsory_bytes


def _figures(layer: LayerCost, geometry: Geometry) -> Figures:
    cost = layer.cost
    return {
        "runs": layer.runs,
        "cycles": cost.cycles,
        "macs": cost.macs,
        "weight_bytes": cost.weight_bytes,
        "input_bytes": cost.input_bytes,
        "output_bytes": cost.output_bytes,
        "command_bytes": cost.command_bytes,
        "compulsory_bytes": layer.compulsory_bytes,
        "traffic": _moved(cost) / layer.compulsory_bytes,
        "array_use": cost.macs / (cost.cycles * geometry.macs_per_cycle),
        "dma_use": cost.dma_in_cycles / cost.cycles,
    }


def _moved(cost: Cost) -> int:
    """Return the bytes of weights, inputs and sums that were moved."""
    return cost.weight_bytes + cost.input_bytes + cost.output_bytes


def _rows(waits: Mapping[int, RowsWaits]) -> list[Figures]:
    """Return for each site the time its rows took, that until its layer, and how much of the first the second hides."""
    return [
        {
            "site": site,
            "fetch_ms": 1e3 * wait.fetch_s / wait.passes,
            "until_layer_ms": 1e3 * wait.until_s / wait.passes,
            "hidden": wait.hidden_s / wait.fetch_s,
        }
        for site, wait in sorted(waits.items())
    ]


HEADER = "| layer | runs | kilocycles | weights MB | inputs MB | sums MB | moved / had to be | array | DMA in |"


def phase_lines(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what `phase_figures` found as Markdown: a sentence, and a table by layers."""
    yield (
        f"{name}: {found['tokens']} tokens in {found['passes']} passes, {found['ms']:.3f} ms simulated, "
        f"{found['tok_s']:.1f} tok/s; the host's part took {found['host_ms']:.1f} ms here, measured, beside it"
    )
    for rows in found["rows"]:
        yield (
            f"rows of site {rows['site']}: there after {rows['fetch_ms']:.3f} ms, measured; the array reaches the "
            f"layer after {rows['until_layer_ms']:.3f} ms, simulated, which hides {rows['hidden']:.0%} of the wait"
        )
    yield ""
    yield HEADER
    yield "|---" * 9 + "|"
    for group, layer in {**_groups(found["layers"]), "all": found}.items():
        yield _line(group, layer)


def _groups(layers: Mapping[str, Figures]) -> Mapping[str, Figures]:
    """Return sums of the layers whose names begin alike, such as ``layers.0``; shares are means by cycles."""
    members = defaultdict(list)
    for name, layer in layers.items():
        members[".".join(name.split(".")[:2])].append(layer)
    return {group: _sum(of) for group, of in members.items()}


def _sum(layers: Sequence[Figures]) -> Figures:
    counts = ("runs", "cycles", "weight_bytes", "input_bytes", "output_bytes", "compulsory_bytes")
    total: Figures = {key: sum(layer[key] for layer in layers) for key in counts}
    shares = {key: sum(layer[key] * layer["cycles"] for layer in layers) for key in ("array_use", "dma_use")}
    moved = sum(total[f"{kind}_bytes"] for kind in ("weight", "input", "output"))
    return {
        **total,
        "traffic": moved / total["compulsory_bytes"],
        **{key: value / total["cycles"] for key, value in shares.items()},
    }


def _line(name: str, layer: Mapping[str, Any]) -> str:
    megabytes = " | ".join(f"{layer[f'{kind}_bytes'] / 1e6:.3f}" for kind in ("weight", "input", "output"))
    return (
        f"| {name} | {layer['runs']} | {layer['cycles'] / 1e3:.1f} | {megabytes} | {layer['traffic']:.3f} | "
        f"{layer['array_use']:.1%} | {layer['dma_use']:.1%} |"
    )
