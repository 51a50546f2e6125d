"""Groups of commands that import a command when it is called."""

import importlib
from collections.abc import Mapping
from typing import Any

import click

from engram_runtime.errors import TargetError


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def __init__(self, *args: Any, modules: Mapping[str, str], **kwargs: Any) -> None:
        """Make a group of commands by name, each ``module:attribute``."""
        super().__init__(*args, **kwargs)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order they were given."""
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; raises TargetError where its package is not installed."""
        if cmd_name not in self._modules:
            return None
        module, _, attribute = self._modules[cmd_name].partition(":")
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise TargetError(
                f"engram {cmd_name} needs {error.name}: pip install 'engram-edge[export,compile,ort]'"
            ) from error
        return command
