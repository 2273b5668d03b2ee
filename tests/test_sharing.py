"""`evaluate` encodes a picture once where prompts of a batch share it, and says what it would have said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from families import families, families_and, family_of
from helpers import MERGING, needs_ready_features
from illava_hooks import PRESETS, patch, tiny, unpatch
from illava_hooks.tools.datasets import clip_items, pair_items, scene_items
from illava_hooks.tools.evaluate import budget_settings, run_items
from illava_hooks.tools.evaluate.run import Prompts
from illava_hooks.tools.evaluate.sharing import distinct, repeated
from illava_hooks.tools.items import Item
from tiny_models import FAMILIES, Sample, inputs_for, tiny_model

EMBEDDED = families(embedded=True)
WITH_VIDEOS = families(embedded=True, with_videos=True)
CASES = [("images", stage) for stage in ("none", "encoder", "both")] + [("pairs", "language"), ("clips", "both")]


def asked_twice(items: list[Item]) -> list[Item]:
    """Two questions about each prompt's pictures."""
    other = "how many stars are there ?"
    return [one for item in items for one in (item, Item("count", item.pictures, item.video, other))]


ITEMS = {
    "images": lambda: scene_items(7),
    "pairs": lambda: asked_twice(pair_items(3)),
    "clips": lambda: asked_twice(clip_items(2)),
}


@pytest.mark.parametrize(("kind", "stage"), CASES)
@pytest.mark.parametrize("family", EMBEDDED)
def test_answers_and_counts_are_those_of_each_prompt_alone(
    family: str, kind: str, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "clips" and family not in WITH_VIDEOS:
        return
    model, processor = tiny.load(family)
    items = ITEMS[kind]()
    if stage != "none":
        preset = PRESETS[f"{model.config.model_type}/tiny"]["video" if kind == "clips" else "image"]
        patch(model, **budget_settings(preset, stage, 0.4), method="diverse")
    together, alone = (run_items(model, processor, items, batch_size=size) for size in (16, 1))
    assert together.answers == alone.answers
    np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=2e-3)
    assert (together.left, together.whole) == (alone.left, alone.whole)
    assert not caplog.records, "nobody is told of features without a forward"
    unpatch(model)


@needs_ready_features
@pytest.mark.parametrize("family", EMBEDDED)
def test_every_picture_is_encoded_once(family: str) -> None:
    model, processor = tiny.load(family)
    items = asked_twice(pair_items(3))
    seen: list[int] = []
    rows = family_of(model).encoder_layers(model)[0]
    rows.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0].numel()), with_kwargs=True)
    run_items(model, processor, items)
    together = sum(seen)
    seen.clear()
    run_items(model, processor, items, batch_size=1)
    assert together * 2 == sum(seen) > 0


def test_pictures_are_told_by_what_they_show() -> None:
    first, second = pair_items(2)
    same = Item("other", tuple(picture.copy() for picture in first.pictures), False, "what ?")
    swapped = Item("other", first.pictures[::-1], False, "what ?")
    assert distinct([first, second, same, swapped]) == ([0, 1, 3], [0, 1, 0, 2])


@needs_ready_features
@pytest.mark.parametrize("merged", [False, True], ids=["stock", "merged"])
@pytest.mark.parametrize(("family", "kind"), families_and({"images": (Sample(1, images=((60, 64), (32, 32))),)}))
@torch.no_grad()
def test_ready_features_are_those_of_the_pixels_or_none(family: str, kind: str, merged: bool) -> None:
    model = tiny_model(family)
    if merged:
        patch(model, **MERGING)
    sample = Sample(1, images=((60, 64), (32, 32)))
    few, inputs = inputs_for(model, (sample,)), inputs_for(model, (sample, sample))
    item: Any = Item("any", (np.zeros((4, 4, 3), np.uint8),) * 2, False, "what ?")
    given = repeated(model, inputs, few, [0, 0], item)
    if given is None:
        return  # what comes beside the features of a picture is more than evaluate knows
    bare = family_of(model).beside_features(inputs)
    found = model(**bare, mm_encoder_outputs=given["mm_encoder_outputs"]).logits
    torch.testing.assert_close(found, model(**inputs).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_models_that_take_no_ready_features_get_pixels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in older releases."""
    from illava_hooks.tools.evaluate import sharing

    monkeypatch.setattr(sharing, "takes_ready_features", lambda model: False)
    model = tiny_model(family)
    inputs = inputs_for(model, (Sample(1, images=((60, 64),)),))
    item = Item("any", (np.zeros((4, 4, 3), np.uint8),), False, "what ?")
    assert repeated(model, inputs, inputs, [0], item) is None


@pytest.mark.parametrize("name", EMBEDDED)
def test_flops_are_those_of_every_prompt_for_itself(name: str) -> None:
    """Whatever prompts stand in one batch, and whichever of them show the same picture."""
    model, processor = tiny.load(name)
    scenes = [item for item in scene_items(60, "validation") if item.pictures[0].shape == (64, 64, 3)][:6]
    items = [*scenes, *(replace(item, pictures=scenes[0].pictures) for item in scenes[1:4])]
    session = patch(model)
    alone = [0, 0]
    for item in items:
        run_items(model, processor, [item], 1)
        alone = [a + b for a, b in zip(alone, session.report.flops, strict=True)]
    assert run_items(model, processor, items, len(items)).flops == tuple(alone)
    assert run_items(model, processor, items, 4).flops == tuple(alone)
    unpatch(model)
    assert run_items(model, processor, items[:1], 1).flops == (0, 0)


class Counting:
    """A processor that counts the calls."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.calls = processor, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.processor(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


@pytest.mark.parametrize("most", [2**30, 0], ids=["kept", "no room"])
@pytest.mark.parametrize("family", EMBEDDED)
def test_prompts_are_prepared_once_for_all_methods_and_answers_stay_bitwise(family: str, most: int) -> None:
    model, processor = tiny.load(family)
    items = [*scene_items(5), *asked_twice(pair_items(1))]
    counting = Counting(processor)
    prompts = Prompts(counting, most)
    calls = []
    for method in (None, "diverse", "illava", "diverse"):
        if method:
            patch(model, method=method)
        kept = run_items(model, counting, items, 4, prompts=prompts)
        calls.append(counting.calls)
        anew = run_items(model, processor, items, 4)
        assert kept.answers == anew.answers and np.array_equal(kept.log_probs, anew.log_probs)
        assert (kept.left, kept.whole, kept.flops) == (anew.left, anew.whole, anew.flops)
        unpatch(model)
    assert calls == ([calls[0]] * 4 if most else [calls[0] * run for run in (1, 2, 3, 4)])
