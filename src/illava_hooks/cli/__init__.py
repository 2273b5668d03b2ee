"""The command line: ``illava-hooks``. Parsing and printing, nothing else."""

from __future__ import annotations

import typer

from illava_hooks.cli.batch import batch
from illava_hooks.cli.evidence import bench, evaluate
from illava_hooks.cli.page import demo
from illava_hooks.cli.pictures import ask, info, visualize
from illava_hooks.cli.tuning import tune

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fewer visual tokens inside vision-language models: ask, compare, look inside, measure.",
)
for command in (ask, visualize, info, bench, evaluate, tune, batch, demo):
    app.command()(command)
