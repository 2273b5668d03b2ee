"""The command ``batch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from illava_hooks.cli.options import (
    AsJson,
    Debug,
    Device,
    Dtype,
    Frames,
    Keep,
    LlmLayers,
    LlmRatio,
    MaxNewTokens,
    MethodName,
    Model,
    Preset,
    VitLayers,
    VitR,
    friendly,
    merge_settings,
)

__all__ = ["batch"]


@friendly
def batch(
    path: Annotated[
        Path, typer.Option("--input", help="JSON lines: question, and image, images or video (paths beside the file).")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the answers; given again, the rest is answered.")],
    model: Model = "tiny",
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a model of its own.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 8,
    no_merge: Annotated[bool, typer.Option("--no-merge", help="Leave the model as it is.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask rows again that ended in error.")] = False,
    vit_layers: VitLayers = None,
    vit_r: VitR = None,
    llm_layers: LlmLayers = None,
    llm_ratio: LlmRatio = None,
    keep: Keep = None,
    method: MethodName = None,
    preset: Preset = "auto",
    max_new_tokens: MaxNewTokens = 64,
    frames: Frames = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer a file of questions, in several processes, and go on after whatever ended them."""
    import json

    from illava_hooks.integrations.batch import BatchAnswers
    from illava_hooks.integrations.batch_job import BatchJob
    from illava_hooks.tools.progress import Bar

    settings = merge_settings(vit_layers, vit_r, llm_layers, llm_ratio, keep, method, preset)
    if method is not None:
        settings["method"] = method  # by its name: each process looks it up for itself
    answers = BatchAnswers(
        model,
        merge=not no_merge,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        frames=frames,
        device=device,
        dtype=dtype,
        **({} if no_merge else settings),
    )
    bar = Bar()
    try:
        result = BatchJob(path, output, answers, workers, retry_errors).run(
            lambda done, of: bar.reach(done, of, "answering", "rows")
        )
    finally:
        bar.end()
    with result.open(encoding="utf-8") as file:
        errors = [found["error"] for found in map(json.loads, file) if found["error"] is not None]
    if as_json:
        print(json.dumps({"answers": str(result), "errors": len(errors)}, indent=2))
    else:
        print(result)
    if errors:
        told = f"{len(errors)} rows ended with an error, the first: {errors[0]}; --retry-errors asks them again"
        print(told, file=sys.stderr)
        raise typer.Exit(1)
