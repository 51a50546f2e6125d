"""``engram compile``: compile a bundle for a target."""

import dataclasses
import json
from pathlib import Path

import click

from engram_compilers.tuning.sizes import OWN_BLOCKS, Blocks
from engram_compilers.tuning.store import kept_blocks
from engram_runtime.bundle import Bundle
from engram_targets import CpuProfile, Profile, load_profile
from engram_targets.common import CACHE_DTYPES
from engram_targets.fitting import misfit


@click.command("compile")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target", default="native", show_default=True, help="Target, or a profile's .toml file; native is this machine."
)
@click.option("--cache", type=click.Choice(CACHE_DTYPES), help="Dtype of keys and values; the target's by default.")
@click.option("--rebuild", is_flag=True, help="Throw away all libraries in BUNDLE first, of all targets and makers.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def compile_command(bundle: Path, target: str, cache: str | None, rebuild: bool, as_json: bool) -> None:
    """Compile BUNDLE for a target into its lib folder."""
    from engram_compilers.build import compile_bundle, remove_libraries

    profile = load_profile(target)
    if cache is not None:
        profile = dataclasses.replace(profile, cache_dtype=cache)
    opened = Bundle.open(bundle)
    if rebuild:
        remove_libraries(opened)
    result = compile_bundle(opened, profile, _report, _measured_blocks(profile))
    if as_json:
        click.echo(
            json.dumps(
                {
                    "target": result.target,
                    "folder": str(result.folder),
                    "seconds": round(result.seconds, 1),
                    "library_bytes": result.library_bytes,
                    "weights_bytes": result.weights_bytes,
                }
            )
        )
    else:
        click.echo(
            f"{result.folder}: library {result.library_bytes / 1e6:.1f} MB, weights "
            f"{result.weights_bytes / 1e6:.1f} MB, {result.seconds:.0f} s"
        )


def _report(step: str) -> None:
    click.echo(f"{step} ...", err=True)


def _measured_blocks(profile: Profile) -> Blocks:
    if not isinstance(profile, CpuProfile) or misfit(profile) is not None:
        return OWN_BLOCKS
    blocks = kept_blocks(profile)
    if blocks.sizes:
        click.echo(f"using {len(blocks.sizes)} block sizes that engram tune measured on this machine", err=True)
    return blocks
