"""The scores that decide for two back-ends in transformers' own tests are true ones, and others are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from families import families
from illava_hooks import patch
from illava_hooks.merge.scores import SCORES
from tiny_models import Sample, inputs_for, tiny_model
from transformers_suite.alike import CLOSE, AlikeScores


def given(monkeypatch: pytest.MonkeyPatch, scores: Tensor) -> Any:
    """Inputs of a score, and what it says of them."""
    monkeypatch.setitem(SCORES, "received_attention", lambda inputs: scores)
    return type("Inputs", (), {"layer_idx": 0})()


@pytest.mark.parametrize(("apart", "same"), [(0.0, True), (0.9 * CLOSE, True), (1.1 * CLOSE, False), (1.0, False)])
def test_scores_within_a_share_of_their_spread_are_one(
    apart: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = torch.tensor([[0.50, 0.52, 0.54]] * 3)
    score = AlikeScores().score("received_attention")
    assert score(given(monkeypatch, first)) is first
    second = first + torch.tensor([0.0, apart * 0.04, 0.0])
    assert (score(given(monkeypatch, second)) is first) == same


@pytest.mark.parametrize("family", families(embedded=True))
def test_a_model_merges_by_its_own_scores(family: str) -> None:
    """As the method "illava" does, up to the rounding of another way to the same scores."""
    found = []
    for method in ("illava", AlikeScores().method()):
        model = tiny_model(family)
        patch(model, [1, 2], 0.25, [2], 0.5, method=method)
        with torch.no_grad():
            found.append(model(**inputs_for(model, [Sample(images=((32, 48),))])).logits)
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)
