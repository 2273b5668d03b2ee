"""What the arguments of `patch` may be: any iterable, part of a preset, numbers that round down to nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from decode_helpers import IMAGE, RICHEST, single
from families import family_of
from helpers import assert_says
from illava_hooks import MergeConfigError, patch, session_of
from illava_hooks.config import MergeSchedule
from tiny_models import FAMILIES, Inputs, tiny_model

GIVEN = [1, 2]

ITERABLES: dict[str, Callable[[], Iterable[int]]] = {
    "tuple": lambda: tuple(GIVEN),
    "set": lambda: set(GIVEN),
    "range": lambda: range(1, 3),
    "dict": lambda: dict.fromkeys(GIVEN),
    "tensor": lambda: torch.tensor(GIVEN).tolist(),
    "iterator": lambda: iter(GIVEN),
    "map": lambda: map(int, GIVEN),
    "filter": lambda: filter(None, [0, *GIVEN]),
    "reversed": lambda: reversed(GIVEN),
    "generator": lambda: (layer for layer in GIVEN),
}


@torch.no_grad()
def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("kind", ITERABLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_may_come_as_any_iterable(family: str, kind: str) -> None:
    """Images and videos have a schedule each, and an iterator can be read only once."""
    model = tiny_model(family)
    config = patch(model, ITERABLES[kind](), 4, ITERABLES[kind](), 0.5).config
    assert config.image == config.video == MergeSchedule((1, 2), 4, (1, 2), 0.5)
    inputs = single(model, RICHEST[family])
    merged = logits(model, inputs)
    patch(model, GIVEN, 4, GIVEN, 0.5)
    assert torch.equal(logits(model, inputs), merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_iterator_with_a_wrong_layer_is_refused(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(MergeConfigError) as caught:
        patch(model, iter([1, 9]), 4, [1], 0.5)
    assert_says(caught.value, "^vit_layers contains 9;", r"0\.\.3", "choose other layers")
    with pytest.raises(MergeConfigError) as caught:
        patch(model, [1], 4, iter([2, 1, 2]), 0.5)
    assert_says(caught.value, r"^llm_layers is \[2, 1, 2\]", "twice", "once")
    assert session_of(model) is None


#: A stage that removes nothing, spelled out and left to the preset, whose layers are deeper than the tiny models.
SHALLOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "encoder": (
        {"vit_r": 0, "llm_layers": [1], "llm_ratio": 0.5},
        {"vit_layers": [], "vit_r": 0, "llm_layers": [1], "llm_ratio": 0.5},
    ),
    "encoder, fraction": (
        {"vit_r": 0.0, "llm_layers": [1], "llm_ratio": 0.5},
        {"vit_layers": [], "vit_r": 0, "llm_layers": [1], "llm_ratio": 0.5},
    ),
    "language model": (
        {"vit_layers": [1], "vit_r": 8, "llm_ratio": 1.0},
        {"vit_layers": [1], "vit_r": 8, "llm_layers": [], "llm_ratio": 1.0},
    ),
    "both": (
        {"vit_r": 0, "llm_ratio": 1.0},
        {"vit_layers": [], "vit_r": 0, "llm_layers": [], "llm_ratio": 1.0},
    ),
}


@pytest.mark.parametrize("preset", ["auto", "image", "video"])
@pytest.mark.parametrize("stage", SHALLOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_a_preset_do_not_matter_where_nothing_is_removed(family: str, stage: str, preset: str) -> None:
    short, spelled_out = SHALLOW[stage]
    model = tiny_model(family)
    inputs = single(model, RICHEST[family])
    stock = logits(model, inputs)
    patch(model, **short, preset=preset)
    found = logits(model, inputs)
    patch(model, **spelled_out)
    assert torch.equal(found, logits(model, inputs))
    assert torch.equal(found, stock) == (stage == "both")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_a_preset_matter_where_something_is_removed(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(MergeConfigError) as caught:
        patch(model, vit_r=4, llm_layers=[1], llm_ratio=0.5)
    assert_says(caught.value, "^vit_layers contains", "from the preset; give it yourself", r"0\.\.3")
    with pytest.raises(MergeConfigError) as caught:
        patch(model, vit_layers=[1], vit_r=4, llm_ratio=0.5)
    assert_says(caught.value, "^llm_layers contains", "from the preset; give it yourself", r"1\.\.3")


@pytest.mark.parametrize("vit_r", [3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_that_are_no_whole_groups_are_said_once(
    family: str, vit_r: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Where patches merge in groups of four, 3 patches are none, which is worth a word, and one only."""
    model = tiny_model(family)
    inputs = single(model, IMAGE)
    with caplog.at_level(logging.INFO, logger="illava_hooks"):
        session = patch(model, [1], vit_r, [1], 0.5)
        for _ in range(2):
            logits(model, inputs)
    (image,) = session.report.images
    removed = image.vision_tokens[0] - image.vision_tokens[-1]
    said = [record.getMessage() for record in caplog.records if record.name == "illava_hooks"]
    if vit_r < family_of(family).patches_per_token:
        assert removed == 0
        assert len(said) == 1 and "\n" not in said[0]
        assert said[0].startswith("vit_r is 3") and re.search("whole (2x2 )?groups", said[0])
    else:
        assert removed > 0 and said == []
