"""``engram pack``: a folder to copy to a box."""

import json
from pathlib import Path

import click

from engram_compilers.pack.folder import BUNDLE_FOLDER, PACK_NAME, PackOptions, folder_bytes, pack_cpu
from engram_compilers.pack.packages import PYTHONS
from engram_runtime.bundle import Bundle
from engram_runtime.errors import RequestError, TargetError
from engram_runtime.library import library_infos
from engram_runtime.new_folder import new_folder
from engram_targets import CProfile, CpuProfile, load_profile, profile_names

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
    if not isinstance(profile, CpuProfile | CProfile):
        raise TargetError(
            f"target {profile.name} is of device {profile.device!r}, which nothing is packed for; name one of "
            f"{packed_targets()}"
        )
    if isinstance(profile, CProfile) and (with_graph or wheels or pythons):
        raise RequestError(f"target {profile.name} takes no --with-graph, --wheels or --python: it is packed as C")
    with new_folder(out, PACK_NAME, PACKED, replace=force) as folder:
        sizes = _pack(opened, profile, options, folder)
    total, digest = folder_bytes(out), _library_digest(out)
    if as_json:
        facts = {"folder": str(out), "target": profile.name, "bytes": total, "parts": sizes}
        click.echo(json.dumps(facts | ({} if digest is None else {"library_sha256": digest})))
    else:
        parts = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items())
        click.echo(f"{out}: {parts}; {total / 1e6:.1f} MB in all")
        if digest is not None:
            click.echo(f"once, on the box: ./engram trust {BUNDLE_FOLDER} --sha256 {digest}")


def packed_targets() -> list[str]:
    """Return the targets that come with the package and can be packed for."""
    return [name for name in profile_names() if isinstance(load_profile(name), CpuProfile | CProfile)]


def _pack(bundle: Bundle, profile: CpuProfile | CProfile, options: PackOptions, folder: Path) -> dict[str, int]:
    """Fill an empty folder and return the bytes of its parts by name."""
    if isinstance(profile, CpuProfile):
        pack_cpu(bundle, profile, options, folder, _report)
        return {path.name: folder_bytes(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    from engram_compilers.c.pack import pack_c

    packed = pack_c(bundle, profile, folder, _report)
    (folder / PACK_NAME).write_text(json.dumps({"target": profile.name}, indent=1) + "\n", encoding="utf-8")
    return {"sources": packed.source_bytes, "weights": packed.weights_bytes, "tables": packed.table_bytes}


def _library_digest(folder: Path) -> str | None:
    """Return the digest by which a box can trust the library that was packed, None for a program in C."""
    if not (folder / BUNDLE_FOLDER).is_dir():
        return None
    ((_, info),) = library_infos(Bundle.open(folder / BUNDLE_FOLDER))
    return info.digest


def _report(step: str) -> None:
    click.echo(f"{step} ...", err=True)
