"""The command line: ``illava-hooks``. Parsing and printing, nothing else."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from illava_hooks.cli.batch import batch
from illava_hooks.cli.evidence import bench, evaluate
from illava_hooks.cli.options import unbroken_output
from illava_hooks.cli.page import demo
from illava_hooks.cli.pictures import ask, info, visualize
from illava_hooks.cli.tuning import tune

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fewer visual tokens inside vision-language models: ask, compare, look inside, measure.",
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"illava-hooks {version('illava-hooks')}")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    unbroken_output()


for command in (ask, visualize, info, bench, evaluate, tune, batch, demo):
    app.command()(command)
