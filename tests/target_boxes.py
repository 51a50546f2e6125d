"""How a bundle is compiled for each kind of target and run on the boxes there are here."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests import qemu_aarch64
from tests.qemu_aarch64 import Arm64Box

from engram_compilers.build import compile_bundle
from engram_compilers.pack.folder import PackOptions, pack_cpu
from engram_runtime import LLM
from engram_runtime.bundle import Bundle
from engram_runtime.errors import EngramError
from engram_targets import CProfile, CpuProfile, GpuProfile, NpuProfile, Profile
from engram_targets.fitting import misfit
from tools.target_matrix import NATIVELY, NOT_RUN, ON_POCL, SIMULATED, UNDER_QEMU, Row

HERE = "this machine"
PROCESSORS = {"aarch64-dotprod": "cortex-a76", "aarch64-i8mm": "max", "aarch64-i8mm-sve": "max"}  # as qemu calls them
C_BOXES = {"riscv64": "riscv64-linux-musl", "arm": "arm-linux-musleabihf"}  # by qemu's name, ziglang's
ON_ARM = """import json, sys
sys.path[:0] = ["python", "site"]
from engram_runtime import LLM
with LLM("bundle", threads=1) as llm:
    print(json.dumps(list(llm.generate({prompt}, max_tokens={tokens}).token_ids)))
"""
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A bundle to compile in, a folder for what else is made, a prompt, and what gives the tokens of the reference."""

    bundle: Path
    home: Path
    prompt: Tokens
    expected: Callable[[], Tokens]
    tokens: int


def rows_of(task: Task, profile: Profile) -> Iterator[Row]:
    """Yield what becomes of a target on each box there is for it."""
    try:
        yield from c_rows(task, profile) if isinstance(profile, CProfile) else library_rows(task, profile)
    except EngramError as error:
        yield _row(task, profile, HERE, None, str(error), (0, 0), compiled=False)


def library_rows(task: Task, profile: Profile) -> Iterator[Row]:
    """Compile a library and run it."""
    made = compile_bundle(Bundle.open(task.bundle), profile)
    sizes = (made.library_bytes, made.weights_bytes)
    box, way, run = way_of(task, profile)
    if isinstance(run, str):
        yield _row(task, profile, box, None, run, sizes)
        return
    yield _row(task, profile, box, run(), way, sizes)


def way_of(task: Task, profile: Profile) -> tuple[str, str, Callable[[], Tokens] | str]:
    """Return the box, the way of running, and what runs it there or the reason why nothing can."""
    reason = misfit(profile)
    match profile:
        case NpuProfile():
            return HERE, SIMULATED, lambda: run_here(task, profile.name)
        case GpuProfile() if profile.language == "opencl":
            return "this machine's CPU as an OpenCL device", ON_POCL, reason or (lambda: run_here(task, profile.name))
        case GpuProfile():
            return f"a GPU with {profile.language}", NOT_RUN, reason or "this project has never had one"
        case CpuProfile() if profile.name in PROCESSORS:
            reason = qemu_aarch64.missing()
            box = f"qemu's {PROCESSORS[profile.name]}"
            return box, UNDER_QEMU, reason or (lambda: run_on_arm(task, profile))
        case CpuProfile() if reason is None:
            return HERE, NATIVELY, lambda: run_here(task, profile.name)
    assert isinstance(profile, CpuProfile)
    return f"{profile.machine} with {profile.system}", NOT_RUN, _why_not(profile, str(reason))


def _why_not(profile: CpuProfile, reason: str) -> str:
    if profile.machine in ("riscv64", "wasm32"):
        return f"apache-tvm has no runtime library for {profile.machine}"
    return reason


def run_here(task: Task, target: str) -> Tokens:
    """Run a library in this process."""
    with LLM(task.bundle, target=target) as llm:
        return tuple(llm.generate(task.prompt, max_tokens=task.tokens).token_ids)


@cache
def arm_root(home: Path) -> Path:
    """Download an arm64 Linux, once."""
    folder = home / "arm64"
    folder.mkdir()
    if (reason := qemu_aarch64.download_root(folder)) is not None:
        raise SystemExit(reason)
    return folder / "root"


def run_on_arm(task: Task, profile: CpuProfile) -> Tokens:
    """Pack for an arm64 Linux and run the folder there."""
    folder = task.home / f"packed-{profile.name}"
    folder.mkdir()
    options = PackOptions(with_graph=False, with_wheels=False, pythons=(qemu_aarch64.PYTHON,))
    pack_cpu(Bundle.open(task.bundle), profile, options, folder)
    qemu_aarch64.install(folder)
    program = ON_ARM.format(prompt=list(task.prompt), tokens=task.tokens)
    done = Arm64Box(arm_root(task.home), PROCESSORS[profile.name]).run(folder, "-c", program)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def c_rows(task: Task, profile: CProfile) -> Iterator[Row]:
    """Pack C sources, build them for this machine and for others, and run the programs."""
    from engram_compilers.c.pack import pack_c  # on use: the C back end may be absent

    folder = task.home / "c"
    folder.mkdir()
    packed = pack_c(Bundle.open(task.bundle), profile, folder)
    program = build_c(folder, ["gcc"])
    yield _row(
        task,
        profile,
        "this machine, gcc",
        run_c(task, [program]),
        NATIVELY,
        (program.stat().st_size, packed.weights_bytes),
    )
    for machine, triple in C_BOXES.items():
        program = build_c(folder, [sys.executable, "-m", "ziglang", "cc", "-target", triple], static=True)
        sizes = (program.stat().st_size, packed.weights_bytes)
        emulator, box = shutil.which(f"qemu-{machine}-static"), f"qemu's {machine}, ziglang {triple}"
        if emulator is None:
            yield _row(task, profile, box, None, f"no qemu-{machine}-static", sizes)
        else:
            yield _row(task, profile, box, run_c(task, [emulator, program]), UNDER_QEMU, sizes)


def build_c(folder: Path, compiler: Sequence[str], *, static: bool = False) -> Path:
    """Build a packed folder's program."""
    line = ["make", "-s", "-C", str(folder), "clean", "engram", f"CC={' '.join(compiler)}"]
    line += ["LDFLAGS=-static"] if static else []
    subprocess.run(line, check=True)
    return folder / "engram"


def run_c(task: Task, command: Sequence[str | Path]) -> Tokens:
    """Run a program on the folder it lies in."""
    prompt = [str(token) for token in task.prompt]
    line = [*command, "-d", Path(command[-1]).parent, "-n", str(task.tokens), *prompt]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return tuple(map(int, done.stdout.split()))


def _row(
    task: Task,
    profile: Profile,
    box: str,
    tokens: Tokens | None,
    way: str,
    sizes: tuple[int, int],
    *,
    compiled: bool = True,
) -> Row:
    return Row(
        target=profile.name,
        box=box,
        compiled=compiled,
        run=NOT_RUN if tokens is None else way,
        reason=way if tokens is None else "",
        same_tokens=None if tokens is None else tokens == task.expected(),
        code_bytes=sizes[0],
        weights_bytes=sizes[1],
    )
