"""Run a library's decoder in all ways once: ``python -m engram_runtime.trust.trial_run BUNDLE TARGET DIGEST``.

The caller has found that it may run.
"""

import contextlib
import importlib
import sys
from pathlib import Path

from engram_runtime.bundle import Bundle
from engram_runtime.command_line import run
from engram_runtime.errors import TargetError
from engram_runtime.executor import Executor
from engram_runtime.executors.compiled import DEVICES
from engram_runtime.library import LibraryInfo, find_library
from engram_runtime.parallel.sessions import JointSessions
from engram_runtime.session import UNLOADED, Session, close_sites, open_sites

THREADS = 1


def try_library(path: Path, target: str, digest: str) -> None:
    """Load the library and run it."""
    bundle = Bundle.open(path)
    folder, info = find_library(bundle, target)
    if info.digest != digest:
        raise TargetError(f"library {folder} has changed since it was looked at; load it again")
    module = importlib.import_module(DEVICES[info.device])
    run_passes(bundle, info, module.open_library(bundle, folder, info, threads=THREADS))


def run_passes(bundle: Bundle, info: LibraryInfo, executor: Executor) -> None:
    """Run each number of tokens, with the logits of one and of all, and the largest number of sequences."""
    context = bundle.manifest.model.context_length
    with contextlib.ExitStack() as opened:
        sites = open_sites(bundle, UNLOADED, executor)
        opened.callback(close_sites, sites)
        sequences = max(info.batches, default=1)
        sessions = [opened.enter_context(Session(bundle, executor, sites)) for _ in range(sequences)]
        for tokens in sorted({tokens for tokens, _ in info.passes if tokens <= context}):
            for run_tokens in (sessions[0].prefill, sessions[0].decode):
                run_tokens([0] * tokens)
                sessions[0].trim(len(sessions[0]))
        joint = opened.enter_context(JointSessions(sessions))
        joint.decode(range(sequences), [0] * sequences)


if __name__ == "__main__":
    run(lambda: try_library(Path(sys.argv[1]), *sys.argv[2:]), "engram")
