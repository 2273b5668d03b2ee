"""Score functions of one's own: any dtype that orders, one score per token, or an error that says what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_helpers import IMAGES, KINDS, RAGGED, RICHEST, SETTINGS
from helpers import assert_differ, assert_same, assert_says, forward
from illava_hooks import MergeConfigError, Method, patch, session_of
from illava_hooks.merge.scores import ScoreInputs
from tiny_models import FAMILIES, inputs_for, tiny_model

STAGES = ("encoder_score", "llm_score")
RULES = ("recycle", "cluster", "nearest", "diverse", "selective", "drop")


def places(inputs: ScoreInputs) -> Tensor:
    """Whole numbers below 127, exact in every dtype; in long spans some are equal."""
    return (inputs.positions * 29 + 13 * inputs.layer_idx) % 127


def scored_by(dtype: torch.dtype) -> Any:
    return lambda inputs: places(inputs).to(dtype)


def run(family: str, method: Method, batch: Any) -> tuple[dict[str, Tensor], Any]:
    model = tiny_model(family)
    session = patch(model, **SETTINGS[family], method=method)
    return forward(model, inputs_for(model, batch)), session


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("stages", [STAGES[:1], STAGES[1:], STAGES], ids=["encoder", "language model", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_dtype_works_like_float32(family: str, stages: tuple[str, ...], dtype: torch.dtype) -> None:
    batch = [*RAGGED, RICHEST[family]]
    expected, _ = run(family, Method("mine", **dict.fromkeys(stages, scored_by(torch.float32))), batch)
    found, session = run(family, Method("mine", **dict.fromkeys(stages, scored_by(dtype))), batch)
    assert_same(found, expected)
    assert session.report.kept_fraction < 0.5
    default, _ = run(family, Method("mine"), batch)
    assert_differ(found["forward.logits"], default["forward.logits"])


@pytest.mark.parametrize("merge", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_numbers_under_every_rule(family: str, merge: str) -> None:
    scores = [dict.fromkeys(STAGES, scored_by(dtype)) for dtype in (torch.float32, torch.int64)]
    expected, found = (run(family, Method("mine", **own, merge=merge), KINDS["images"])[0] for own in scores)
    assert_same(found, expected)


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "a token too few": lambda scores: scores[:, 1:],
    "a token too many": lambda scores: torch.cat([scores, scores[:, :1]], dim=1),
    "a score per head": lambda scores: scores[:, None].expand(-1, 4, -1),
    "a score per channel": lambda scores: scores[..., None].expand(-1, -1, 8),
    "flat": lambda scores: scores.flatten(),
    "turned": lambda scores: torch.cat([scores, scores[:1]]).T,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_shape_is_refused(family: str, stage: str, wrong: str) -> None:
    seen: list[tuple[torch.Size, torch.Size]] = []

    def score(inputs: ScoreInputs) -> Tensor:
        found = WRONG[wrong](places(inputs).float())
        seen.append((inputs.positions.shape, found.shape))
        return found

    model = tiny_model(family)
    inputs = inputs_for(model, [IMAGES])
    stock = forward(model, inputs)
    own: dict[str, Any] = {stage: score}
    patch(model, **SETTINGS[family], method=Method("mine", **own))
    with pytest.raises(MergeConfigError) as caught:
        forward(model, inputs)
    (wanted, given), *_ = seen
    assert len(seen) == 1
    wanted_text, given_text = (", ".join(map(str, shape)) for shape in (wanted, given))
    assert_says(caught.value, "mine", "score", rf"[(\[]{wanted_text},?[)\]]", rf"[(\[]{given_text},?[)\]]")
    session_of(model).enabled = False
    assert_same(forward(model, inputs), stock)


def lost(inputs: ScoreInputs) -> Tensor:
    return inputs.positions * float("nan")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_that_knows_no_token_is_a_mistake(family: str, stage: str) -> None:
    own: Any = {stage: lost}
    model = tiny_model(family)
    inputs = inputs_for(model, KINDS["images"])
    patch(model, **SETTINGS[family], method=Method("lost", **own))
    with pytest.raises(MergeConfigError) as told:
        model(**inputs)
    assert_says(told.value, "the score of method 'lost' returned NaN for all", "infinity")
    # Broken pixels are no mistake of the score's.
    broken = {name: value * float("nan") if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        assert model(**broken).logits.shape[0] == len(inputs["input_ids"])
