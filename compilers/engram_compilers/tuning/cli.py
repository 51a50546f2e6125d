"""``engram tune``: measure block sizes of kernels on this machine."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from engram_compilers.tuning.sizes import Measured
from engram_runtime.commands.options import json_option
from engram_runtime.errors import TargetError
from engram_targets import CpuProfile, load_profile
from engram_targets.fitting import misfit

HEAD = f"{'kernel':>12} {'own sums':>9} {'us':>8} {'best sums':>10} {'us':>8} {'gain':>6}"


@click.command()
@click.option("--target", default="native", show_default=True, help="Target, or a profile's .toml file.")
@click.option(
    "--minutes", type=click.FloatRange(0, 60, min_open=True), default=2.0, show_default=True, help="Time to take."
)
@json_option
def tune(target: str, minutes: float, as_json: bool) -> None:
    """Measure block sizes of a target's kernels on this machine, for engram compile to use from then on.

    They change no result and are never needed: where none was measured, or none was faster, the kernels' own are used.
    """
    from engram_compilers.tuning.search import search, tuned_kernels
    from engram_compilers.tuning.store import keep

    profile = _tunable_profile(target)
    kernels = tuned_kernels(profile)
    if not as_json:
        click.echo(HEAD)
    found: list[Measured] = []
    for measured in search(profile, kernels, minutes * 60):
        found.append(measured)
        if not as_json:
            click.echo(_line(measured))
    place = keep(profile, tuple(each.best for each in found if each.pays))
    if as_json:
        told = [asdict(each) | {"gain": round(each.gain, 4)} for each in found]
        click.echo(json.dumps({"target": profile.name, "kept": str(place), "kernels": told}))
    else:
        click.echo(_verdict(profile, found, len(kernels)))


def _tunable_profile(target: str) -> CpuProfile:
    profile = load_profile(target)
    if not isinstance(profile, CpuProfile):
        raise TargetError(
            f"target {profile.name} is of device {profile.device!r}, kernels of processors alone are tuned"
        )
    if (reason := misfit(profile)) is not None:
        raise TargetError(f"target {profile.name} can't be tuned here: {reason}")
    return profile


def _line(measured: Measured) -> str:
    own, best = measured.own, measured.best
    kernel = f"{own.kind} M={own.rows}"
    kept = " kept" if measured.pays else ""
    times = f"{own.sums:9} {measured.own_us:8.1f} {best.sums:10} {measured.best_us:8.1f}"
    return f"{kernel:>12} {times} {measured.gain:6.1%}{kept}"


def _verdict(profile: CpuProfile, found: Sequence[Measured], kernels: int) -> str:
    paying = [each.gain for each in found if each.pays]
    rest = max((each.gain for each in found if not each.pays), default=0.0)
    missed = f"; time ran out before {kernels - len(found)} of {kernels}" if len(found) < kernels else ""
    if not paying:
        return f"the kernels' own block sizes are within {rest:.1%} of the best that were tried, and stay{missed}"
    return (
        f"{len(paying)} of {len(found)} kernels are up to {max(paying):.1%} faster, the others within {rest:.1%} of "
        f"the best; engram compile --target {profile.name} uses that on this machine{missed}"
    )
