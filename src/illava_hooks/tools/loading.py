"""From a name on the command line to a model and its processor, and from media and a question to inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from illava_hooks import tiny
from illava_hooks.engine.finding import families
from illava_hooks.errors import InputError
from illava_hooks.tools.media import Media

__all__ = [
    "EMBEDDED",
    "EMBEDDED_QUESTION",
    "QUESTION",
    "build_inputs",
    "check_question",
    "default_question",
    "find_device",
    "find_dtype",
    "listed",
    "load_model",
    "parse_fraction",
    "parse_layers",
    "parse_number",
    "parse_ratio",
    "quiet",
    "unknown_words",
]

#: The embedded models by their names in commands.
EMBEDDED = tiny.ALIASES

#: What is asked about an image when nothing is asked, in words that an embedded model knows, and in general.
EMBEDDED_QUESTION = "how many circles are there ?"
QUESTION = "Describe what is shown here in one sentence."


def quiet() -> None:
    """Keeps the loading bars and warnings of transformers off a command's stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Loads a model and its processor.

    Args:
        name: a key of ``EMBEDDED`` such as "tiny", a folder, or a name on the model hub.
        device: "auto" (CUDA where there is one), or a torch device.
        dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), or a torch dtype's name.

    Raises:
        InputError: there is no such model, device or dtype.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    target = find_device(device)
    numbers = find_dtype(dtype, target)
    source = str(tiny.folder(EMBEDDED[name])) if name in EMBEDDED else name
    try:
        if not Path(source).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise OSError("there is no such folder")  # and no such hub name, so the network need not be asked
        # Nobody is asked whether code that comes with a checkpoint may run: it may not.
        model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=numbers, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # damaged and hostile files raise whatever trips their readers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"model {name!r} cannot be loaded ({reason}); give one of {list(EMBEDDED)}, a folder with a checkpoint, "
            f"or the hub name of a {_titles()} model"
        ) from error
    return model.to(target).eval(), processor


def _titles() -> str:
    """The families whose models answer questions, in words."""
    titles = [family.title or family.name for family in families() if "generate" in family.head_methods]
    return " or ".join([", ".join(titles[:-1]), *titles[-1:]]) if len(titles) > 1 else "".join(titles)


def find_device(name: str) -> torch.device:
    """A device by name; "auto" is CUDA where there is one.

    Raises:
        InputError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device is {name!r}, which is not there; give auto, cpu, cuda or cuda:0") from error


def find_dtype(name: str, device: torch.device, automatic: str = "auto") -> Any:
    """A floating-point dtype by name; "auto" is float32 on a CPU and ``automatic`` elsewhere.

    Raises:
        InputError: there is no such dtype.
    """
    if name == "auto":
        name = "float32" if device.type == "cpu" else automatic
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype is {name!r}; give auto, float32, bfloat16 or float16")
    return dtype


def parse_layers(text: str | None, name: str) -> list[int] | None:
    """Layers as the published scripts write them, ``5-6-7-8``, or with commas; an empty text is no layer.

    Raises:
        InputError: it is no list of numbers.
    """
    if text is None:
        return None
    parts = [part for part in re.split(r"[-,\s]+", text.strip()) if part]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{name} is {text!r}; write layer numbers as 5-6-7-8")
    return [int(part) for part in parts]


def parse_number(text: str | None, name: str) -> int | float | None:
    """A count such as ``92`` or a fraction such as ``0.16``.

    Raises:
        InputError: it is no number.
    """
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"{name} is {text!r}; give a whole number of tokens or a fraction such as {_percent(text, '0.16')}"
        ) from error


def parse_ratio(text: str | None, name: str) -> float | None:
    """A fraction that is kept, such as ``0.70``; its range is the business of whoever takes it.

    Raises:
        InputError: it is no number.
    """
    if text is None:
        return None
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"{name} is {text!r}; give a fraction between 0 and 1 such as {_percent(text, '0.70')}"
        ) from error


def _percent(text: str, example: str) -> str:
    """What somebody who wrote a percentage may have meant, as an example."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    return example if found is None else f"{float(found[1]) / 100:.4g}"


def parse_fraction(text: str | None, name: str) -> float | None:
    """A fraction such as ``1/3`` or ``0.33``; its range is the business of whoever takes it.

    Raises:
        InputError: it is no number.
    """
    if text is None:
        return None
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"{name} is {text!r}; give a fraction such as 1/3 or {_percent(text, '0.33')}") from error


def default_question(model_name: str, media: Media) -> str:
    """What is asked when nothing is asked."""
    if model_name in EMBEDDED:
        return "which way does the circle move ?" if media.kind == "video" else EMBEDDED_QUESTION
    return "What happens in this video?" if media.kind == "video" else QUESTION


def unknown_words(processor: Any, question: str) -> list[str]:
    """Words that a word-level tokenizer does not know; none for other tokenizers."""
    unknown = processor.tokenizer.unk_token
    if unknown is None:
        return []
    words = re.findall(r"\w+", question.lower())
    return [word for word in words if processor.tokenizer.tokenize(word) == [unknown]]


def listed(words: Sequence[str]) -> str:
    """Words in a sentence: the word one; the words one, two."""
    return f"the word{'s' * (len(words) > 1)} {', '.join(words)}"


def check_question(processor: Any, question: str) -> None:
    """Refuses a question that says where pictures go: they stand in front of it.

    Raises:
        InputError: it holds a placeholder of the model, or letters that are no Unicode.
    """
    held = {name: value for name, value in vars(processor).items() if name.endswith("_token") and value}
    for placeholder in sorted({value for value in held.values() if isinstance(value, str)}, key=len, reverse=True):
        if placeholder in question:
            raise InputError(
                f"question contains {placeholder!r}, which stands for a picture in this model; leave it out: pictures "
                "are put in front of the question anyway"
            )
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"question is {question!r}, which holds letters that are no Unicode; write it anew"
        ) from error


def build_inputs(
    processor: Any,
    media: Media,
    question: str,
    device: Any = "cpu",
    dtype: Any = None,
    turns: Sequence[tuple[str, str]] = (),
) -> Any:
    """A chat about media, which stand in front of its first question, as the stock processor prepares it.

    Args:
        processor: the model's processor.
        media: images, all in one prompt, or a video.
        question: the text that is to be answered.
        device: where the tensors go.
        dtype: of the pixels; as the processor gives them when None.
        turns: questions that were asked before, each with its answer.

    Raises:
        InputError: the processor refuses what it is given.
    """
    count = 1 if media.kind == "video" else len(media.images)
    chat: list[dict[str, Any]] = []
    for asked, answered in turns:
        chat += [_said("user", asked), _said("assistant", answered)]
    chat.append(_said("user", question))
    chat[0]["content"] = [*[{"type": media.kind}] * count, *chat[0]["content"]]
    given = {"videos": [media.frames]} if media.kind == "video" else {"images": [list(media.images)]}
    check_question(processor, question)
    from jinja2 import TemplateError

    try:
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=[text], return_tensors="pt", **given)
    except TemplateError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the chat template of the model cannot be used ({reason}); give another model") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{', '.join(media.names)}: the processor refuses it ({reason}); give another size"
        ) from error
    return inputs.to(device, dtype) if dtype is not None else inputs.to(device)


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
