"""Makes tiny bundles and libraries once for all tests, and runs them."""

import contextlib
import dataclasses
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from tests.published import check_manifest
from tests.tiny import VOCAB, TinyModel, TinySite, add_sites, save_checkpoint, save_gguf, save_site_folder
from tests.tiny_families import TinyFamily, save_family

from engram_compilers.build import compile_bundle
from engram_compilers.kernels import loops
from engram_export.pipeline import ExportOptions, Progress, export_bundle
from engram_export.plan import ExportPlan
from engram_export.verify import Verification
from engram_runtime.bundle import Bundle
from engram_runtime.executor import load_executor
from engram_runtime.session import Session, close_sites, open_sites
from engram_targets import CpuProfile, load_cpu_profile

THREADS = 2
SMALL_PASSES = (1, 2, 4)  # of libraries that several tests share; one alone compiles in less than half the time


class SilentReporter:
    """Shows nothing, but keeps the plan."""

    def __init__(self) -> None:
        self.plans: list[ExportPlan] = []

    def plan(self, plan: ExportPlan) -> None:
        self.plans.append(plan)

    def step(self, title: str) -> None:
        pass

    @contextlib.contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Progress]:
        yield lambda count: None


def export_options(checkpoint: Path, out: Path, **changes: Any) -> ExportOptions:
    """Return the options of a float export, or what ``changes`` make of them; int4 is rounded without calibration."""
    options = ExportOptions(
        checkpoint=checkpoint,
        out=out,
        quant="none",
        calibration="none",
        tables="copy",
        context=None,
        engram=None,
        replace=False,
    )
    return dataclasses.replace(options, **changes)


def export(checkpoint: Path, out: Path, **changes: Any) -> Verification:
    """Export a float bundle, or what ``changes`` of the options say, whose manifest fits the published schema."""
    verification = export_bundle(export_options(checkpoint, out, **changes), SilentReporter())
    check_manifest(out)
    return verification


def tiny_profile(**changes: Any) -> CpuProfile:
    """Return this machine's profile with few forward passes, which is quick to compile."""
    profile = dataclasses.replace(load_cpu_profile("native"), decode_tokens=(1,), prefill_tokens=(8,))
    return dataclasses.replace(profile, **changes)


class Workshop:
    """Makes each checkpoint, bundle and library once; a test that changes one works on a copy of it.

    Processes that run tests at once have one workshop, in one folder: what one makes the others wait for.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(exist_ok=True)

    def checkpoint(self, model: TinyModel, *sites: TinySite) -> Path:
        """Return a checkpoint with sites in its own config."""

        def make(folder: Path) -> None:
            save_checkpoint(folder, model)
            if sites:
                add_sites(folder, *sites)

        return self._once(f"{model} {sites}", "checkpoint", make)

    def family(self, family: TinyFamily) -> Path:
        """Return a checkpoint of a family with experts."""
        key = f"{family}".replace(f"{family.rewrite}", family.rewrite.__qualname__)
        return self._once(key, "checkpoint", lambda folder: save_family(folder, family))

    def site_folder(self, model: TinyModel, site: TinySite) -> Path:
        """Return a folder for ``--engram``."""
        plain = self.checkpoint(model)
        return self._once(f"folder {model} {site}", "site", lambda folder: save_site_folder(folder, plain, site))

    def gguf(self, kind: GGMLQuantizationType, model: TinyModel) -> Path:
        """Return a GGUF file of a checkpoint."""
        plain = self.checkpoint(model)
        return self._once(f"gguf {kind} {model}", "tiny.gguf", lambda path: save_gguf(path, plain, kind))

    def bundle(self, checkpoint: Path, **changes: Any) -> Bundle:
        """Return the bundle of a checkpoint."""
        key = f"bundle {checkpoint} {sorted(changes.items())}"
        return Bundle.open(self._once(key, "bundle", lambda out: export(checkpoint, out, **changes)))

    def compiled(
        self,
        bundle: Bundle,
        kernels: str = "portable",
        *,
        always_parallel: bool = False,
        mcpu: str | None = None,
        **changes: Any,
    ) -> Bundle:
        """Return a copy of a bundle with a library made of a kernel family.

        Args:
            always_parallel: share even the smallest kernel among threads; tiny ones run on one otherwise.
            mcpu: another processor that LLVM generates code for.
            changes: other values of the profile.
        """
        profile = tiny_profile(kernels=kernels, **changes)
        if mcpu is not None:
            profile = dataclasses.replace(profile, llvm=dataclasses.replace(profile.llvm, mcpu=mcpu))

        def make(folder: Path) -> None:
            shutil.copytree(bundle.path, folder)
            with pytest.MonkeyPatch.context() as patch:
                if always_parallel:
                    patch.setattr(loops, "PARALLEL_FROM_US", 0.0)
                compile_bundle(Bundle.open(folder), profile)

        key = f"compiled {bundle.path} {kernels} {always_parallel} {mcpu} {sorted(changes.items())}"
        return Bundle.open(self._once(key, "compiled", make))

    def uncompiled(self) -> Bundle:
        """Return an int8 bundle with a tied head and a site with a window."""
        return self.bundle(self.checkpoint(TinyModel(), TinySite()), quant="int8")

    def ready(self) -> Bundle:
        """Return `uncompiled` with a library, all of whose kernels run in parallel."""
        return self.compiled(self.uncompiled(), always_parallel=True, decode_tokens=SMALL_PASSES)

    def positional(self) -> Bundle:
        """Return a compiled bundle with a site all of whose states roll back, all of whose kernels run in parallel."""
        checkpoint = self.checkpoint(TinyModel(), TinySite(convolution=False))
        return self.compiled(self.bundle(checkpoint, quant="int8"), always_parallel=True, decode_tokens=SMALL_PASSES)

    def _once(self, key: str, name: str, make: Callable[[Path], object]) -> Path:
        assert " at 0x" not in key, f"{key} is another one in another process"
        folder = self._root / hashlib.sha256(f"{key} {name}".encode()).hexdigest()[:16]
        made = folder.with_suffix(".made")
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder / name)
                made.touch()
        return folder / name


@contextlib.contextmanager
def open_session(
    bundle: Bundle, executor: str = "onnxruntime", *, tables_on: bool = True, threads: int = THREADS
) -> Iterator[Session]:
    """Open a session on a loaded bundle."""
    loaded = load_executor(executor, bundle, threads=threads)
    with contextlib.ExitStack() as opened:
        sites = open_sites(bundle)
        opened.callback(close_sites, sites)
        yield opened.enter_context(Session(bundle, loaded, sites, tables_on=tables_on))


def random_ids(count: int, seed: int = 0) -> list[int]:
    """Return random ids of the tiny vocabulary."""
    ids: list[int] = np.random.default_rng(seed).integers(0, VOCAB, size=count).tolist()
    return ids


def bundle_logits(
    bundle: Bundle,
    token_ids: Sequence[int],
    executor: str = "onnxruntime",
    *,
    tables_on: bool = True,
    threads: int = THREADS,
) -> NDArray[np.float32]:
    """Run a text through a new session, ``[T, V]``."""
    with open_session(bundle, executor, tables_on=tables_on, threads=threads) as session:
        return np.concatenate(list(session.logits(token_ids)))


def stepwise_logits(bundle: Bundle, token_ids: Sequence[int], executor: str) -> NDArray[np.float32]:
    """Run a text through a new session one token at a time, ``[T, V]``."""
    with open_session(bundle, executor) as session:
        return np.concatenate([session.decode([token_id]) for token_id in token_ids])


def copy_folder(source: Path, target: Path) -> Path:
    """Copy a checkpoint or bundle that a test is going to damage."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        path.chmod(path.stat().st_mode | 0o200)  # files of a bundle can't be written
    return target


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
