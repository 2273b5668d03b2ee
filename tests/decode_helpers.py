"""What the tests of batches, decoding and shapes share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, family, family_of
from illava_hooks import patch
from tiny_models import Inputs, Sample, inputs_for, tiny_model

SETTINGS: dict[str, dict[str, Any]] = {name: dict(family(name).settings) for name in FAMILIES}
IMAGE = Sample(text_seed=3, images=((32, 90),), text=(5, 7))
IMAGES = Sample(text_seed=1, images=((48, 30), (64, 64)), text=(4, 3, 6))
TEXT = Sample(text_seed=2, text=(12,))
VIDEO = Sample(text_seed=6, videos=(4,))
BOTH = Sample(text_seed=5, images=((60, 40),), videos=(4,), order="vi", text=(2, 3, 5))
RAGGED = [IMAGES, TEXT, IMAGE]
#: The sample with most in it that a family takes.
RICHEST = {name: BOTH if family(name).with_videos else IMAGES for name in FAMILIES}
KINDS = {"image": [IMAGE], "images": [IMAGES], "ragged": RAGGED, "video": [VIDEO], "both": [BOTH]}


def patched(name: str, *, track: bool = False, method: Any = "illava", **kwargs: Any) -> Any:
    """A fresh tiny model that merges in both stages."""
    model = tiny_model(name, **kwargs)
    patch(model, **SETTINGS[name], method=method, track=track)
    return model


def steps(model: Any, inputs: Inputs, new_tokens: int = 5, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """New ids and the logits of each step of a greedy generation."""
    done = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return done.sequences[:, -new_tokens:], list(done.logits)


def single(model: Any, sample: Sample) -> Inputs:
    """The inputs of one sample alone."""
    return inputs_for(model, [sample])


@cache
def stock_keeps_images_apart(name: str) -> bool:
    """Whether stock shows its beams the images of a prompt in their order, measured: the first step's best beam."""
    model = tiny_model(name)
    wanted = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one, three = (model.generate(**single(model, IMAGES), num_beams=n, **wanted).logits[0] for n in (1, 3))
    return torch.allclose(one.expand_as(three), three, atol=1e-4, rtol=0.0)


def skip_where_stock_mixes_images(name: str, samples: Iterable[Sample]) -> None:
    """Skips a test of several sequences for prompts of which stock itself makes a mixture."""
    if any(len(sample.images) > 1 for sample in samples) and not stock_keeps_images_apart(name):
        pytest.skip("stock mixes the images of a prompt among its beams, measured")


def next_positions(model: Any, inputs: Inputs, count: int) -> dict[str, Tensor]:
    """Explicit positions of `count` tokens after a prompt, where the family's forward wants them."""
    return family_of(model).next_positions(model, inputs, count)
