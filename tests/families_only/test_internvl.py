"""InternVL: the tower again, block by block, with the class token in front; and what cannot work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from families import family
from helpers import assert_says
from illava_hooks import Method, UnsupportedModelError, merging, patch
from illava_hooks.engine import attention_tap
from illava_hooks.engine.records import records_of
from illava_hooks.merge import rules, scores
from illava_hooks.patchers import internvl
from tiny_models import Sample, inputs_for, tiny_model
from unit_oracle import merged

SETTINGS: dict[str, Any] = {"vit_layers": [1, 3], "vit_r": 16, "llm_layers": []}
SIDE, UNIT = 8, 4


def model_of(**kwargs: Any) -> Any:
    return tiny_model("internvl", dtype=torch.float64, **kwargs)


def inputs(model: Any) -> dict[str, Tensor]:
    found = inputs_for(model, [Sample(1, images=((32, 32), (32, 32)))])
    return {**found, "pixel_values": found["pixel_values"].double()}


def blocks() -> list[list[int]]:
    """The patches of each token, from rows and columns of the picture."""
    return [
        [(2 * top + row) * SIDE + 2 * left + column for row in range(2) for column in range(2)]
        for top in range(SIDE // 2)
        for left in range(SIDE // 2)
    ]


@torch.no_grad()
def tower_again(model: Any, pixels: Tensor, rule: str) -> dict[int, Tensor]:
    """Projected feature of each surviving block of one tile."""
    tower, heads = model.model.vision_tower, model.config.vision_config.num_attention_heads
    states = tower.embeddings(pixels[None])[0]
    first, units = states[:1], {block: states[1:][patches] for block, patches in enumerate(blocks())}
    for index, layer in enumerate(tower.encoder.layer):
        rows, attention = torch.cat([first, *units.values()]), layer.attention
        normed = layer.layernorm_before(rows)
        q, k, v = (
            norm(linear(normed)).view(len(rows), heads, -1).transpose(0, 1)
            for linear, norm in (
                (attention.q_proj, attention.q_norm),
                (attention.k_proj, attention.k_norm),
                (attention.v_proj, lambda table: table),
            )
        )
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        rows = rows + layer.lambda_1 * attention.projection_layer((weights @ v).transpose(0, 1).flatten(1))
        first, units = rows[:1], dict(zip(units, rows[1:].split(UNIT), strict=True))
        if index in SETTINGS["vit_layers"]:
            received = weights.mean((0, 1))[1:].split(UNIT)
            ranked = {block: float(part.mean()) for block, part in zip(units, received, strict=True)}
            units = merged(rule, units, ranked, SETTINGS["vit_r"] // UNIT)
        rows = torch.cat([first, *units.values()])
        rows = rows + layer.lambda_2 * layer.mlp(layer.layernorm_after(rows))
        first, units = rows[:1], dict(zip(units, rows[1:].split(UNIT), strict=True))
    joined = torch.stack([tower.layernorm(rows).flatten() for rows in units.values()])
    return dict(zip(units, model.model.multi_modal_projector(joined), strict=True))


def check_oracle(rule: str) -> None:
    model = model_of()
    pixels = inputs(model)["pixel_values"]
    expected = [tower_again(model, tile, rule) for tile in pixels]
    patch(model, **SETTINGS, method=Method("mine", encoder_score="received_attention", merge=rule))
    with torch.no_grad():
        output = model.model.get_image_features(pixels)
    for features, record, alone in zip(output.pooler_output, records_of(output) or [], expected, strict=True):
        assert record.keep is not None and record.survivor_of is not None
        assert record.keep.nonzero().flatten().tolist() == sorted(alone)
        for block, survivor in enumerate(record.survivor_of.tolist()):
            # The norms of queries and keys compute in float32, whatever the model is in.
            torch.testing.assert_close(features[block], alone[survivor], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_the_tower_is_that_of_the_surviving_blocks(rule: str) -> None:
    check_oracle(rule)


@pytest.mark.parametrize("lends", [True, False])
@pytest.mark.parametrize("rule", ["drop", "recycle"])
def test_so_it_is_where_kernels_score(rule: str, lends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices one kernel scores the rows of all tiles, class tokens and all; with a lent LSE and without."""
    for module in (scores, rules, attention_tap):
        monkeypatch.setattr(module, "takes", lambda device: True)
    if not lends:
        monkeypatch.setattr(attention_tap, "_is_plain", lambda *_, **__: False)
    check_oracle(rule)


@pytest.mark.parametrize("wrong", [{"order": None}, {"prefix": 0}])
def test_the_oracle_sees_other_blocks_and_a_class_token_that_merges(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = internvl.rows_of

    def rows_of(base: Any) -> Any:
        traits, patches = stock(base)
        return replace(traits, **wrong), patches + ("prefix" in wrong) * UNIT

    monkeypatch.setattr(internvl, "rows_of", rows_of)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check_oracle("drop")


def test_the_report_counts_the_class_token() -> None:
    model = tiny_model("internvl", attn_implementation="eager", text={"num_hidden_layers": 2})
    prompt = inputs_for(model, [Sample(1, images=((32, 32), (32, 32)))])
    session = patch(model, **SETTINGS, method=Method("mine", encoder_score="uniform", merge="drop"))
    for index, enabled in enumerate((True, False)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, merging(model, enabled):
            model(**prompt)
        counts = counter.get_flop_counts()
        encoder = next(sum(n.values()) for name, n in counts.items() if name.endswith("vision_tower.encoder"))
        projector = next(sum(n.values()) for name, n in counts.items() if name.endswith("multi_modal_projector"))
        assert session.report.encoder_flops[index] == pytest.approx(encoder, rel=0.01)
        assert session.report.projector_flops[index] == pytest.approx(projector, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"vision_feature_select_strategy": "full"}, ("vision_feature_select_strategy is 'full'", "'default'")),
        ({"vision_feature_layer": [-2, -1]}, ("vision_feature_layer is", "single layer")),
    ],
)
def test_features_without_a_square_grid_are_refused(overrides: dict[str, Any], says: tuple[str, ...]) -> None:
    model = model_of()
    for name, value in overrides.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedModelError) as caught:
        patch(model, **SETTINGS)
    assert_says(caught.value, *says)


def test_a_call_with_another_choice_is_refused() -> None:
    model = model_of()
    patch(model, **SETTINGS)
    pixels = inputs(model)["pixel_values"]
    for choice, says in (
        ({"vision_feature_select_strategy": "full"}, "which leaves no square grid"),
        ({"vision_feature_layer": 1}, "the model was patched for -1"),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            model.get_image_features(pixels, **choice)
        with merging(model, False), torch.no_grad():
            if "vision_feature_layer" in choice:
                model.get_image_features(pixels, **choice)


def test_an_earlier_layer_may_give_the_features() -> None:
    """As stock gives them when nothing is removed; with merges in front of it, survivors'."""
    model = model_of(vision_feature_layer=-2)
    prompt = inputs(model)
    with torch.no_grad():
        expected = model(**prompt).logits
    patch(model, vit_layers=[1], vit_r=0.01, llm_layers=[])
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, expected, rtol=0, atol=0)
    session = patch(model, vit_layers=[1], vit_r=16, llm_layers=[])
    with torch.no_grad():
        assert not torch.allclose(model(**prompt).logits, expected)
    assert session.report.visuals[0].language_tokens[0] == 12
    assert family("internvl").title == "InternVL"
