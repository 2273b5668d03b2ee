"""The command ``tune``."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from illava_hooks.cli.options import (
    AsJson,
    BatchSize,
    Debug,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    check_target,
    friendly,
)
from illava_hooks.errors import InputError

__all__ = ["tune"]


@friendly
def tune(
    items: Annotated[
        str,
        typer.Option(
            "--items", "--input", help="A folder of images or videos, a JSONL file, or scenes, pairs, clips (drawn)."
        ),
    ],
    model: Model = "tiny",
    question: Annotated[
        list[str] | None, typer.Option(help="To every picture of a folder; may be given several times.")
    ] = None,
    flops: Annotated[
        str | None, typer.Option(help="Cost: prefill FLOPs of the unpatched model's, 0.5; by default the preset's.")
    ] = None,
    loyalty: Annotated[
        str | None, typer.Option(help="Instead: the cheapest that keeps this share of answers, 0.98.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="The file of settings; rows, front and picture get names beside it.")
    ] = Path("tuned.json"),
    methods: Annotated[
        str, typer.Option(help="Names, separated by commas; by default all but the controls and illava-reference.")
    ] = "",
    pictures: Annotated[
        int | None, typer.Option(help="How many at most; by default 200, or all of a JSONL file.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for all.")] = 15,
    rounds: Annotated[int, typer.Option(help="Of the search.")] = 3,
    measurements: Annotated[
        int | None, typer.Option(help="Of the search at most: what a run that ran out of time says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all choices.")] = 0,
    batch_size: BatchSize = 32,
    max_new_tokens: MaxNewTokens = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Choose method, layers and amounts from pictures of your own, without answers, for a wanted cost or loyalty."""
    from illava_hooks.tools.bench.plot import PLOT_CURE
    from illava_hooks.tools.loading import (
        EMBEDDED,
        EMBEDDED_QUESTION,
        QUESTION,
        load_model,
        parse_fraction,
        quiet,
    )
    from illava_hooks.tools.progress import status
    from illava_hooks.tools.tune import plot_front, print_tuning, write_front
    from illava_hooks.tools.tune import tune as search

    quiet()
    check_target("--output", output)
    if output.suffix != ".json":
        raise InputError(f"--output is {str(output)!r}; give a file that ends in .json, as --preset takes it")
    front = output.with_suffix(".front.json")
    with status(f"loading {model}"):
        loaded = load_model(model, device, dtype)
    found = search(
        *loaded,
        items,
        question=question,
        flops=parse_fraction(flops, "--flops"),
        loyalty=parse_fraction(loyalty, "--loyalty"),
        methods=[name.strip() for name in methods.split(",") if name.strip()] if methods else None,
        pictures=pictures,
        minutes=minutes,
        rounds=rounds,
        measurements=measurements,
        seed=seed,
        rows=output.with_suffix(".rows.jsonl"),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        default_question=EMBEDDED_QUESTION if model in EMBEDDED else QUESTION,
    )
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        print_tuning(found)
    write_front(found, front)
    written = [str(front)]
    if importlib.util.find_spec("matplotlib"):
        plot_front(found, front.with_suffix(".png"))
        written.append(str(front.with_suffix(".png")))
    else:
        print(f"no picture of the front: {PLOT_CURE}", file=sys.stderr)
    if found.config is None:
        print(f"written: {', '.join(written)}; no settings", file=sys.stderr)
        raise typer.Exit(1)
    found.save(output)
    print(f"written: {', '.join([str(output), *written])}", file=sys.stderr)
    if not as_json:
        print(f"use it: patch(model, preset={str(output)!r}), or --preset {output}")
