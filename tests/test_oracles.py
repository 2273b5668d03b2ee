"""The oracles of all families see mistakes: each is broken on purpose, and the test that stands on it has to fail.

Mutations of what only one family has stand beside its oracle, in `tests/families_only`.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import test_every_family as every
from families import FAMILIES, families
from illava_hooks.engine import decoder
from illava_hooks.engine.decoder import DecoderRun, PromptState
from illava_hooks.engine.encoder import EncoderRun
from reference_checks import SAMPLES, SETTINGS, check_forward


def the_token_in_front_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptState, "query", property(lambda state: state.places[:, -1] - 1))


def neighbours_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = DecoderRun._ranking

    def shifted(run: DecoderRun, layer_idx: int) -> Any:
        scores, keys = rank(run, layer_idx)
        return scores.roll(1, 1), keys

    monkeypatch.setattr(DecoderRun, "_ranking", shifted)


@pytest.mark.parametrize("broken", [the_token_in_front_asks, neighbours_are_ranked])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_scores_are_seen(family: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        every.test_the_score_is_the_row_of_the_eager_attention(family, "images", 2, "left")


def survivors_turn_as_a_neighbour_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one channel of the RoPE tables: of three axes of positions that is one."""
    after = decoder._after

    def shifted(*args: Any) -> PromptState:
        state = after(*args)
        assert state.rope is not None
        state.rope[..., 1] = state.rope[..., 1].roll(1, 1)
        return state

    monkeypatch.setattr(decoder, "_after", shifted)


def a_neighbour_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is said to stay, the hidden state is the next one's."""
    apply_merge = decoder.apply_merge
    monkeypatch.setattr(decoder, "apply_merge", lambda hidden, plan: apply_merge(hidden.roll(1, 1), plan))


@pytest.mark.parametrize("broken", [survivors_turn_as_a_neighbour_does, a_neighbour_goes_on])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_decoder_is_seen(family: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        every.test_the_decoder_is_its_layers_one_by_one(family, "images", "sdpa", [2], "left")


def neighbours_are_ranked_in_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = EncoderRun.scores

    def shifted(*args: Any) -> Tensor:
        return scores(*args).roll(1)

    monkeypatch.setattr(EncoderRun, "scores", shifted)


@pytest.mark.parametrize(
    "broken", [neighbours_are_ranked_in_the_encoder, neighbours_are_ranked, survivors_turn_as_a_neighbour_does]
)
@pytest.mark.parametrize("family", families(with_reference=True))
def test_the_slow_reference_sees_it(family: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_forward(family, [SAMPLES["image"]], "drop", SETTINGS)
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check_forward(family, [SAMPLES["image"]], "drop", SETTINGS)
