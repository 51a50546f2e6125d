"""``engram pack``: a folder to copy to a box."""

import json
from pathlib import Path

import click

from engram_compilers.pack.folder import PACK_NAME, PackOptions, folder_bytes, pack_cpu
from engram_compilers.pack.packages import PYTHONS
from engram_runtime.bundle import Bundle
from engram_runtime.errors import TargetError
from engram_runtime.new_folder import new_folder
from engram_targets import CpuProfile, cpu_profile_names, load_profile

PACKED = "a packed folder"


@click.command("pack")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target", default="native", show_default=True, help="Target, or a profile's .toml file; native is this machine."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--with-graph", is_flag=True, help="Take the ONNX graphs and their weights along.")
@click.option("--wheels", is_flag=True, help="Take the packages along, for boxes without a network.")
@click.option(
    "--python",
    "pythons",
    multiple=True,
    type=click.Choice(PYTHONS),
    help="Version of Python on the box; may be given several times.  [default: all that have the packages]",
)
@click.option("--force", is_flag=True, help="Replace a packed folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def pack_command(
    bundle: Path,
    target: str,
    out: Path,
    with_graph: bool,
    wheels: bool,
    pythons: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write a folder with BUNDLE, compiled for a target, and all that runs it there.

    It is compiled first where it isn't yet, or where the bundle or the target have changed since.
    """
    profile = load_profile(target)
    options = PackOptions(with_graph=with_graph, with_wheels=wheels, pythons=pythons or PYTHONS)
    opened = Bundle.open(bundle)
    if not isinstance(profile, CpuProfile):
        raise TargetError(
            f"target {profile.name} is of device {profile.device!r}, which nothing is packed for yet; name one of "
            f"{cpu_profile_names()}"
        )
    with new_folder(out, PACK_NAME, PACKED, replace=force) as folder:
        pack_cpu(opened, profile, options, folder, lambda step: click.echo(f"{step} ...", err=True))
    sizes = {path.name: folder_bytes(path) for path in sorted(out.iterdir()) if path.is_dir()}
    total = folder_bytes(out)
    if as_json:
        click.echo(json.dumps({"folder": str(out), "target": profile.name, "bytes": total, "parts": sizes}))
    else:
        parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
        click.echo(f"{out}: {parts}; {total / 1e6:.1f} MB in all")
