"""The four packages: imports run export -> compilers -> targets -> runtime, and a device needs no more than it must."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from engram_runtime.cli import COMMANDS, cli
from engram_runtime.executor import EXECUTORS

ROOT = Path(__file__).parents[1]
FOLDERS = {  # lowest first: a package may import itself and those before it
    "engram_runtime": "runtime",
    "engram_targets": "targets",
    "engram_compilers": "compilers",
    "engram_export": "export",
}
PACKAGES = list(FOLDERS)
# What neither a device nor `import engram_runtime` has to do with.
HEAVY = ["torch", "onnx", "tvm", "transformers", "matplotlib", "gguf", "ml_dtypes", "onnxscript", "onnx_ir"]
ENGINES = {
    "cryptography": "engram_runtime.trust.signature",
    "onnxruntime": "engram_runtime.executors.onnxruntime_session",
    "pyopencl": "engram_runtime.gpu.opencl",
    "ray": "engram_runtime.batch.ray_pipeline",
    "tvm_ffi": "engram_runtime.executors.tvm_library",
}
NPU_EXECUTOR = "engram_runtime.npu.executor"  # which imports that of tvm_ffi
OWN_EXTRAS = ("ort", "opencl", "plot", "serve", "sign", "ray")  # of the runtime
# Of distributions whose modules are called otherwise.
IMPORT_NAMES = {"apache-tvm-ffi": "tvm_ffi", "prometheus-client": "prometheus_client"}
# Names of modules that are imported when a command asks for them, the only way to point upwards.
NAMED_UPWARDS = {
    ("engram_runtime.cli", "engram_compilers.cli:compile_command"),
    ("engram_runtime.cli", "engram_compilers.tuning.cli:tune"),
    ("engram_runtime.cli", "engram_targets.cli:targets"),
    ("engram_runtime.cli", "engram_compilers.pack.cli:pack_command"),
    ("engram_runtime.commands.bench", "engram_export.gguf_sizes"),
    ("engram_runtime.commands.bench", "engram_export.gguf_writer"),
    ("engram_runtime.commands.inspect", "engram_export.inspection"),
    ("engram_runtime.commands.plan", "engram_export.outlines.checkpoint"),
    ("engram_runtime.commands.verify", "engram_export.parity"),
    ("engram_runtime.lens.repack_errors", "engram_export.repack"),
    ("engram_runtime.planning.targets", "engram_targets"),
}

# Imports every module of a package but those left out, where some packages are not installed; prints as JSON which of
# the watched packages each module loaded, and what became of modules that could not be imported.
IMPORT_ALL = """
import importlib, importlib.abc, json, pkgutil, sys

package, left_out, missing, watched = json.loads(sys.argv[1])

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())

def loaded():
    return {name.partition(".")[0] for name in sys.modules} & set(watched)

root = importlib.import_module(package)
loads, errors = {package: sorted(loaded())}, {}
for module in pkgutil.walk_packages(root.__path__, package + "."):
    if module.name in left_out:
        continue
    before = loaded()
    try:
        importlib.import_module(module.name)
    except Exception as error:
        errors[module.name] = f"{type(error).__name__}: {error}"
    loads[module.name] = sorted(loaded() - before)
print(json.dumps([loads, errors]))
"""


def import_all(
    package: str, *, left_out: Sequence[str] = (), missing: Sequence[str] = (), watched: Sequence[str] = ()
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Import a package in a process of its own; return what each module loaded, and errors by module."""
    arguments = json.dumps([package, left_out, missing, watched])
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, arguments], capture_output=True, text=True, check=True)
    loads, errors = json.loads(done.stdout)
    return loads, errors


def sources(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield name and syntax tree of every module of a package."""
    for path in sorted((ROOT / FOLDERS[package]).rglob("*.py")):
        relative = path.relative_to(ROOT / FOLDERS[package]).with_suffix("")
        name = ".".join(part for part in relative.parts if part != "__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported_roots(tree: ast.Module) -> set[str]:
    """Return the top-level packages a module imports anywhere; relative imports stay in their own."""
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.partition(".")[0] for name in plain | named}


def module_names(tree: ast.Module) -> set[str]:
    """Return the strings of a module that are names of the project's modules."""
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in strings if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w*)*(:\w+)?", text)}


def above(package: str) -> list[str]:
    return PACKAGES[PACKAGES.index(package) + 1 :]


def declared_modules() -> set[str]:
    """Return the modules of the runtime's dependencies as pyproject.toml declares them."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    distributions = [*project["dependencies"], *(each for name in OWN_EXTRAS for each in extras[name])]
    names = [re.split(r"[<>=!~ \[;]", distribution)[0] for distribution in distributions]
    return {IMPORT_NAMES.get(name, name).lower() for name in names}


def test_the_runtime_loads_neither_heavy_packages_nor_those_above_it() -> None:
    # apache-tvm-ffi itself imports torch where there is one, and Ray takes a second; the next test covers them.
    loads, errors = import_all(
        "engram_runtime",
        left_out=[ENGINES["tvm_ffi"], NPU_EXECUTOR, ENGINES["ray"]],
        watched=[*HEAVY, *above("engram_runtime"), *ENGINES],
    )
    found = {module: roots for module, roots in loads.items() if roots}
    assert (found, errors) == ({ENGINES[name]: [name] for name in ("cryptography", "onnxruntime", "pyopencl")}, {})


def test_every_module_of_the_runtime_can_be_imported_where_nothing_else_is_installed() -> None:
    loads, errors = import_all(
        "engram_runtime", missing=[*HEAVY, *above("engram_runtime")], watched=[*HEAVY, *above("engram_runtime")]
    )
    assert errors == {}
    assert set(loads) == {name for name, _ in sources("engram_runtime")}
    assert [roots for roots in loads.values() if roots] == []


def test_what_runs_on_a_missing_engine_says_how_to_install_it() -> None:
    _, errors = import_all("engram_runtime", missing=[*HEAVY, *ENGINES])
    lacks_tvm_ffi = "TargetError: the tvm executor needs apache-tvm-ffi: pip install engram-edge"
    assert errors == {
        ENGINES["cryptography"]: "TargetError: signatures need cryptography: pip install 'engram-edge[sign]'",
        ENGINES["onnxruntime"]: (
            "TargetError: the onnxruntime executor needs onnxruntime: pip install 'engram-edge[ort]'"
        ),
        ENGINES["pyopencl"]: "TargetError: libraries for OpenCL need pyopencl: pip install 'engram-edge[opencl]'",
        ENGINES["ray"]: "TargetError: batches on Ray need ray: pip install 'engram-edge[ray,serve]'",
        ENGINES["tvm_ffi"]: lacks_tvm_ffi,
        NPU_EXECUTOR: lacks_tvm_ffi,
    }


def test_targets_load_neither_heavy_packages_nor_those_above_them() -> None:
    loads, errors = import_all("engram_targets", watched=[*HEAVY, *above("engram_targets"), *ENGINES])
    assert ([roots for roots in loads.values() if roots], errors) == ([], {})


def test_compilers_load_nothing_of_the_exporter() -> None:
    loads, errors = import_all("engram_compilers", watched=above("engram_compilers"))
    assert ([roots for roots in loads.values() if roots], errors) == ([], {})
    assert set(loads) == {name for name, _ in sources("engram_compilers")}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_a_package_above_its_own(package: str) -> None:
    found = {name: imported_roots(tree) & set(above(package)) for name, tree in sources(package)}
    assert {name: roots for name, roots in found.items() if roots} == {}


def test_modules_above_are_named_only_where_commands_look_them_up() -> None:
    found = {
        (name, text)
        for package in PACKAGES
        for name, tree in sources(package)
        for text in module_names(tree)
        if re.split("[.:]", text)[0] in above(package)
    }
    assert found == NAMED_UPWARDS


def test_the_command_line_names_modules_above_only_in_its_table() -> None:
    names = dict(sources("engram_runtime"))["engram_runtime.cli"]
    assert {text for text in module_names(names) if ":" in text} == set(COMMANDS.values())


def test_the_runtime_imports_nothing_but_its_declared_dependencies() -> None:
    allowed = {*sys.stdlib_module_names, "engram_runtime", *declared_modules()}
    found = {name: imported_roots(tree) - allowed for name, tree in sources("engram_runtime")}
    assert {name: roots for name, roots in found.items() if roots} == {}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_found_and_shows_its_usage(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"], prog_name="engram")
    assert (result.exit_code, result.output.split()[:3]) == (0, ["Usage:", "engram", name])


def test_the_commands_are_listed_in_the_order_of_their_table() -> None:
    output = CliRunner().invoke(cli, ["--help"], prog_name="engram").output
    assert re.findall(r"^  (\w+)  ", output.partition("Commands:")[2], re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("target", [text.partition(":")[0] for _, text in sorted(NAMED_UPWARDS)])
def test_modules_named_upwards_exist(target: str) -> None:
    assert importlib.util.find_spec(target) is not None


def test_every_executor_is_a_module_of_the_runtime() -> None:
    modules = {name for name, _ in sources("engram_runtime")}
    assert set(EXECUTORS.values()) <= modules
