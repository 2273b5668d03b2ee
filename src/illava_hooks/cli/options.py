"""Options that several commands share, and how their errors end."""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from illava_hooks import tiny
from illava_hooks.errors import IllavaHooksError, InputError

Picture = Annotated[
    Path | None,
    typer.Argument(
        metavar="[PICTURE]",
        help="An image, a folder of images (one prompt), or a video; by default a bundled scene.",
        show_default=False,
    ),
]
Asked = Annotated[
    str | None,
    typer.Argument(
        metavar="[QUESTION]", help="What to ask; when not given, one that fits the model.", show_default=False
    ),
]
Input = Annotated[Path | None, typer.Option("--input", help="The picture, as an option.")]
Question = Annotated[str | None, typer.Option(help="The question, as an option.")]
_MODEL = typer.Option(
    help=f"{', '.join(tiny.ALIASES)}, a folder, or a hub name.", autocompletion=lambda: list(tiny.ALIASES)
)
Model = Annotated[str, _MODEL]
ModelOrNone = Annotated[str | None, _MODEL]
VitLayers = Annotated[str | None, typer.Option(help="Encoder layers that merge: 5-6-7-8. Empty: none.")]
VitR = Annotated[str | None, typer.Option(help="Tokens removed in each (92), or their fraction (0.16).")]
LlmLayers = Annotated[str | None, typer.Option(help="Decoder layers that merge: 8. Empty: none.")]
LlmRatio = Annotated[str | None, typer.Option(help="Fraction of visual tokens kept in each: 0.70.")]
Keep = Annotated[
    str | None, typer.Option(help="One number for both: the fraction of visual tokens left in the end, 1/3.")
]
MethodName = Annotated[
    str | None, typer.Option("--method", help="A name (see `illava-hooks info`) or file.py:NAME; illava by default.")
]
Preset = Annotated[
    str,
    typer.Option(
        help="image, video, auto or a file of settings: for the numbers that are not given.",
        autocompletion=lambda: ["image", "video", "auto"],
    ),
]
_DEVICES, _DTYPES = ["auto", "cpu", "cuda", "cuda:1"], ["auto", "float32", "bfloat16", "float16"]
Device = Annotated[str, typer.Option(help=f"{', '.join(_DEVICES)}.", autocompletion=lambda: _DEVICES)]
Dtype = Annotated[str, typer.Option(help=f"{', '.join(_DTYPES)}.", autocompletion=lambda: _DTYPES)]
Frames = Annotated[int, typer.Option(help="Frames taken of a video, evenly spaced.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts in a batch.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of an answer at most.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Errors in one line with exit code 2, and 130 after Ctrl-C."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except IllavaHooksError as error:
            if kwargs.get("debug"):
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except OSError as error:  # of files to write: a folder that is not there, a full disk
            if kwargs.get("debug") or isinstance(error, BrokenPipeError):
                raise
            print(f"error: {error}; give a file that can be written", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            place = _place_in_own_file(error)
            if kwargs.get("debug") or place is None:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"error: your method failed ({place}: {reason}); repair it, --debug shows all", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


def _place_in_own_file(error: Exception) -> str | None:
    """Where a method of the user's failed; looked up by name, since it is loaded only where methods are."""
    methods = sys.modules.get("illava_hooks.tools.methods")
    return None if methods is None else methods.place_in_own_file(error)


def unbroken_output() -> None:
    """Lets a terminal that lacks a letter see its escape: answers, questions and file names hold any letter."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def either(given: Any, option: Any, names: tuple[str, str]) -> Any:
    """What stands for itself, or behind an option.

    Raises:
        InputError: both are there.
    """
    if given is not None and option is not None:
        raise InputError(f"{names[0]} is {str(given)!r} and {names[1]} is {str(option)!r}; give one of them")
    return option if given is None else given


def check_target(option: str, file: Path | None) -> None:
    """Refuses a file that cannot be written before the work, not after it.

    Raises:
        InputError: there is no such folder, or the file is a folder.
    """
    if file is not None and (not file.parent.is_dir() or file.is_dir()):
        raise InputError(f"{option} is {str(file)!r}, where no file can be; give a file in a folder that exists")


def _tell_of_ranges(option: str, layers: str | None) -> None:
    """Says that two layers joined as the published scripts join them are not all from the one to the other."""
    first, dash, last = (layers or "").strip().partition("-")
    if dash and first.isdecimal() and last.isdecimal() and int(last) > int(first) + 1:
        every = f"{first}-{int(first) + 1}" + "-..." * (int(last) > int(first) + 2) + f"-{last}"
        print(f"note: {option} {layers} is layers {first} and {last}; write {every} for all of them", file=sys.stderr)


def merge_settings(
    vit_layers: str | None,
    vit_r: str | None,
    llm_layers: str | None,
    llm_ratio: str | None,
    keep: str | None,
    method: str | None,
    preset: str,
) -> dict[str, Any]:
    """The settings as ``patch`` takes them; what needs no model is refused here, before one is loaded.

    Raises:
        IllavaHooksError: a value is no number, ``--keep`` comes with amounts, there is no such method, or a file of
            settings cannot be read.
    """
    from illava_hooks.config import check_preset
    from illava_hooks.config.checks import check_keep
    from illava_hooks.tools.loading import parse_fraction, parse_layers, parse_number, parse_ratio
    from illava_hooks.tools.methods import find_method

    for option, amount in (("--vit-r", vit_r), ("--llm-ratio", llm_ratio)):
        if keep is not None and amount is not None:
            raise InputError(f"--keep and {option} exclude each other; give one of them")
    check_preset(preset)
    for option, layers in (("--vit-layers", vit_layers), ("--llm-layers", llm_layers)):
        _tell_of_ranges(option, layers)
    settings = {
        "vit_layers": parse_layers(vit_layers, "--vit-layers"),
        "vit_r": parse_number(vit_r, "--vit-r"),
        "llm_layers": parse_layers(llm_layers, "--llm-layers"),
        "llm_ratio": parse_ratio(llm_ratio, "--llm-ratio"),
        "keep": parse_fraction(keep, "--keep"),
        "preset": preset,
    }
    if settings["keep"] is not None:
        check_keep("keep", settings["keep"])
    # Where none is given, a file of settings may say it.
    return settings if method is None else {**settings, "method": find_method(method)}
