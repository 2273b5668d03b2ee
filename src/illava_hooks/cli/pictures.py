"""The commands ``ask``, ``visualize`` and ``info``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from illava_hooks.cli.options import (
    AsJson,
    Asked,
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
    Picture,
    Preset,
    Question,
    VitLayers,
    VitR,
    either,
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
    if question is not None and not question.strip():
        raise InputError("question is empty; give one, or leave it out for a general one")
    from illava_hooks.tools.progress import status

    with status("starting"):
        from illava_hooks import tiny
        from illava_hooks.tools.loading import build_inputs, default_question, listed, load_model, quiet, unknown_words
        from illava_hooks.tools.media import load_media

        quiet()
    with status(f"reading {path}"):
        media = load_media(path or tiny.media("scene.png"), frames)
    with status(f"loading {model_name}"):
        model, processor = load_model(model_name, device, dtype)
    text = default_question(model_name, media) if question is None else question
    inputs = build_inputs(processor, media, text, model.device, model.dtype)
    unknown = unknown_words(processor, text)
    if unknown:
        print(f"note: {model_name} does not know {listed(unknown)}", file=sys.stderr)
    return model, processor, media, text, inputs


@friendly
def ask(
    picture: Picture = None,
    asked: Asked = None,
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
    path = either(picture, path, ("PICTURE", "--input"))
    question = either(asked, question, ("QUESTION", "--question"))
    if compare and no_merge:
        raise InputError("--compare and --no-merge exclude each other; give one of them")
    settings = merge_settings(vit_layers, vit_r, llm_layers, llm_ratio, keep, method, preset)
    network, processor, media, text, inputs = _prepared(model, device, dtype, path, frames, question)
    from illava_hooks.api import patch
    from illava_hooks.tools.ask import answer, is_small
    from illava_hooks.tools.progress import status

    if not no_merge:
        patch(network, **settings)
    if not as_json:
        print(f"{', '.join(media.names[:8])}{' ...' if len(media.names) > 8 else ''}: {text}")
    answers = []
    for merge in [False, True] if compare else [not no_merge]:
        title = ("with merging:    " if merge else "without merging: ") if compare else ""
        with contextlib.ExitStack() as waiting:
            waiting.enter_context(status(f"{title.strip(' :') or 'answering'}: waiting for the first word"))
            answers.append(
                answer(network, processor, inputs, merge, max_new_tokens, _Printer(title, waiting, not as_json))
            )
        if not as_json:
            print()
    if as_json:
        body = {"question": text, "model": model, "answers": [a.as_dict() for a in answers]}
        if compare:
            body["same_answer"] = answers[0].text == answers[1].text
        print(json.dumps(body, indent=2))
        return
    _print_costs(answers)
    if compare and is_small(network):
        print("note: the model is too small for its times to say anything; `illava-hooks bench` measures large ones")
    if not no_merge and answers[-1].report is None:
        print("nothing merged: these settings remove nothing from this input", file=sys.stderr)


class _Printer:
    """Prints an answer piece by piece; the first one ends the wait, whose line stands where the answer will."""

    def __init__(self, title: str, waiting: contextlib.ExitStack, prints: bool) -> None:
        self._title, self._waiting, self._prints = title, waiting, prints

    def __call__(self, piece: str) -> None:
        self._waiting.close()
        if self._prints:
            print(self._title + piece, end="", flush=True)
            self._title = ""


def _print_costs(answers: list[Answer]) -> None:
    """A table of times; below it tokens, FLOPs and bytes of both ways."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *("with merging" if a.merged else "without merging" for a in answers))
    table.add_row("answer", *(a.text for a in answers))
    table.add_row("prefill", *(f"{a.prefill_s * 1e3:.1f} ms" for a in answers))
    table.add_row("decoding, per token", *(f"{a.decode_s * 1e3:.1f} ms" if a.new_tokens > 1 else "-" for a in answers))
    table.add_row("new tokens", *(str(a.new_tokens) for a in answers))
    table.add_row("prompt tokens", *(str(a.prompt_tokens) for a in answers))
    Console(highlight=False, markup=False, emoji=False).print(table)  # answers may hold [brackets]
    for one in answers:
        if one.report is not None:
            print(one.report)


@friendly
def visualize(
    picture: Picture = None,
    asked: Asked = None,
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Draw which patches are left after every merging layer."""
    path = either(picture, path, ("PICTURE", "--input"))
    question = either(asked, question, ("QUESTION", "--question"))
    settings = merge_settings(vit_layers, vit_r, llm_layers, llm_ratio, keep, method, preset)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output is {str(output)!r}, which is a file; give a folder")
    network, processor, media, text, inputs = _prepared(model, device, dtype, path, frames, question)
    from illava_hooks.tools.draw import merge_maps, save_maps
    from illava_hooks.tools.progress import status

    with status("merging"):
        maps = merge_maps(network, processor, inputs, media.images, **settings)
    if not maps:
        raise InputError(
            f"nothing merges in this {media.kind} with these settings, so there is nothing to draw; list layers in "
            "--vit-layers or --llm-layers and an amount that removes something"
        )
    named = media.names[0] if path is None else os.path.abspath(path)  # "." has no name of its own
    with status("drawing"):
        files = save_maps(maps, output, Path(named).stem, colours)
    if as_json:
        print(json.dumps({"question": text, "model": model, "files": [str(file) for file in files]}, indent=2))
        return
    for file in files:
        print(file)


@friendly
def info(
    model: ModelOrNone = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell versions, devices, what each method does, and a model's depth and presets."""
    from illava_hooks.tools.progress import status

    with status("starting"):
        from illava_hooks.tools.info import environment, model_info, model_lines
        from illava_hooks.tools.loading import load_model, quiet

        quiet()
        facts = environment()
    if model is not None:
        with status(f"loading {model}"):
            facts["model"] = model_info(load_model(model, device, dtype)[0])
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if name == "model":
            print("\n".join(["model:", *(f"  {line}" for line in model_lines(value))]))
        elif isinstance(value, dict):
            print(f"{name}:")
            for key, part in value.items():
                print(f"  {key:<15} {part}")
        else:
            print(f"{name:<17} {', '.join(value) if isinstance(value, list) else value}")
