"""Scores against the rows of an explicit softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from illava_hooks.merge import scores
from illava_hooks.merge.scores import SCORES, ScoreInputs

SAMPLES, HEADS, GROUPS, TOKENS, KEYS, WIDTH = 2, 4, 2, 11, 15, 8


def score_inputs(
    causal: bool = True, padded: bool = True, dtype: torch.dtype = torch.float32, **other: Any
) -> ScoreInputs:
    """Random queries and keys: 4 keys of a cache, then 11 new ones; sample 0 starts with padding."""
    query, key = (
        torch.randn(SAMPLES, HEADS, TOKENS, WIDTH, dtype=dtype),
        torch.randn(SAMPLES, GROUPS, KEYS, WIDTH, dtype=dtype),
    )
    valid = torch.ones(SAMPLES, KEYS, dtype=torch.bool)
    valid[0, :3] = False
    settings: dict[str, Any] = {
        "key": key,
        "query": lambda: query,
        "last_query": lambda: query[:, :, -1],
        "positions": torch.arange(TOKENS).expand(SAMPLES, TOKENS),
        "key_valid": valid if padded else None,
        "scale": WIDTH**-0.5,
        "layer_idx": 3,
        "causal": causal,
    }
    return ScoreInputs(**{**settings, **other})


def masked_logits(inputs: ScoreInputs) -> Tensor:
    key = inputs.key.repeat_interleave(HEADS // GROUPS, dim=1)
    logits = (inputs.query().float() @ key.float().transpose(2, 3)) * inputs.scale
    if inputs.key_valid is not None:
        logits = logits.masked_fill(~inputs.key_valid[:, None, None], -torch.inf)
    if inputs.causal:
        future = torch.ones(TOKENS, KEYS, dtype=torch.bool).triu(KEYS - TOKENS + 1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_received_attention_is_the_column_mean(
    causal: bool, padded: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", block)
    inputs = score_inputs(causal, padded)
    expected = masked_logits(inputs).softmax(-1).mean((1, 2))[:, -TOKENS:]
    torch.testing.assert_close(SCORES["received_attention"](inputs), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
@pytest.mark.parametrize("causal", [False, True])
def test_query_lse_is_the_mean_log_sum(causal: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BLOCK_ELEMENTS", block)
    inputs = score_inputs(causal)
    expected = masked_logits(inputs).logsumexp(-1).mean(1)
    torch.testing.assert_close(SCORES["query_lse"](inputs), expected, atol=1e-5, rtol=1e-5)


def test_last_query_attention_is_one_row() -> None:
    inputs = score_inputs()
    expected = masked_logits(inputs).softmax(-1)[:, :, -1].mean(1)[:, -TOKENS:]
    torch.testing.assert_close(SCORES["last_query_attention"](inputs), expected, atol=1e-6, rtol=1e-5)


def test_tokens_behind_the_query_have_no_say() -> None:
    place = torch.tensor([6, 9])
    inputs = score_inputs(last_place=place)
    row = torch.arange(SAMPLES)
    query = inputs.query()[row, :, place]
    inputs = score_inputs(last_place=place, key=inputs.key, query=inputs.query, last_query=lambda: query)
    expected = masked_logits(inputs).softmax(-1)[row, :, place].mean(1)[:, -TOKENS:]
    torch.testing.assert_close(SCORES["last_query_attention"](inputs), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SCORES)
def test_half_precision_is_finite_float32(name: str, dtype: torch.dtype) -> None:
    score = SCORES[name](score_inputs(dtype=dtype))
    assert score.dtype == torch.float32 and score.shape == (SAMPLES, TOKENS)
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("name", SCORES)
def test_samples_never_mix(name: str) -> None:
    inputs = score_inputs()
    whole = SCORES[name](inputs)
    for sample in range(SAMPLES):
        pick = slice(sample, sample + 1)
        valid = inputs.key_valid
        assert valid is not None
        query, last = inputs.query()[pick], inputs.last_query()[pick]
        alone = score_inputs(
            key=inputs.key[pick],
            query=lambda query=query: query,
            last_query=lambda last=last: last,
            positions=inputs.positions[pick],
            key_valid=valid[pick],
        )
        torch.testing.assert_close(SCORES[name](alone), whole[pick], atol=1e-6, rtol=1e-5)


def test_random_is_reproducible_and_differs_by_place_and_layer() -> None:
    torch.manual_seed(1)
    first = SCORES["random"](score_inputs(positions=torch.arange(5000).expand(1, -1)))
    torch.manual_seed(2)
    again = SCORES["random"](score_inputs(positions=torch.arange(5000).expand(1, -1)))
    other = SCORES["random"](score_inputs(positions=torch.arange(5000).expand(1, -1), layer_idx=4))
    assert torch.equal(first, again)
    assert first.unique().numel() > 4990
    assert 0 <= first.min() and first.max() <= 1
    assert abs(first.mean().item() - 0.5) < 0.02 and abs(first.std().item() - 12**-0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([first[0], other[0]]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([first[0, 1:], first[0, :-1]]))[0, 1]) < 0.05


def test_uniform_keeps_tokens_everywhere() -> None:
    score = SCORES["uniform"](score_inputs(positions=torch.arange(729).expand(1, -1)))[0]
    kept = score.topk(243).indices.sort().values
    assert kept.diff().max() <= 6
