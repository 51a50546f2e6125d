"""A6 and A7: files that bring code, as pickles, modules and templates do: none of it may run, or not for long."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.evil_templates import BOMBS, ESCAPES
from tests.faults.parsers_checkpoint import CONFIG, WEIGHTS, write_checkpoint
from tests.faults.parsers_json import use_bundle
from tests.faults.parsers_survey import peak_bytes, scratch
from tests.faults.row import Outcome, Row
from tests.test_bundle import GOLDEN, MAP, TABLE, write_bundle

from engram_export.checkpoint import PICKLE_SUFFIXES, open_checkpoint
from engram_export.outlines.checkpoint import outline_checkpoint
from engram_runtime.chat import ChatTemplate
from engram_runtime.errors import EngramError
from engram_runtime.lens.trace_file import read_trace
from engram_runtime.tables.overlay_file import read_overlay
from engram_runtime.tokenizer import TextTokenizer

SENTINEL = "executed"  # a file that payloads write where they run
MODULE = "from pathlib import Path\nPath(__file__).with_name('executed').write_text('by an import')\n"
MODULES = ("modeling_evil", "configuration_evil", "tokenization_evil", "sitecustomize", "numpy", "torch", "conftest")
AUTO_MAP = {
    "AutoConfig": "configuration_evil.Config",
    "AutoModelForCausalLM": "modeling_evil.Model",
    "AutoTokenizer": ["tokenization_evil.Tokenizer", None],
}
MOST_TEMPLATE_S = 1.0  # of the thread's own time
MOST_TEMPLATE_BYTES = 256 << 20
HELLO = [{"role": "user", "content": "hello"}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

Payload = Callable[[Path], None]  # given an empty folder, lays a trap and uses what is there as the product does


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self._sentinel}'",)


def _pickled(folder: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(Bomb(folder / SENTINEL), protocol)


def _zipped(folder: Path) -> bytes:
    """Return what torch.save writes: a pickle in a zip file."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(folder))
        archive.writestr("archive/version", "3\n")
    return made.getvalue()


def _weights(suffix: str, content: Callable[[Path], bytes]) -> Payload:
    def lay(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / f"pytorch_model{suffix}").write_bytes(content(folder))
        open_checkpoint(folder)

    return lay


def _given_itself(suffix: str) -> Payload:
    def lay(folder: Path) -> None:
        path = folder / f"model{suffix}"
        path.write_bytes(_pickled(folder))
        open_checkpoint(path)

    return lay


def _in_place_of(name: str) -> Payload:
    """Return a pickle in place of a file of a checkpoint."""

    def lay(folder: Path) -> None:
        root = write_checkpoint(folder / "checkpoint")
        (root / name).write_bytes(_pickled(folder))
        checkpoint = open_checkpoint(root)
        assert checkpoint.tokenizer_json is not None
        (folder / "tokenizer.json").write_bytes(checkpoint.tokenizer_json)
        TextTokenizer.load(folder)

    return lay


def _in_bundle(name: str) -> Payload:
    def lay(folder: Path) -> None:
        root = write_bundle(folder / "bundle")
        (root / name).write_bytes(_pickled(folder, 4).ljust((root / name).stat().st_size, b"\0"))
        use_bundle(root)

    return lay


def _read_by(read: Callable[[Path], object]) -> Payload:
    def lay(folder: Path) -> None:
        (folder / "file").write_bytes(_pickled(folder))
        read(folder / "file")

    return lay


def _auto_map(**config: object) -> Payload:
    """Return a checkpoint with code beside it that its config names."""

    def lay(folder: Path) -> None:
        for name in MODULES:
            (folder / f"{name}.py").write_text(MODULE)
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": AUTO_MAP, **config}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO_MAP, "tokenizer_class": "Evil"}))
        outline_checkpoint(folder, quant=None, table_dtype=None, context=None)

    return lay


def _command(folder: Path) -> None:
    """Run a command in a folder that has modules named like those it imports."""
    _auto_map()(folder)
    program = "from engram_runtime.cli import main; main()"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path and Path(path).is_dir())
    command = [sys.executable, "-P", "-c", program, "plan", "."]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if "Traceback" in done.stderr:
        raise RuntimeError(f"the command itself doesn't run: {done.stderr[-500:]}")


PAYLOADS: Mapping[str, Payload] = {
    **{f"pickle in pytorch_model{suffix}": _weights(suffix, _pickled) for suffix in PICKLE_SUFFIXES},
    "zip of torch.save": _weights(".bin", _zipped),
    **{f"pickle given as model{suffix}": _given_itself(suffix) for suffix in (".pt", ".pkl", ".gguf", ".safetensors")},
    "pickle named model.safetensors": _weights(".safetensors", _pickled),
    **{f"pickle for {name}": _in_place_of(name) for name in ("config.json", "tokenizer.json", "tokenizer_config.json")},
    **{f"pickle for a bundle's {name}": _in_bundle(name) for name in ("engram.json", GOLDEN, MAP, TABLE)},
    "pickle for an overlay": _read_by(read_overlay),
    "pickle for a trace": _read_by(read_trace),
    "auto_map": _auto_map(),
    "auto_map of an unknown model": _auto_map(model_type="evil", architectures=["EvilModel"]),
    "modules where a command runs": _command,
}


def payloads(count: int) -> Outcome:
    """Lay every trap and use what is there."""
    failures = []
    for name, lay in PAYLOADS.items():
        with scratch() as folder:
            before = set(sys.modules)
            with contextlib.suppress(EngramError):  # most are refused; code beside a sound checkpoint is left alone
                lay(folder)
            ran = [str(path) for path in folder.rglob(SENTINEL)] + sorted((set(sys.modules) - before) & set(MODULES))
        if ran:
            failures.append(f"{name}: {ran}")
    survived = len(PAYLOADS) - len(failures)
    figure = f"{len(failures)} of {len(PAYLOADS)} ran"
    return Outcome(tried=len(PAYLOADS), survived=survived, figure=figure, failures=tuple(failures))


def templates(count: int) -> Outcome:
    """Render every evil template; after each, a plain one must still give its prompt."""
    failures, slowest, largest = [], 0.0, 0
    usual = peak_bytes()
    for name, source in _templates():
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        begun = time.thread_time()
        wrong = ""
        try:
            text = ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO)
            wrong = f"it gave {text[:100]!r}"
        except EngramError:
            pass
        seconds, grown = time.thread_time() - begun, peak_bytes() - usual
        slowest, largest = max(slowest, seconds), max(largest, grown)
        if seconds > MOST_TEMPLATE_S or grown > MOST_TEMPLATE_BYTES:
            wrong = f"{seconds:.2f} s and {grown / 2**20:.0f} MiB"
        if ChatTemplate(PLAIN, {}).render(HELLO) != "<user>hello":
            wrong = "a plain template gives something else after it"
        if wrong:
            failures.append(f"{name}: {wrong}")
    tried = sum(1 for _ in _templates())
    return Outcome(
        tried=tried,
        survived=tried - len(failures),
        figure=f"at most {slowest:.2f} s and {largest / 2**20:.0f} MiB",
        failures=tuple(failures[:20]),
    )


def _templates() -> Iterator[tuple[str, str]]:
    yield from ((source, source) for source in ESCAPES)
    yield from BOMBS.items()


ROWS = (
    Row(
        name="A6",
        fault="pickles in place of every kind of file, code beside a model that its config names by auto_map",
        expected="refused or left alone; 0 run",
        quick=20,
        full=20,
        run=payloads,
    ),
    Row(
        name="A7",
        fault="chat templates that try to leave the sandbox, to run without end or to fill the memory",
        expected="an error in 1 s of the processor and 256 MiB; the next template renders",
        quick=50,
        full=50,
        run=templates,
    ),
)
