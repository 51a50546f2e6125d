"""A box that only runs text: the wheel, its hard dependencies and a compiled bundle; no TVM, torch, ONNX, checkout."""

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny import TinyModel
from tests.workshop import THREADS, Workshop

from engram_runtime import LLM

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROMPT = "The tide comes in"
NOT_INSTALLED = ["tvm", "torch", "onnx", "onnxruntime", "transformers", "matplotlib", "gguf", "pytest"]

Device = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this clone."""
    folder = tmp_path_factory.mktemp("dist")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(pip, check=True)
    (path,) = folder.glob("engram_edge-*.whl")
    return path


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """Install the wheel into an empty environment; returns what runs a program of it, away from the checkout."""
    home = tmp_path_factory.mktemp("device")
    venv.create(home / "venv", with_pip=True)
    # Without the hashes: nobody knows that of the wheel, so pip would refuse it.
    pins = re.findall(r"^\S+==\S+", (ROOT / "locks" / "development.txt").read_text(), flags=re.MULTILINE)
    (home / "constraints.txt").write_text("\n".join(pins))
    programs = home / "venv" / "bin"
    pip: list[str | Path] = [
        programs / "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        home / "constraints.txt",
        wheel,
    ]
    subprocess.run(pip, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = [str(programs / program), *map(str, arguments)]
        return subprocess.run(line, cwd=home, env=environment, capture_output=True, text=True, check=False)

    return run


def test_nothing_but_the_hard_dependencies_is_there(device: Device) -> None:
    code = f"import importlib.util as u; print([n for n in {NOT_INSTALLED!r} if u.find_spec(n)])"
    assert device("python", "-c", code).stdout == "[]\n"


def test_the_packages_are_those_of_the_wheel(device: Device) -> None:
    code = "import engram_runtime, engram_targets, engram_compilers, engram_export as e; print(e.__file__)"
    assert "/site-packages/engram_export/" in device("python", "-c", code).stdout


def test_a_compiled_bundle_gives_the_tokens_it_gives_here(device: Device, workshop: Workshop) -> None:
    bundle = workshop.ready().path
    done = device("engram", "run", bundle, PROMPT, "--max-tokens", 24, "--json")
    with LLM(bundle, threads=THREADS) as llm:
        expected = llm.generate(PROMPT, max_tokens=24)
        lines = "".join(f"{choice}\n" for choice in llm.tables)
    assert (done.returncode, done.stderr) == (0, lines)
    assert json.loads(done.stdout)["token_ids"] == list(expected.token_ids)
    assert json.loads(done.stdout)["executor"] == "tvm"


def test_a_bundle_is_inspected_and_verified(device: Device, workshop: Workshop) -> None:
    inspected = device("engram", "inspect", workshop.ready().path, "--json")
    verified = device("engram", "verify", workshop.ready().path, "--json")
    assert json.loads(inspected.stdout)["libraries"][0]["fits here"]
    assert json.loads(verified.stdout)["digests"] == "ok"


def test_the_help_needs_nothing_else(device: Device) -> None:
    done = device("engram", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "compile" in done.stdout


def test_compiling_says_what_to_install(device: Device, workshop: Workshop) -> None:
    done = device("engram", "compile", workshop.ready().path)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "engram: compiling needs TVM: pip install 'engram-edge[compile]'\n"


def test_exporting_says_what_to_install(device: Device, workshop: Workshop) -> None:
    done = device("engram-export", workshop.checkpoint(TinyModel()), "-o", "bundle")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("engram-export: engram-export needs ")
    assert done.stderr.endswith(": pip install 'engram-edge[export]'\n")


def test_the_other_executor_says_what_to_install(device: Device, workshop: Workshop) -> None:
    done = device("engram", "run", workshop.ready().path, PROMPT, "--executor", "onnxruntime")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == ("engram: the onnxruntime executor needs onnxruntime: pip install 'engram-edge[ort]'\n")


def test_a_checkpoint_is_no_bundle_here(device: Device, workshop: Workshop) -> None:
    checkpoint = workshop.checkpoint(TinyModel())
    done = device("engram", "inspect", checkpoint)
    assert done.returncode == 4
    assert done.stderr.startswith(f"engram: {checkpoint} is no bundle, and reading checkpoints needs ")
    assert done.stderr.endswith(": pip install 'engram-edge[export]'\n")


def test_comparing_with_a_checkpoint_says_what_to_install(device: Device, workshop: Workshop) -> None:
    checkpoint = workshop.checkpoint(TinyModel())
    done = device("engram", "verify", workshop.ready().path, "--against", checkpoint)
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1].startswith("engram: --against needs ")
