"""What only Qwen2-VL has: patches in groups of 2 x 2 on grids of any size."""

from __future__ import annotations

import pytest
from torch import nn

import reference as ref
from helpers import assert_says
from illava_hooks import UnsupportedModelError, patch, session_of
from illava_hooks.errors import InputError
from illava_hooks.tools.bench import Workload, build_workload
from reference_checks import SAMPLES, SETTINGS
from test_report import RAGGED, run
from tiny_models import inputs_for, tiny_model

NAME = "qwen2_vl"


def test_lengths_of_the_merged_reference() -> None:
    model = tiny_model(NAME)
    ours = ref.reference_forward(model, inputs_for(model, [SAMPLES["image"]]), **SETTINGS)
    # 24 groups lose 24 // 4 and 18 // 4; the span of 14 loses round(5.6), that of 8 round(3.2). 14 are text.
    assert [len(seats) for seats in ours.vision_seats[0]] == [14]
    assert ours.kv_lengths == [28, 22, 22, 19]


def test_vision_tokens_come_in_groups() -> None:
    model, inputs, _, report = run(NAME, RAGGED)
    grids = [*inputs["image_grid_thw"].tolist(), *inputs["video_grid_thw"].tolist()]
    for visual, (slices, height, width) in zip(report.visuals, grids, strict=True):
        chain = [height * width]
        for _ in range(2):
            chain.append(chain[-1] - int(chain[-1] * 0.25) // 4 * 4)
        expected = (chain[0], chain[0], chain[1], chain[2], chain[2])
        assert visual.vision_tokens == tuple(slices * n for n in expected)
        assert visual.language_tokens[0] == slices * chain[2] // 4


def test_foreign_blocks() -> None:
    model = tiny_model(NAME)
    model.model.visual.blocks = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, [1], 4, [1], 0.5)
    assert_says(caught.value, "^visual has Linear blocks", "use a stock Qwen2-VL model")
    assert session_of(model) is None


@pytest.mark.parametrize("patches", [1, 14, 15, 18])
def test_workloads_of_half_groups_are_refused(patches: int) -> None:
    with pytest.raises(InputError, match=f"patches is {patches}; give a product of two even numbers"):
        build_workload(tiny_model(NAME), Workload(patches=patches))
