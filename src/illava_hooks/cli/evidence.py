"""The commands ``bench`` and ``evaluate``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from illava_hooks.cli.options import (
    AsJson,
    Debug,
    Device,
    Dtype,
    LlmLayers,
    LlmRatio,
    MethodName,
    Model,
    Preset,
    VitLayers,
    VitR,
    friendly,
    merge_settings,
)
from illava_hooks.errors import InputError

__all__ = ["bench", "evaluate"]


@friendly
def bench(
    shape: Annotated[str | None, typer.Option(help="A published shape with random weights, see the error.")] = None,
    model: Annotated[str | None, typer.Option(help="A folder or a hub name instead of a shape.")] = None,
    tiles: Annotated[int, typer.Option(help="LLaVA-OneVision: tiles of the image with the base tile.")] = 3,
    images: Annotated[int, typer.Option(help="Images in a prompt.")] = 1,
    frames: Annotated[int, typer.Option(help="Frames of a video instead of images.")] = 0,
    patches: Annotated[int, typer.Option(help="Qwen2-VL: patches per image or frame.")] = 4096,
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
    method: MethodName = "illava",
    preset: Preset = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure prefill, decoding, memory and the cost of merging, without and with it in turn."""
    from illava_hooks.api import patch
    from illava_hooks.tools.bench import (
        Workload,
        as_dict,
        build_shape,
        build_workload,
        measure_alternating,
        print_table,
        verdict,
    )
    from illava_hooks.tools.loading import find_device, find_dtype, load_model

    if (shape is None) == (model is None):
        raise InputError("give one of --shape (random weights) and --model (a folder or a hub name)")
    settings = merge_settings(vit_layers, vit_r, llm_layers, llm_ratio)
    network: Any
    if shape is not None:
        target = find_device(device)
        network = build_shape(shape, str(target), find_dtype(dtype, target, "float32"), attention, narrow)
    else:
        network, _ = load_model(str(model), device, dtype)
    inputs = build_workload(network, Workload(tiles, images, frames, patches, batch, text, new_tokens))
    session = patch(network, **settings, method=method, preset=preset)
    plain, merged = measure_alternating(network, inputs, rounds, new_tokens)
    if as_json:
        print(json.dumps(as_dict(plain, merged, session.report), indent=2))
    else:
        print_table(plain, merged, session.report)
        print(verdict(plain, merged, new_tokens))


@friendly
def evaluate(
    model: Model = "tiny",
    items: Annotated[
        str, typer.Option(help="scenes, small-scenes, pairs, clips, easy-vqa, or a JSONL file.")
    ] = "scenes",
    questions: Annotated[int, typer.Option(help="How many of them at most.")] = 2000,
    methods: Annotated[str, typer.Option(help="Names, separated by commas; also uniform and downsample.")] = "",
    stages: Annotated[str, typer.Option(help="Of encoder, language, both.")] = "both",
    kept: Annotated[str, typer.Option(help="Fractions of visual tokens kept.")] = "0.5,0.3333,0.2222,0.1111",
    output: Annotated[Path | None, typer.Option(help="Rows as JSON lines; what is there is not run again.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in a batch.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 4,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Measure accuracy, loyalty and divergence of methods at equal budgets."""
    from illava_hooks.methods import METHODS
    from illava_hooks.tools.datasets import load_items
    from illava_hooks.tools.evaluate import CONTROLS, print_rows, sweep
    from illava_hooks.tools.loading import load_model, parse_number, quiet

    quiet()
    names = [name for name in methods.split(",") if name] or [*dict.fromkeys([*METHODS, *CONTROLS])]
    fractions = [float(parse_number(part, "--kept") or 0) for part in kept.split(",")]
    asked = load_items(items, questions)
    network, processor = load_model(model, device, dtype)
    rows = sweep(
        network,
        processor,
        asked,
        names,
        stages.split(","),
        fractions,
        output,
        batch_size,
        max_new_tokens,
        advance=lambda what: print(what, file=sys.stderr),
    )
    print_rows(rows)
