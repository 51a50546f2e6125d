"""``engram chat``: a conversation on the terminal."""

from pathlib import Path
from typing import Any

import click

from engram_runtime.commands.loading import Loading, loading_options, trace_option
from engram_runtime.commands.options import bundle_argument, sampling_options
from engram_runtime.commands.run import acceptance, summary
from engram_runtime.errors import RequestError, TableError
from engram_runtime.generation import Generation
from engram_runtime.llm import LLM
from engram_runtime.sampling import SamplingOptions
from engram_runtime.terminal import harmless, show

HELP = """/help   show this
/reset  forget the conversation
/stats  figures of the last answer
/exit   leave (so does Ctrl-D)"""


@click.command()
@bundle_argument
@click.option("--system", help="System message at the beginning of the conversation.")
@sampling_options
@loading_options
@trace_option
def chat(
    bundle: Path, system: str | None, max_tokens: int, loading: Loading, trace: Path | None, **sampling: Any
) -> None:
    """Talk with the model in BUNDLE; /help lists the commands."""
    options = SamplingOptions(**sampling)
    beginning = [{"role": "system", "content": system}] if system else []
    with loading.load(bundle, trace) as llm:
        messages = list(beginning)
        while (line := _read_line()) is not None:
            match line.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/help":
                    click.echo(HELP)
                case "/reset":
                    messages = list(beginning)
                case "/stats":
                    click.echo("no answer yet" if llm.last is None else _stats(llm.last))
                case command if command.startswith("/"):
                    click.echo(f"{command} is no command; /help lists them")
                case text:
                    _answer(llm, messages, text, max_tokens, options)


def _stats(answer: Generation) -> str:
    return summary(answer) if answer.drafts is None else f"{summary(answer)}\n{acceptance(answer)}"


def _read_line() -> str | None:
    try:
        return str(click.prompt("", prompt_suffix="> ", default="", show_default=False))
    except click.Abort:
        click.echo()
        return None


def _answer(llm: LLM, messages: list[dict[str, str]], text: str, max_tokens: int, options: SamplingOptions) -> None:
    """Print the answer and keep both messages; a request that can't be answered changes nothing."""
    question = {"role": "user", "content": text}
    pieces: list[str] = []
    try:
        for piece in llm.chat([*messages, question], max_tokens=max_tokens, sampling=options):
            pieces.append(piece)
            show(piece, nl=False)
    except RequestError as error:
        click.echo(harmless(f"{error}; /reset begins anew"), err=True)
        return
    except TableError as error:
        click.echo(harmless(str(error)), err=True)
        return
    click.echo()
    messages += [question, {"role": "assistant", "content": "".join(pieces)}]
