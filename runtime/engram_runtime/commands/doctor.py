"""``engram doctor``: what may keep bundles from running well here, and what to do about it."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from engram_runtime.commands.options import json_option
from engram_runtime.doctor.bundle import bundle_findings
from engram_runtime.doctor.finding import Finding
from engram_runtime.doctor.install import install_findings
from engram_runtime.doctor.machine import machine_findings
from engram_runtime.errors import RequestError, TargetError

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
STATE_WIDTH = max(map(len, COLOURS))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--probe", is_flag=True, help="Measure disks under BUNDLE that nothing is known of, half a second each.")
@json_option
def doctor(bundle: Path | None, probe: bool, as_json: bool) -> None:
    """Check this machine and what is installed and, where one is given, BUNDLE on it.

    Each line is ok, warn or fail, with what to do about it below. A failure ends the command with exit code 4.
    """
    if probe and bundle is None:
        raise RequestError("--probe measures the disks under a bundle; name one")
    findings = [*machine_findings(), *install_findings()]
    if bundle is not None:
        findings += bundle_findings(bundle, probe=probe)
    failed = [finding.name for finding in findings if finding.state == "fail"]
    if as_json:
        click.echo(json.dumps({"findings": [asdict(finding) for finding in findings], "ok": not failed}))
    else:
        # click knows terminals, but not https://no-color.org.
        click.echo(report(findings), color=False if os.environ.get("NO_COLOR") else None)
    if failed:
        raise TargetError(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}; each says what to do")


def report(findings: Sequence[Finding]) -> str:
    """Return a line of each finding and, where there is one, its mend on the line after."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        state = click.style(f"{finding.state:{STATE_WIDTH}}", fg=COLOURS[finding.state])
        lines.append(f"{state}  {finding.name:{width}}  {finding.detail}")
        if finding.mend is not None:
            lines.append(f"{'':{STATE_WIDTH}}  {'':{width}}  {finding.mend}")
    return "\n".join(lines)
