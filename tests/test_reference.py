"""The slow reference is right by itself, and the library gives what the reference gives.

First the tiny models: a stock batch gives what its rows give alone. Then the reference: without merging it is
the stock model, and each merge rule gives numbers worked out by hand. Last the library against the reference,
through the public API, in float64, where the families keep rounding out of the way.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reference as ref
from families import families, families_and, family_of
from helpers import feature_outputs, key_lengths
from illava_hooks import patch
from reference_checks import (
    MERGED,
    RULES,
    SAMPLES,
    SETTINGS,
    TOLERANCE,
    assert_close,
    check_forward,
    library_method,
    tolerance_of,
)
from tiny_models import Inputs, Sample, inputs_for, real_positions, tiny_model

NEW_TOKENS = 5
STOCK_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}


# ------------------------------------------------------------------------------ tiny models


BATCHES = {
    "images": (Sample(1, images=((48, 30),)), Sample(2, images=((30, 30), (64, 64))), Sample(5, text=(6,))),
    "videos": (Sample(3, videos=(4,)), Sample(4, images=((32, 32),), videos=(4,), text=(2, 1, 3))),
    "text": (Sample(5, text=(9,)), Sample(6, text=(4,))),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "batch"), families_and(BATCHES))
def test_stock_batch_equals_its_rows(family: str, batch: str, side: Any) -> None:
    model, samples = tiny_model(family), BATCHES[batch]
    inputs = inputs_for(model, samples, side)
    with torch.no_grad():
        logits = model(**inputs).logits
        for row, sample in enumerate(samples):
            alone = model(**inputs_for(model, [sample])).logits[0]
            torch.testing.assert_close(logits[row, real_positions(inputs, row)], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("family", "batch"), families_and(BATCHES))
def test_stock_batch_generates_what_its_rows_generate(family: str, batch: str) -> None:
    model, samples = tiny_model(family), BATCHES[batch]
    ids = model.generate(**inputs_for(model, samples), max_new_tokens=NEW_TOKENS)
    for row, sample in enumerate(samples):
        alone = model.generate(**inputs_for(model, [sample]), max_new_tokens=NEW_TOKENS)
        assert ids[row, -NEW_TOKENS:].tolist() == alone[0, -NEW_TOKENS:].tolist()


# ------------------------------------------------------------------------- without merging


@pytest.mark.parametrize("dtype", STOCK_TOLERANCE, ids=str)
@pytest.mark.parametrize(("family", "case"), families_and(SAMPLES, with_reference=True))
def test_unmerged_reference_is_the_stock_model(family: str, case: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    inputs = inputs_for(model, [SAMPLES[case]])
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True)
    ours = ref.reference_forward(model, inputs)
    known = family_of(family)
    tolerance = STOCK_TOLERANCE[dtype] * (known.rounding if known.closest else 1)
    assert_close(ours.logits, stock.logits[0], tolerance)
    assert_close(ours.hidden, stock.hidden_states[-1][0], tolerance)
    assert ours.kv_lengths == [inputs["input_ids"].shape[1]] * len(known.attending(model))


@pytest.mark.parametrize(("family", "case"), families_and(SAMPLES, with_reference=True))
def test_unmerged_reference_generates_like_the_stock_model(family: str, case: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    inputs = inputs_for(model, [SAMPLES[case]])
    ids, logits, lengths = _generate(model, inputs)
    ours = ref.reference_generate(model, inputs, max_new_tokens=NEW_TOKENS)
    assert ours.ids == ids
    assert ours.kv_lengths == lengths
    assert_close(ours.logits, logits, TOLERANCE)


# -------------------------------------------------------------------- merge rules, by hand


def test_recycle_weighs_the_lowest_most() -> None:
    merge = ref.recycle([0.4, 0.1, 0.3, 0.2, 0.5], 2)
    assert merge.kept == [0, 2, 4]
    assert merge.holder == [0, 2, 2, 2, 4]
    assert _applied(merge, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx([1, (3 * 2 + 2 * 4 + 1 * 3) / 6, 5])


@pytest.mark.parametrize(
    ("visible", "seat"),
    [([1, 1, 1, 1, 1], 2), ([1, 1, 0, 1, 1], 3), ([1, 1, 0, 0, 1], 1), ([1, 0, 0, 0, 1], 2)],
)
def test_recycle_takes_the_highest_visible_seat(visible: list[int], seat: int) -> None:
    merge = ref.recycle([0.4, 0.1, 0.3, 0.2, 0.5], 2, [bool(flag) for flag in visible])
    assert merge.kept == [0, seat, 4]
    value = _applied(merge, [1.0, 2.0, 3.0, 4.0, 5.0])[merge.kept.index(seat)]
    assert value == pytest.approx(17 / 6)


def test_of_equal_scores_the_lower_index_goes_first() -> None:
    merge: Any = ref.recycle([1.0, 1.0, 1.0], 1)
    assert merge.kept == [1, 2]
    assert merge.recipe == {1: [(0, pytest.approx(2 / 3)), (1, pytest.approx(1 / 3))]}


def test_cluster_halves_and_adds_the_most_similar() -> None:
    hidden = torch.zeros(4, 4)
    hidden[3, 0], hidden[0, 0], hidden[0, 1], hidden[1, 2] = 1.0, 2 * math.log(3), 4.0, 8.0
    merge = ref.cluster([0.1, 0.2, 0.9, 0.8], 2, hidden)
    assert merge.kept == [2, 3]
    assert merge.holder == [3, 3, 2, 3]
    # Similarities 2 ln 3 and 0 over sqrt(4): weights 3/4 and 1/4.
    assert _applied(merge, [100.0, 10.0, 7.0, 2.0]) == pytest.approx([7, 0.5 * 2 + 0.375 * 100 + 0.125 * 10])


def test_cluster_takes_five_and_loses_the_rest() -> None:
    hidden = torch.tensor([[6.0], [1.0], [5.0], [2.0], [4.0], [3.0], [1.0], [9.0]])
    merge = ref.cluster([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 6, hidden)
    assert merge.kept == [6, 7]
    assert [token for token, _ in merge.recipe[6]] == [6, 0, 2, 4, 5, 3]
    assert merge.holder == [6, None, 6, 6, 6, 6, 6, 7]
    assert merge.holder_or_nearest()[1] == 6


@pytest.mark.parametrize(("num_kept", "num_recyclers"), [(1, 1), (29, 1), (30, 2), (50, 2), (51, 3)])
def test_cluster_recycles_with_a_twentieth_of_the_kept(num_kept: int, num_recyclers: int) -> None:
    scores = [float(score) for score in range(num_kept + 3)]
    assert len(ref.cluster(scores, 3, torch.ones(num_kept + 3, 2)).recipe) == num_recyclers


def test_nearest_averages_by_size() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0]])
    sizes = [1.0, 2.0, 3.0, 1.0]
    merge = ref.nearest([0.1, 0.2, 0.8, 0.9], 2, keys, sizes)
    assert merge.kept == [2, 3]
    assert merge.holder == [2, 3, 2, 3]
    assert _applied(merge, [10.0, 20.0, 30.0, 40.0]) == pytest.approx([(10 + 90) / 4, (40 + 40) / 3])
    assert merge.new_sizes(sizes) == [4, 3]


def test_diverse_keeps_the_best_of_many_alike() -> None:
    """Three alike tokens and two of their own kind: of the alike ones the best stays, though all score low."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.01], [1.0, -0.01], [0.0, 1.0], [-1.0, 0.2]])
    merge: Any = ref.diverse([0.1, 0.2, 0.15, 0.9, 0.8], 2, keys, [1.0, 1.0, 2.0, 1.0, 1.0])
    assert merge.kept == [1, 3, 4]
    assert merge.recipe[1] == [(0, pytest.approx(0.25)), (1, pytest.approx(0.25)), (2, pytest.approx(0.5))]


def test_bipartite_merges_the_most_similar_pairs() -> None:
    degrees = torch.tensor([0.0, 10.0, 55.0, 90.0, 95.0]) * math.pi / 180
    merge = ref.bipartite(2, torch.stack([degrees.cos(), degrees.sin()], dim=-1), [1.0] * 5)
    assert merge.kept == [1, 2, 3]
    assert merge.holder == [1, 1, 2, 3, 3]
    assert _applied(merge, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx([1.5, 3, 4.5])


def test_bipartite_removes_half_at_most() -> None:
    keys = torch.randn(7, 3)
    assert len(ref.bipartite(6, keys, [1.0] * 7).kept) == 4


def test_drop_loses_the_lowest() -> None:
    merge = ref.drop([0.3, 0.1, 0.2, 0.4], 2)
    assert merge.kept == [0, 3]
    assert merge.holder == [0, None, None, 3]
    assert merge.holder_or_nearest() == [0, 0, 3, 3]


def test_pooled_grid_keeps_the_mass_and_folds_the_rest() -> None:
    values = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]])
    folded, chosen, held = ref.choose_by_mass(values, [1.0, 0.0, 0.5, 0.0, 0.25, 1.0], columns=3, num_kept=3)
    assert chosen == [0, 2, 5]
    assert held == [0, 0, 2, 0, 5, 5]
    torch.testing.assert_close(folded.flatten(), torch.tensor([10.0, 10.0, 30.0, 10.0, 58.0, 58.0]))


def test_pooled_grid_without_mass_keeps_values() -> None:
    values = torch.tensor([[10.0], [20.0], [30.0]])
    folded, chosen, _ = ref.choose_by_mass(values, [0.0, 0.0, 0.0], columns=3, num_kept=2)
    assert chosen == [0, 1]
    assert folded.flatten().tolist() == [10, 20, 20]


@pytest.mark.parametrize(
    ("units", "unit", "vit_r", "removed"),
    [(64, 1, 6, 6), (50, 1, 0.25, 12), (4, 1, 92, 3), (24, 4, 0.16, 3), (24, 4, 6, 1), (24, 4, 1000, 23)],
)
def test_units_removed_in_the_encoder(units: int, unit: int, vit_r: int | float, removed: int) -> None:
    assert ref.Segment.full(units, unit).num_removed(vit_r) == removed


@pytest.mark.parametrize("family", families(with_reference=True, with_videos=True))
def test_text_stays_and_positions_stay_in_order(family: str) -> None:
    model = tiny_model(family)
    inputs = inputs_for(model, [SAMPLES["video, image"]])
    ids = inputs["input_ids"][0]
    text = ((ids != model.config.image_token_id) & (ids != model.config.video_token_id)).nonzero().flatten()
    for places in ref.reference_forward(model, inputs, **SETTINGS).kept:
        assert places == sorted(places)
        assert set(text.tolist()) <= set(places)


# --------------------------------------------------------------- library against reference


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "case"), families_and(MERGED, SAMPLES, with_reference=True))
def test_library_forward(family: str, case: str, rule: str) -> None:
    check_forward(family, [SAMPLES[case]], rule, SETTINGS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "case"), families_and(MERGED, SAMPLES, with_reference=True))
def test_library_decodes(family: str, case: str, rule: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    inputs = inputs_for(model, [SAMPLES[case]])
    ours = ref.reference_generate(
        model, inputs, max_new_tokens=NEW_TOKENS, method=ref.ReferenceMethod(rule), **SETTINGS
    )
    patch(model, **SETTINGS, method=library_method(rule))
    ids, logits, lengths = _generate(model, inputs)
    assert lengths == ours.kv_lengths
    assert_close(logits, ours.logits, tolerance_of(family))
    assert ids == ours.ids


@pytest.mark.parametrize(
    "changes",
    [
        {"llm_layers": []},
        {"vit_layers": []},
        {"vit_r": 6},
        {"vit_layers": [0, 1, 3], "vit_r": 0.2, "llm_layers": [2], "llm_ratio": 0.3},
        {"vit_r": 1000, "llm_ratio": 0.01},
    ],
    ids=["encoder only", "decoder only", "count", "other layers", "one token left"],
)
@pytest.mark.parametrize("family", families(with_reference=True, with_videos=True))
def test_library_forward_at_other_settings(family: str, changes: dict[str, Any]) -> None:
    tile = family_of(family).tile_patches
    if "vit_layers" in changes:
        changes = changes | {"vit_layers": [i for i in changes["vit_layers"] if i in family_of(family).merging_layers]}
    if changes.get("vit_r") == 1000 and tile is not None:
        changes = changes | {"vit_layers": [1], "vit_r": tile - 1}  # more than a tile has is refused in patch()
    check_forward(family, [SAMPLES["video, image"]], "recycle", SETTINGS | changes)


@pytest.mark.parametrize(("family", "case"), families_and(MERGED, SAMPLES, with_reference=True))
def test_library_scores_by_log_sum_exp(family: str, case: str) -> None:
    check_forward(family, [SAMPLES[case]], "recycle", SETTINGS, "query_lse", "query_lse")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("family", "batch"), families_and(["images", "videos"], BATCHES, with_reference=True))
def test_library_batch(family: str, batch: str, side: Any) -> None:
    shifted = family_of(family).forward_counts_padding and side == "left"
    tolerance = STOCK_TOLERANCE[torch.float32] if shifted else None
    check_forward(family, BATCHES[batch], "recycle", SETTINGS, side=side, tolerance=tolerance)


@pytest.mark.parametrize("family", families(with_reference=True, with_videos=True))
def test_library_asks_the_token_before_the_labels(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    inputs = inputs_for(model, [SAMPLES["video, image"]])
    first_label = inputs["input_ids"].shape[1] - 3
    expected = ref.reference_forward(model, inputs, query=first_label - 1, **SETTINGS)
    patch(model, **SETTINGS)
    labels = inputs["input_ids"].clone()
    labels[:, :first_label] = -100
    with torch.no_grad():
        assert_close(model(**inputs, labels=labels).logits[0], expected.logits, tolerance_of(family))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "case"), families_and(MERGED, SAMPLES, with_reference=True))
def test_library_features_keep_their_length(family: str, case: str, rule: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    inputs = inputs_for(model, [SAMPLES[case]])
    method = ref.ReferenceMethod(rule)
    settings = ref.ReferenceSettings(SETTINGS["vit_layers"], SETTINGS["vit_r"], method=method)
    with torch.no_grad():
        expected = ref.vision_stage(model, inputs, settings)
        patch(model, **SETTINGS, method=library_method(rule))
        features = _features(model, inputs)
    behind = family_of(family).beyond_features("video") if case == "video" else 0
    for ours, theirs in zip(features, expected, strict=True):
        assert_close(ours, theirs.values[: len(theirs.values) - behind], tolerance_of(family))


def _generate(model: Any, inputs: Inputs) -> tuple[list[int], Tensor, list[int]]:
    """Ids and logits of the new tokens, and the cache lengths at the end."""
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True, do_sample=False
    )
    lengths = key_lengths(out.past_key_values)
    return out.sequences[0, -NEW_TOKENS:].tolist(), torch.cat(out.logits), lengths


def _features(model: Any, inputs: Inputs) -> list[Tensor]:
    """The visual features of a single sample: one tensor per visual, images first."""
    return [feature for out in feature_outputs(model, inputs).values() for feature in out.pooler_output]


def _applied(merge: ref.Merge, values: list[float]) -> list[float]:
    return [float(value) for value in merge.apply([torch.tensor(value) for value in values])]
