"""Perplexity of bundles against their checkpoint as transformers runs it, on Python's own language reference.

    python benchmarks/quality.py SmolLM2-135M-Instruct.Q4_1.gguf build/float.engram build/demo.engram

Tables are off: transformers does not know them.
"""

import pydoc_data.topics
import tempfile
from pathlib import Path

import click

from engram_export.parity import compare_with_transformers
from engram_runtime import Bundle, Session
from engram_runtime.executor import load_executor


def reference_text() -> str:
    """Return prose and code that every Python installation has."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))[20_000:60_000]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--executor", "executors", multiple=True, default=["tvm", "onnxruntime"])
@click.option("--tokens", default=2000, show_default=True)
def main(checkpoint: Path, bundles: tuple[Path, ...], executors: tuple[str, ...], tokens: int) -> None:
    """Compare BUNDLES with CHECKPOINT."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text(reference_text(), encoding="utf-8")
        for path in bundles:
            bundle = Bundle.open(path)
            for name in executors:
                executor = load_executor(name, bundle, threads=None)
                with Session.open(bundle, executor, tables_on=False) as session:
                    figures = compare_with_transformers(session, bundle, checkpoint, text, tokens)
                click.echo(
                    f"{path.name:18} {bundle.manifest.model.quantisation:5} {name:12} {figures['tokens']} tokens  "
                    f"perplexity {figures['perplexity']:.4f}, {figures['perplexity_ratio']:.5f} of float32's  "
                    f"argmax {figures['argmax_agreement']:.2%}  max |difference| {figures['max_abs']:.1e}"
                )


if __name__ == "__main__":
    main()
