"""The commands ``bench`` and ``evaluate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from illava_hooks.cli.options import (
    AsJson,
    BatchSize,
    Debug,
    Device,
    Dtype,
    Keep,
    LlmLayers,
    LlmRatio,
    MaxNewTokens,
    MethodName,
    Model,
    Preset,
    VitLayers,
    VitR,
    check_target,
    friendly,
    merge_settings,
)
from illava_hooks.errors import InputError

__all__ = ["bench", "evaluate"]

_PICTURES = (".png", ".pdf", ".svg", ".jpg", ".webp")


@friendly
def bench(
    context: typer.Context,
    shape: Annotated[
        str | None, typer.Option(help="A published shape with random weights; any other word lists them.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A folder or a hub name instead of a shape.")] = None,
    tiles: Annotated[int, typer.Option(help="Tiles of the image with the base tile, for models that cut it.")] = 3,
    images: Annotated[int, typer.Option(help="Images in a prompt.")] = 1,
    frames: Annotated[int, typer.Option(help="Frames of a video instead of images.")] = 0,
    patches: Annotated[int, typer.Option(help="Patches per image or frame, for models that take any size.")] = 4096,
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    text: Annotated[int, typer.Option(help="Text tokens of a prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Generated tokens.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each kind, in turn, after a warm-up.")] = 3,
    narrow: Annotated[bool, typer.Option("--narrow", help="A narrow shape, for smoke tests.")] = False,
    attention: Annotated[str, typer.Option(help="Attention back-end of a shape.")] = "sdpa",
    vit_layers: VitLayers = None,
    vit_r: VitR = None,
    llm_layers: LlmLayers = None,
    llm_ratio: LlmRatio = None,
    keep: Keep = None,
    method: MethodName = None,
    preset: Preset = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    sweep: Annotated[
        str | None, typer.Option(help="One row for each of tiles, frames, patches, new or methods.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Every run in a process of its own, in turn.")] = False,
    plot: Annotated[Path | None, typer.Option(help="A picture to write.")] = None,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure prefill, decoding, memory and the cost of merging, without and with it in turn."""
    from illava_hooks.tools import bench as tool
    from illava_hooks.tools.loading import find_device, find_dtype, load_model, quiet
    from illava_hooks.tools.progress import Bar, status

    quiet()
    if (shape is None) == (model is None):
        raise InputError("give one of --shape (random weights) and --model (a folder or a hub name)")
    check_target("--plot", plot)
    if plot is not None and plot.suffix.lower() not in ("", *_PICTURES):
        raise InputError(f"--plot is {str(plot)!r}; end it with one of {', '.join(_PICTURES)}")
    if fresh and sweep:
        raise InputError("give one of --fresh and --sweep")
    load = tool.Workload(tiles, images, frames, patches, batch, text, new_tokens)
    settings = merge_settings(vit_layers, vit_r, llm_layers, llm_ratio, keep, method, preset)
    bar = Bar()
    if fresh:
        bar.begin(2 * rounds, "runs")
        bar.step("each in a process of its own")
        found = [tool.compare_fresh(_again(context.params), rounds, bar)]
    else:
        network: Any
        with status(f"loading {shape or model}"):
            if shape is not None:
                target = find_device(device)
                network = tool.build_shape(
                    shape, str(target), find_dtype(dtype, target, "bfloat16"), attention, narrow
                )
            else:
                network, _ = load_model(str(model), device, dtype)
        if only:
            print(json.dumps(tool.measure_once(network, load, settings, only == "merged")))
            return
        if sweep:
            found = list(tool.sweep(network, sweep, load, settings, rounds, bar.step, bar))
        else:
            bar.begin(2 * (rounds + 1), "runs")
            bar.step("unpatched and merged in turn")
            found = [tool.compare(network, load, settings, rounds, progress=bar)]
    bar.end()
    if plot is not None:
        tool.plot_comparisons(found, plot)
    if as_json:
        bodies = [tool.as_dict(one) for one in found]
        print(json.dumps(bodies if sweep else bodies[0], indent=2))
    elif sweep:
        tool.print_sweep(found)
    else:
        tool.print_table(found[0])
        print(tool.verdict(found[0].plain, found[0].merged, new_tokens))


def _again(given: dict[str, Any]) -> list[str]:
    """The options with which another process repeats the ``bench`` that runs."""
    skipped = {"fresh", "rounds", "plot", "as_json", "debug", "only"}
    options = []
    for name, value in given.items():
        if value is None or value is False or name in skipped:
            continue
        options.append(f"--{name.replace('_', '-')}")
        options += [] if value is True else [str(value)]
    return options


@friendly
def evaluate(
    context: typer.Context,
    model: Model = "tiny",
    items: Annotated[
        str, typer.Option(help="scenes, small-scenes, pairs, clips, easy-vqa, or a JSONL file.")
    ] = "scenes",
    questions: Annotated[
        int | None, typer.Option(help="How many of them at most; by default 2,000, or all of a file.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Names or file.py:NAME, separated by commas; also uniform and downsample.")
    ] = "",
    stages: Annotated[str, typer.Option(help="Of encoder, language, both.")] = "both",
    kept: Annotated[str, typer.Option(help="Fractions of visual tokens kept.")] = "0.5,0.3333,0.2222,0.1111",
    keep: Annotated[
        str | None, typer.Option(help="Fractions for patch(model, keep=...) instead of --stages and --kept: 1/2,1/3.")
    ] = None,
    match: Annotated[str, typer.Option(help="How answers are compared: exact, relaxed or contains.")] = "exact",
    output: Annotated[
        Path | None, typer.Option(help="Rows and answers as JSON lines; an interrupted run goes on with them.")
    ] = None,
    batch_size: BatchSize = 32,
    max_new_tokens: MaxNewTokens = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure accuracy, loyalty and divergence of methods at equal budgets."""
    from illava_hooks.tools.evaluate import evaluate as measure
    from illava_hooks.tools.evaluate import print_rows
    from illava_hooks.tools.loading import load_model, parse_fraction, quiet
    from illava_hooks.tools.progress import status

    quiet()
    check_target("--output", output)
    if keep is not None:
        stages, kept = _one_number(context, keep)
    fractions = [parse_fraction(part, "--kept") or 0.0 for part in kept.split(",")]
    with status(f"loading {model}"):
        loaded = load_model(model, device, dtype)
    names = [name.strip() for name in methods.split(",") if name.strip()]
    rows = measure(
        *loaded,
        items,
        names or None,
        stages=[part.strip() for part in stages.split(",")],
        kept=fractions,
        questions=questions,
        match=match,
        output=output,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print_rows(rows)


def _one_number(context: typer.Context, keep: str) -> tuple[str, str]:
    """The stage and the fractions that stand for ``--keep``.

    Raises:
        InputError: another option says the same, or a fraction is none.
    """
    from illava_hooks.tools.loading import parse_fraction

    for name in ("stages", "kept"):
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise InputError(f"--keep and --{name} exclude each other; give one of them")
    return "keep", ",".join(str(parse_fraction(part, "--keep")) for part in keep.split(","))
