"""`pst`: the command line. Each command lives in its own file of `commands/` and is imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from .errors import ProxSparseError
from .process import end_of, run

# command name -> (module, attribute, one line of help); the help stands here so that `pst --help` imports no command.
COMMANDS = {
    "prune": ("prune", "prune", "Learn or compute 2:4 masks and write the pruned model."),
    "compare": ("compare", "compare", "Run several methods on the same text and print one table."),
    "eval": ("eval", "evaluate", "Perplexity and lm-eval tasks of a model, dense and pruned in one run."),
    "verify": ("verify", "verify", "Check layer by layer that a model folder is 2:4."),
    "export": ("export", "export", "Write a pruned model as a dense folder, as masks, or packed."),
    "report": ("report", "report", "Write one HTML page of finished runs: curves, layers, settings."),
    "bench": ("bench", "bench", "Measure the operations and the learning loop on this machine."),
    "info": ("info", "info", "Versions, devices and the backends that will be used."),
}


class _Group(click.Group):
    """Loads commands lazily and turns explained errors into one line on stderr and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f".commands.{module}", __package__), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"commands/{module}.py: {attribute} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ProxSparseError as error:
            if ctx.params.get("debug"):
                raise
            ctx.exit(end_of(error))
        except KeyboardInterrupt as error:
            sys.exit(end_of(error))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a process of its own, whose every ending is one line; `main`, which tests call, lets a bug show itself."""
        run(lambda: self.main(*args, **kwargs))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="proxsparse-triton")
def main(debug: bool) -> None:
    """Make pretrained language models 2:4 sparse: learn which 2 of every 4 weights to keep.

    MODEL is a Hub id, a local folder, or `demo` (a small trained model that ships with this package).
    """


if __name__ == "__main__":
    main()
