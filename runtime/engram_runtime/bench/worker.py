"""A runner in a process of its own: requests come as JSON lines on stdin, answers go as JSON lines to stdout.

Run as a file by `engram_runtime.bench.process`. It imports nothing but the standard library before it is told what to
load, so that the time an engine takes to import can be told.

    {"do": "load", "runner": "tvm", "model": "x.engram", ..}  ->  {"load_s": .., "build": .., ..}
    {"do": "decode", "depth": 0, "tokens": 32}                ->  {"seconds": ..}, see engram_runtime.bench.runner
    {"do": "memory"}                                          ->  {"rss_anon_mb": .., "rss_file_mb": ..}

An error a user can act on is answered by {"error": class, "message": text}.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

# name -> what the engine's users import, the engine itself included, and the module here that drives it
BUNDLE_RUNNER = "engram_runtime.bench.bundle_runner"
RUNNERS = {
    "tvm": (("engram_runtime", "engram_runtime.executors.tvm_library"), BUNDLE_RUNNER),
    "onnxruntime": (("engram_runtime", "engram_runtime.executors.onnxruntime_session"), BUNDLE_RUNNER),
    "llama.cpp": (("llama_cpp",), "engram_runtime.bench.llama_cpp_runner"),
}


def load(name: str, model: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a runner, and how long it took to get to the first token of a prompt of one."""
    engine, driver = RUNNERS[name]
    started = time.perf_counter()
    for module in engine:
        importlib.import_module(module)
    imported = time.perf_counter()
    make = importlib.import_module(driver).load
    ready = time.perf_counter()
    runner = make(name, model, **options)
    loaded = time.perf_counter()
    runner.prefill([0]).argmax()
    first = time.perf_counter()
    facts = {key: getattr(runner, key) for key in ("name", "build", "threads", "weight_bytes", "tables")}
    times = {"import_s": imported - started, "load_s": loaded - ready, "first_token_s": first - loaded}
    return runner, {**facts, **times}


def answer(runner: Any, request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Do what is asked; returns the runner and the answer."""
    match request.pop("do"):
        case "load":
            return load(request.pop("runner"), request.pop("model"), request)
        case "memory":
            return runner, importlib.import_module("engram_runtime.bench.memory").resident_mb()
        case measurement:
            measurements = importlib.import_module("engram_runtime.bench.runner").MEASUREMENTS
            return runner, measurements[measurement](runner, **request)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an engine prints must not get among the answers
    runner = None
    for line in sys.stdin:
        try:
            runner, found = answer(runner, json.loads(line))
        except importlib.import_module("engram_runtime.errors").EngramError as error:  # imported once there is one
            found = {"error": type(error).__name__, "message": str(error)}
        answers.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
