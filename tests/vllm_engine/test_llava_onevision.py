"""LLaVA-OneVision on vLLM's Transformers back-end says what a patched model of transformers says, with the quota."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from asking import Answer, Reference, ask_engine, largest_difference, request_of
from engines import counted, running

from illava_hooks import Method, PatchStateError
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.integrations.vllm import overrides, version_of
from illava_hooks.integrations.vllm.models import BACKEND_SINCE
from illava_hooks.tools.datasets import clip_items, pair_items, scene_items
from illava_hooks.tools.items import Item

pytestmark = [
    pytest.mark.filterwarnings("default"),  # vLLM's own
    pytest.mark.skipif((version_of(vllm.__version__) or (0, 0)) < BACKEND_SINCE, reason="this back-end is younger"),
]

NAME = "llava_onevision"
SETTINGS: dict[str, Any] = {"vit_layers": [3, 4], "vit_r": 16}
QUOTA = {"method": Method("illava", quota=True)}
CLOSE = 1e-4
#: Scores of vLLM and transformers differ by less than half of this.
ROUNDING = 3e-7
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
        "pairs": pair_items(counted(40)),
        "clips": clip_items(counted(40)),
    }


def exchanged(ours: Reference, items: list[Item]) -> dict[int, Answer]:
    """What is said where two scores that rounding alone tells apart change places; by the clip's number.

    Tokens are folded into one with weights that go by rank. Where two scores are equal up to rounding, another order
    of sums exchanges their ranks, and the weights with them.
    """
    closest = torch.inf, 0, 0, 0
    swapping: tuple[int, int, int] | None = None
    right = EncoderRun.scores

    def scores(run: EncoderRun, merges: int, tap: Any) -> torch.Tensor:
        nonlocal closest
        found = right(run, merges, tap)
        rows = found.view(len(run.lengths), -1)
        ranks = rows.argsort(1)
        folded = run.lengths[0][merges] - run.lengths[0][merges + 1] + 1
        gaps = rows.gather(1, ranks)[:, : folded + 1].diff(dim=1)
        row, rank = divmod(int(gaps.argmin()), folded)
        closest = min(closest, (float(gaps[row, rank]), merges, row, rank))
        if swapping is not None and swapping[0] == merges:
            row, rank = swapping[1:]
            pair = ranks[row, rank : rank + 2]
            rows[row, pair] = rows[row, pair.flip(0)]
        return found

    answers = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EncoderRun, "scores", scores)
        for number, item in enumerate(items):
            closest, swapping = (torch.inf, 0, 0, 0), None
            ours.answer(item, SETTINGS | QUOTA)
            if closest[0] < ROUNDING:
                swapping = closest[1:]
                answers[number] = ours.answer(item, SETTINGS | QUOTA)
    return answers


class Expected:
    """What transformers says, asked before vLLM changes classes of transformers in this process."""

    def __init__(self, ours: Reference) -> None:
        self.processor = ours.processor
        few = cropped_items(4)
        self.by_kind = {kind: ours.ask(items, SETTINGS | QUOTA) for kind, items in questions().items()}
        self.exchanged = exchanged(ours, questions()["clips"])
        self.by_amount = {n: ours.ask(few, SETTINGS | QUOTA | {"vit_r": n} if n else None) for n in AMOUNTS}


@pytest.fixture(scope="module")
def ours(folder: Callable[[str], Path]) -> Expected:
    return Expected(Reference(folder(NAME)))


@pytest.fixture(scope="module")
def engine(folder: Callable[[str], Path], ours: Expected) -> Iterator[Any]:
    with running(folder(NAME), model_impl="transformers", hf_overrides=overrides(**SETTINGS)) as made:
        yield made


@pytest.mark.parametrize("kind", ["cropped", "whole", "pairs"])
def test_answers_are_those_of_patch(engine: Any, ours: Expected, kind: str) -> None:
    found = ask_engine(engine, [request_of(ours.processor, item) for item in questions()[kind]])
    assert largest_difference(found, ours.by_kind[kind]) < CLOSE


def test_clips(engine: Any, ours: Expected) -> None:
    """Also where two scores are equal up to rounding: then one order of them or the other."""
    found = ask_engine(engine, [request_of(ours.processor, item) for item in questions()["clips"]])
    expected = ours.by_kind["clips"]
    assert largest_difference(found, expected) < 1e-2
    apart = [n for n, mine in enumerate(found) if largest_difference([mine], [expected[n]]) >= CLOSE]
    assert len(apart) <= max(1, len(found) // 20)
    for number in apart:
        assert largest_difference([found[number]], [ours.exchanged[number]]) < CLOSE, number


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


def test_clips_of_any_form_are_counted() -> None:
    """One, several of one length, and several of different lengths, which vLLM leaves in a list."""
    from illava_hooks.integrations.vllm.transformers_backend import shapes_of

    one, other = torch.zeros(3, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    for pixels, frames in ((one, [3]), (torch.stack([one, one]), [3, 3]), ([one, other], [3, 2])):
        assert shapes_of(None, "video", {"pixel_values_videos": pixels}) == [(n,) for n in frames]
