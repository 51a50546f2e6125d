"""``engram compile``: compile a bundle for a target."""

import dataclasses
import json
from pathlib import Path

import click

from engram_runtime.bundle import Bundle
from engram_targets import load_profile
from engram_targets.common import CACHE_DTYPES


@click.command("compile")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target", default="native", show_default=True, help="Target, or a profile's .toml file; native is this machine."
)
@click.option("--cache", type=click.Choice(CACHE_DTYPES), help="Dtype of keys and values; the target's by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def compile_command(bundle: Path, target: str, cache: str | None, as_json: bool) -> None:
    """Compile BUNDLE for a target into its lib folder."""
    from engram_compilers.build import compile_bundle

    profile = load_profile(target)
    if cache is not None:
        profile = dataclasses.replace(profile, cache_dtype=cache)
    result = compile_bundle(Bundle.open(bundle), profile, lambda step: click.echo(f"{step} ...", err=True))
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
