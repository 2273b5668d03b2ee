"""LLaVA-OneVision on vLLM's Transformers back-end says what a patched model of transformers says, with the quota."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vllm
from asking import Reference, ask_engine, largest_difference, request_of
from engines import SHORT, running

from illava_hooks import Method
from illava_hooks.integrations.vllm import overrides, version_of
from illava_hooks.integrations.vllm.models import BACKEND_SINCE
from illava_hooks.tools.datasets import clip_items, scene_items
from illava_hooks.tools.items import Item

pytestmark = [
    pytest.mark.filterwarnings("default"),  # vLLM's own
    pytest.mark.skipif((version_of(vllm.__version__) or (0, 0)) < BACKEND_SINCE, reason="this back-end is younger"),
]

NAME = "llava_onevision"
SETTINGS: dict[str, Any] = {"vit_layers": [3, 4], "vit_r": 16}
QUOTA = {"method": Method("illava", quota=True)}
CLOSE = 1e-4
#: None fills a grid of tiles of 64 x 64 pixels, so all are cropped.
SIZES = ((100, 60), (128, 90), (70, 128), (50, 120))


def cropped_items(count: int) -> list[Item]:
    """Held-out scenes whose pictures are cut to sizes that unpadding crops."""
    found = []
    for number, item in enumerate(scene_items(count)):
        height, width = SIZES[number % len(SIZES)]
        (picture,) = item.pictures
        tiled = np.tile(picture, (2, 2, 1))[:height, :width]
        found.append(Item(item.kind, (np.ascontiguousarray(tiled),), False, item.question, item.answer))
    return found


@pytest.fixture(scope="module")
def ours(reference: Callable[[str], Reference]) -> Reference:
    return reference(NAME)


@pytest.fixture(scope="module")
def engine(folder: Callable[[str], Path]) -> Iterator[Any]:
    with running(folder(NAME), model_impl="transformers", hf_overrides=overrides(**SETTINGS)) as made:
        yield made


def test_cropped_images(engine: Any, ours: Reference) -> None:
    items = cropped_items(20 if SHORT else 100)
    found = ask_engine(engine, [request_of(ours.processor, item) for item in items])
    assert largest_difference(found, ours.ask(items, {**SETTINGS, **QUOTA})) < CLOSE


def test_whole_images(engine: Any, ours: Reference) -> None:
    items = scene_items(8 if SHORT else 40)
    found = ask_engine(engine, [request_of(ours.processor, item) for item in items])
    assert largest_difference(found, ours.ask(items, {**SETTINGS, **QUOTA})) < CLOSE


def test_clips(engine: Any, ours: Reference) -> None:
    items = clip_items(4 if SHORT else 40)
    found = ask_engine(engine, [request_of(ours.processor, item) for item in items])
    assert largest_difference(found, ours.ask(items, {**SETTINGS, **QUOTA})) < CLOSE


def test_strengths(engine: Any, ours: Reference) -> None:
    items = cropped_items(4)
    amounts = [0, 8, 20]
    asked = [request_of(ours.processor, item, {"illava_vit_r": amount}) for item in items for amount in amounts]
    found = ask_engine(engine, asked)
    for number, amount in enumerate(amounts):
        said = {**SETTINGS, **QUOTA, "vit_r": amount} if amount else None
        assert largest_difference(found[number::3], ours.ask(items, said)) < CLOSE, amount


def test_a_mutation_of_the_quota(engine: Any, ours: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the length of the prompt is not that of the reference."""
    from illava_hooks.engine import counts

    monkeypatch.setattr(counts, "shown_units", lambda units, shown: tuple(min(n, shown) for n in units))
    items = cropped_items(4)
    assert differs(engine, ours, items, 17)


def test_a_mutation_of_the_positions(engine: Any, ours: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    from illava_hooks.integrations.vllm import positions

    right = positions.from_digits
    monkeypatch.setattr(positions, "from_digits", lambda columns: right(columns) // 2)
    assert differs(engine, ours, cropped_items(4), 18)


def differs(engine: Any, ours: Reference, items: list[Item], amount: int) -> bool:
    try:
        found = ask_engine(engine, [request_of(ours.processor, item, {"illava_vit_r": amount}) for item in items])
        return largest_difference(found, ours.ask(items, {**SETTINGS, **QUOTA, "vit_r": amount})) > CLOSE
    except (AssertionError, ValueError):
        return True


def test_chunks_of_sixteen(folder: Callable[[str], Path], ours: Reference) -> None:
    chunked = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}
    items = cropped_items(8)
    with running(folder(NAME), model_impl="transformers", hf_overrides=overrides(**SETTINGS), **chunked) as engine:
        found = ask_engine(engine, [request_of(ours.processor, item) for item in items])
    assert largest_difference(found, ours.ask(items, {**SETTINGS, **QUOTA})) < CLOSE
