"""What the tests of other libraries around a patched model share."""

from __future__ import annotations

import importlib
import math
import os
import warnings
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor

from families import families, family
from helpers import forward, under
from illava_hooks import patch, tiny
from tiny_models import FIRST_TEXT_ID, VOCAB_SIZE, Inputs

#: Settings that merge in both stages of the embedded models.
EMBEDDED: dict[str, dict[str, Any]] = {name: dict(family(name).embedded_settings) for name in families(embedded=True)}
QUESTION = "how many triangles are there ?"
ANSWER = 3  #: tokens of the answer in `labelled`

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def client(name: str) -> Any:
    """A module of another library; skips where it is not installed, fails where `make test-clients` installed it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("ILLAVA_CLIENTS"):
            raise
        pytest.skip(f"{error}; `make test-clients` installs it", allow_module_level=True)


def assert_release(library: Any) -> None:
    """`make test-clients` names an older release that is to be tested, such as "peft-0.18.1"."""
    name, _, release = os.environ.get("ILLAVA_CLIENTS", "").partition("-")
    assert library.__name__ != name or library.__version__ == release


# ------------------------------------------------------------------------------------ answers


def labelled(inputs: Inputs, answer: int = ANSWER) -> Inputs:
    """Labels on the last tokens, the answer."""
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels}


def with_other_answer(inputs: Inputs, answer: int = ANSWER) -> Inputs:
    """The same prompt with other words in the answer."""
    ids = inputs["input_ids"].clone()
    span = VOCAB_SIZE - FIRST_TEXT_ID
    ids[:, -answer:] = (ids[:, -answer:] - FIRST_TEXT_ID + 17) % span + FIRST_TEXT_ID
    changed = {**inputs, "input_ids": ids}
    return labelled(changed, answer) if "labels" in inputs else changed


def assert_same_prompt(ours: Tensor, theirs: Tensor, answer: int = ANSWER) -> None:
    """Logits of all prompt tokens; those of the answer's tokens must differ, or nothing was compared."""
    torch.testing.assert_close(ours[:, :-answer], theirs[:, :-answer], atol=1e-6, rtol=0)
    assert (ours[:, -answer:] - theirs[:, -answer:]).abs().max() > 1e-3


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by name, which are then forgotten."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs) and theirs
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=under(name), **CLOSE)


# ------------------------------------------------------------------------------------ embedded models


def picture(name: str = "scene.png") -> Image.Image:
    """A bundled picture."""
    return Image.open(tiny.media(name)).convert("RGB")


def embedded(family: str, merged: bool = True) -> tuple[Any, Any]:
    """An embedded model that merges in both stages, and its processor."""
    model, processor = tiny.load(family)
    if merged:
        patch(model, **EMBEDDED[family])
    return model, processor


def question(processor: Any, *texts: str, image: Image.Image | None = None) -> Inputs:
    """Inputs of one picture with each question, padded to the left."""
    asked = texts or (QUESTION,)
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in asked
    ]
    images = [[image or picture()] for _ in asked]
    return dict(processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt"))


def logits_of(model: Any, inputs: Inputs, **kwargs: Any) -> Tensor:
    """Logits of a forward without gradients."""
    return forward(model, inputs, **kwargs)["forward.logits"]


class Forced(LogitsProcessor):
    """Makes `generate` write given tokens `(B, T)` behind prompts of a length."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Forbids all others."""
        token = self.tokens[:, input_ids.shape[1] - self.length, None]
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


def forced_logits(model: Any, inputs: Inputs, tokens: Tensor) -> Tensor:
    """Logits `(B, T, V)` that a generation has in front of each of given tokens."""
    done = model.generate(
        **inputs,
        max_new_tokens=tokens.shape[1],
        logits_processor=[Forced(tokens, inputs["input_ids"].shape[1])],
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
    )
    assert torch.equal(done.sequences[:, -tokens.shape[1] :], tokens)
    return torch.stack(done.logits, 1)
