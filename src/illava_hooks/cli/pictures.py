"""The commands ``ask``, ``visualize`` and ``info``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from illava_hooks.cli.options import (
    AsJson,
    Debug,
    Device,
    Dtype,
    Frames,
    Input,
    Keep,
    LlmLayers,
    LlmRatio,
    MethodName,
    Model,
    ModelOrNone,
    Preset,
    Question,
    VitLayers,
    VitR,
    friendly,
    merge_settings,
)
from illava_hooks.errors import InputError

if TYPE_CHECKING:
    from illava_hooks.tools.ask import Answer

__all__ = ["ask", "info", "visualize"]


def _prepared(
    model_name: str, device: str, dtype: str, path: Path | None, frames: int, question: str | None
) -> tuple[Any, ...]:
    """Loads the media before the model, so that a missing file is reported at once."""
    from illava_hooks import tiny
    from illava_hooks.tools.loading import build_inputs, default_question, load_model, quiet, unknown_words
    from illava_hooks.tools.media import load_media

    quiet()
    media = load_media(path or tiny.media("scene.png"), frames)
    model, processor = load_model(model_name, device, dtype)
    text = question or default_question(model_name, media)
    unknown = unknown_words(processor, text)
    if unknown:
        print(f"note: {model_name} does not know the words {', '.join(unknown)}", file=sys.stderr)
    return model, processor, media, text, build_inputs(processor, media, text, model.device, model.dtype)


@friendly
def ask(
    path: Input = None,
    question: Question = None,
    model: Model = "tiny",
    compare: Annotated[bool, typer.Option("--compare", help="Answer without and with merging.")] = False,
    no_merge: Annotated[bool, typer.Option("--no-merge", help="Leave the model as it is.")] = False,
    vit_layers: VitLayers = None,
    vit_r: VitR = None,
    llm_layers: LlmLayers = None,
    llm_ratio: LlmRatio = None,
    keep: Keep = None,
    method: MethodName = None,
    preset: Preset = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 64,
    frames: Frames = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer a question about an image, a folder of images or a video."""
    if compare and no_merge:
        raise InputError("--compare and --no-merge exclude each other; give one of them")
    settings = merge_settings(vit_layers, vit_r, llm_layers, llm_ratio, keep, method, preset)
    network, processor, media, text, inputs = _prepared(model, device, dtype, path, frames, question)
    from illava_hooks.api import patch
    from illava_hooks.tools.ask import answer

    if not no_merge:
        patch(network, **settings)
    show: Callable[[str], None] = (lambda _: None) if as_json else lambda piece: print(piece, end="", flush=True)
    if not as_json:
        print(f"{', '.join(media.names[:8])}{' ...' if len(media.names) > 8 else ''}: {text}")
    answers = []
    for merge in [False, True] if compare else [not no_merge]:
        if compare and not as_json:
            print("with merging:    " if merge else "without merging: ", end="")
        answers.append(answer(network, processor, inputs, merge, max_new_tokens, show))
        if not as_json:
            print()
    if as_json:
        body = {"question": text, "model": model, "answers": [a.as_dict() for a in answers]}
        if compare:
            body["same_answer"] = answers[0].text == answers[1].text
        print(json.dumps(body, indent=2))
    else:
        _print_costs(answers)


def _print_costs(answers: list[Answer]) -> None:
    """A table of times; below it tokens, FLOPs and bytes of both ways."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *("with merging" if a.merged else "without merging" for a in answers))
    table.add_row("answer", *(a.text for a in answers))
    table.add_row("prefill", *(f"{a.prefill_s * 1e3:.1f} ms" for a in answers))
    table.add_row("decoding, per token", *(f"{a.decode_s * 1e3:.1f} ms" for a in answers))
    table.add_row("new tokens", *(str(a.new_tokens) for a in answers))
    table.add_row("prompt tokens", *(str(a.prompt_tokens) for a in answers))
    Console(highlight=False).print(table)
    for one in answers:
        if one.report is not None:
            print(one.report)


@friendly
def visualize(
    path: Input = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("merge-pictures"),
    question: Question = None,
    model: Model = "tiny",
    colours: Annotated[
        bool, typer.Option("--colours", "--colors", help="Colour merged patches by what absorbed them.")
    ] = False,
    vit_layers: VitLayers = None,
    vit_r: VitR = None,
    llm_layers: LlmLayers = None,
    llm_ratio: LlmRatio = None,
    keep: Keep = None,
    method: MethodName = None,
    preset: Preset = "auto",
    frames: Frames = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Draw which patches are left after every merging layer."""
    settings = merge_settings(vit_layers, vit_r, llm_layers, llm_ratio, keep, method, preset)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output is {str(output)!r}, which is a file; give a folder")
    network, processor, media, _, inputs = _prepared(model, device, dtype, path, frames, question)
    from illava_hooks.tools.draw import merge_maps, save_maps

    maps = merge_maps(network, processor, inputs, **settings)
    named = media.names[0] if path is None else os.path.abspath(path)  # "." has no name of its own
    for file in save_maps(maps, output, Path(named).stem, colours):
        print(file)


@friendly
def info(
    model: ModelOrNone = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell versions, devices, methods, and a model's depth and presets."""
    from illava_hooks.tools.info import environment, model_info
    from illava_hooks.tools.loading import load_model

    facts = environment()
    if model is not None:
        facts["model"] = model_info(load_model(model, device, dtype)[0])
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, part in value.items():
                print(f"  {key:<15} {part}")
        else:
            print(f"{name:<17} {', '.join(value) if isinstance(value, list) else value}")
