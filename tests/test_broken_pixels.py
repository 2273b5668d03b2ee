"""NaN and infinity in one image change nothing for text, for other images and for other samples.

A NaN score counts as the lowest one. A sort by itself puts NaN last, behind the padding of a segment; then more tokens
stay than planned, and those of another image or sample have to make room.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_helpers import SETTINGS, patched
from families import families_and_methods, family_of
from helpers import key_lengths, keyed
from illava_hooks import METHODS, MergeReport, Method, merging, patch, session_of
from illava_hooks.merge.plan import build_plan
from illava_hooks.merge.rules import RULES, RuleInputs
from illava_hooks.merge.scores import ScoreInputs, random_scores
from illava_hooks.merge.segments import Segments
from tiny_models import FAMILIES, Inputs, Sample, inputs_for, tiny_model

#: The second image of the batch is the broken one; it is smaller than the others, which is where padding comes from,
#: and fills its tiles: how many tokens of cropped tiles stay depends on where survivors lie (`Method.quota`).
BATCH = [
    Sample(text_seed=3, images=((48, 90),), text=(5, 7)),
    Sample(text_seed=1, images=((32, 32), (64, 64)), text=(4, 3, 6)),
    Sample(text_seed=4, images=((96, 40), (32, 48)), text=(5, 2, 7)),
]
BROKEN = 1
ALIGNED = sorted(set(METHODS) - {"illava-reference"})
LENGTHS, REMOVED = (9, 5, 7), (4, 3, 2)


def rule_inputs(scores: Tensor, hidden: Tensor) -> RuleInputs:
    """Three segments of unequal length; padding has the score +inf."""
    padding = torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]
    return RuleInputs(
        scores=scores.masked_fill(padding, torch.inf),
        lengths=LENGTHS,
        num_removed=REMOVED,
        hidden=lambda: hidden,
        keys=lambda: hidden.flip(-1),
        sizes=lambda: torch.ones(scores.shape),
    )


def decide(rule: str, scores: Tensor, hidden: Tensor) -> list[tuple[Tensor, ...]]:
    """What a rule's plan says of each segment; and it says how many stay."""
    segments = Segments.packed([9] * 3, torch.device("cpu"))
    inside = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    most = sum(LENGTHS) - sum(REMOVED)
    plan = build_plan(RULES[rule](rule_inputs(scores, hidden)), segments, inside.view(1, -1), most, full=True)
    kept, holders = plan.keep_mask.view(3, 9), plan.holders.view(3, 9)
    assert (kept & inside).sum(1).tolist() == [n - r for n, r in zip(LENGTHS, REMOVED, strict=True)]
    assert plan.keep_mask.flatten()[holders][inside].all()
    said: list[tuple[Tensor, ...]] = []
    for segment in range(3):
        mine = (plan.absorbed // 9 == segment) & (plan.weights > 0)
        edges = (plan.absorbed[mine], plan.anchors[mine], plan.weights[mine])
        said.append((kept[segment], holders[segment], plan.self_weights.view(3, 9)[segment], *edges))
    return said


@pytest.mark.parametrize("where", ["scores", "hidden states", "both"])
@pytest.mark.parametrize("which", [slice(None), slice(2, 4)], ids=["whole", "part"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_as_many_as_planned(rule: str, which: slice, where: str) -> None:
    scores, hidden = torch.rand(3, 9), torch.randn(3, 9, 4)
    expected = decide(rule, scores, hidden)
    broken_scores, broken_hidden = scores.clone(), hidden.clone()
    if where != "hidden states":
        broken_scores[1, which] = math.nan
    if where != "scores":
        broken_hidden[1, which] = math.nan
    found = decide(rule, broken_scores, broken_hidden)
    for segment in (0, 2):
        for ours, theirs in zip(found[segment], expected[segment], strict=True):
            assert torch.equal(ours, theirs), f"segment {segment} without NaN"


def test_nan_is_the_lowest_score() -> None:
    scores = torch.arange(27.0).view(3, 9)
    scores[1, 3] = math.nan
    hidden = torch.randn(3, 9, 4)
    kept = decide("drop", scores, hidden)[1][0]
    assert kept[:5].tolist() == [False, False, True, False, True]
    scores[1, :2] = -math.inf
    kept = decide("drop", scores, hidden)[1][0]
    assert kept[:5].tolist() == [False, False, True, False, True]


def spoil(family: str, inputs: Inputs, value: float) -> Inputs:
    """The same batch with one image whose pixels are all ``value``."""
    pixels = inputs["pixel_values"].clone()
    pixels[family_of(family).pixel_rows(inputs, BROKEN)] = value
    return {**inputs, "pixel_values": pixels}


def run(model: Any, inputs: Inputs) -> tuple[Any, Any, Any]:
    """Output, report and provenance of a forward."""
    with torch.no_grad():
        output = model(**inputs)
    session = session_of(model)
    assert session is not None
    return output, session.report, session.provenance


def same_report(family: str, one: MergeReport, other: MergeReport) -> bool:
    """But for what windows cost, where there are some."""
    if family_of(family).has_windows:
        other = replace(other, encoder_flops=(one.encoder_flops[0], other.encoder_flops[1]))
    return one == other


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("family", "method"), families_and_methods(ALIGNED))
def test_one_broken_image_in_a_batch(family: str, method: str, value: float) -> None:
    model = patched(family, method=method, track=True)
    inputs = inputs_for(model, BATCH)
    whole, planned, before = run(model, inputs)
    output, report, after = run(model, spoil(family, inputs, value))
    assert same_report(family, report, planned)
    lengths = [key_lengths(out.past_key_values) for out in (output, whole)]
    assert lengths[0] == lengths[1]
    for row in (0, 2):
        real = inputs["attention_mask"][row].bool()
        assert torch.equal(output.logits[row][real], whole.logits[row][real])
        for ours, theirs in zip(keyed(output.past_key_values), keyed(whole.past_key_values), strict=True):
            valid = slice(None) if theirs.ledger.valid is None else theirs.ledger.valid[row]
            assert torch.equal(ours.keys[row][:, valid], theirs.keys[row][:, valid])
    for (stage, layer), merge in before.merges.items():
        again = after.at(stage, layer).images
        for index, (ours, theirs) in enumerate(zip(again, merge.images, strict=True)):
            assert len(ours.seats.unique()) == len(ours.seats) == len(theirs.seats)
            if index != BROKEN and (stage == "vision" or index != BROKEN + 1):  # the next one shares its prompt
                assert torch.equal(ours.seats, theirs.seats) and torch.equal(
                    ours.weights.to_dense(), theirs.weights.to_dense()
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_text_in_front_of_a_broken_image_is_as_broken_as_without_merging(family: str) -> None:
    model = patched(family)
    inputs = spoil(family, inputs_for(model, BATCH), math.nan)
    with torch.no_grad():
        merged = model(**inputs).logits.isfinite().all(-1)
        with merging(model, False):
            stock = model(**inputs).logits.isfinite().all(-1)
    assert stock[0].all() and stock[2].all() and not stock[1].all()
    assert torch.equal(merged, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_broken_image_alone_generates_as_many_tokens(family: str) -> None:
    model = patched(family)
    inputs = inputs_for(model, BATCH[:1])
    inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], math.nan)
    ids = model.generate(**inputs, max_new_tokens=3)
    assert ids.shape == (1, inputs["input_ids"].shape[1] + 3)


def half_known(inputs: ScoreInputs) -> Tensor:
    """A score that does not know every other token."""
    scores = random_scores(inputs)
    return torch.where(inputs.positions % 8 < 4, math.nan, scores)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_of_ones_own_that_gives_nan(family: str, rule: str) -> None:
    model = tiny_model(family)
    reports = []
    for score in (random_scores, half_known):
        patch(model, **SETTINGS[family], method=Method("own", score, score, rule), track=True)
        output, report, provenance = run(model, inputs_for(model, BATCH))
        assert output.logits.isfinite().all()
        for image, visual in zip(provenance.at("language", 3).images, report.visuals, strict=True):
            assert len(image.seats.unique()) == visual.language_tokens[-1]
        reports.append(report)
    steps = [[visual.vision_tokens for visual in report.visuals] for report in reports]
    assert steps[0] == steps[1]
    # How many tokens are cropped away with the border of tiles depends on who is kept.
    assert same_report(family, *reports) or not family_of(family).one_to_one
