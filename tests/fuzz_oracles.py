"""What the random cases are measured by: counts by the README's words, widths of caches, places of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from families import family_of
from tiny_models import Sample

#: Rules that give every token exactly one place; "cluster" and "drop" lose some.
ONE_PLACE = ("recycle", "nearest", "diverse", "bipartite")


def removed_in_encoder(patches: int, vit_r: int | float, group: int, half_at_most: bool) -> int:
    """How many patches of a tile or frame a layer takes away: whole groups, and one stays at least."""
    wish = vit_r if isinstance(vit_r, int) else math.floor(patches * vit_r)
    units = patches // group
    return min(wish // group, units // 2 if half_at_most else units - 1) * group


def removed_in_decoder(tokens: int, ratio: float, half_at_most: bool) -> int:
    """How many visual tokens of an image a decoder layer takes away; one stays at least."""
    return max(0, min(round(tokens * (1 - ratio)), tokens // 2 if half_at_most else tokens - 1))


def check_report(model: Any, session: Any, samples: Sequence[Sample], real: Tensor) -> None:
    """The counts of every layer are those of the README, and text stays."""
    config, report = session.config, session.report
    schedule, half = config.image, config.method.merge == "bipartite"
    family = family_of(model)
    group = family.patches_per_token
    expected = []
    for segments in family.segments(model, samples):
        steps = [sum(segments)]
        for layer in range(4 + family.layers_behind):
            merges = layer in schedule.vit_layers and schedule.vit_r
            segments = [n - removed_in_encoder(n, schedule.vit_r, group, half) if merges else n for n in segments]
            steps.append(sum(segments))
        expected.append(tuple(steps))
    assert [visual.vision_tokens for visual in report.visuals] == expected
    for row, total in enumerate(real.sum(1).tolist()):
        mine = [visual for visual in report.visuals if visual.sample == row]
        assert len(mine) == len(samples[row].kinds) and report.prompt_tokens[row] == total
        text = total - sum(visual.prompt_tokens for visual in mine)
        for layer, lengths in enumerate(report.sequence_tokens):
            assert lengths[row] - sum(visual.language_tokens[layer] for visual in mine) == text
        for visual in mine:
            tokens = visual.language_tokens[0]
            for layer in range(4):
                if layer in schedule.llm_layers:
                    tokens -= removed_in_decoder(tokens, schedule.llm_ratio, half)
                assert visual.language_tokens[layer] == tokens > 0
            if family.one_to_one:
                assert visual.language_tokens[0] == visual.vision_tokens[-1] // group


def check_widths(report: Any, cache: Any, static_length: int) -> None:
    """Every cache layer holds as many keys as the longest row has tokens there."""
    for layer, lengths in zip(cache.layers if cache is not None else (), report.sequence_tokens, strict=False):
        if not hasattr(layer, "keys"):  # it carries a state along
            continue
        if hasattr(layer, "max_cache_len"):
            assert layer.keys.shape[2] == static_length
            assert int(layer.num_keys()) == max(lengths)
        else:
            assert layer.keys.shape[2] == max(lengths)


def check_provenance(model: Any, session: Any) -> None:
    """Seats are places of the image, shares sum to 1, and where the rule loses none every patch has one place.

    Where a family crops, interpolates or adds newlines between the stages, shares need not sum to 1 later.
    """
    provenance, report, method = session.provenance, session.report, session.config.method
    one_place = method.merge in ONE_PLACE
    exact = family_of(model).one_to_one
    for (stage, layer), found in provenance.merges.items():
        assert len(found.images) == len(report.visuals)
        for image, visual in zip(found.images, report.visuals, strict=True):
            shares = image.weights.to_dense().double()
            count = visual.vision_tokens[layer + 1] if stage == "vision" else visual.language_tokens[layer]
            assert len(image.seats.unique()) == len(image.seats) == len(shares) == count
            places = visual.vision_tokens[0] if stage == "vision" else visual.prompt_tokens
            assert 0 <= image.seats.min() and image.seats.max() < places and shares.min() >= 0
            sums = shares.sum(1)
            if stage == "vision" or exact:
                torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
                homes = (shares > 0).sum(0)
                assert (homes == 1).all() if one_place else method.merge == "cluster" or (homes <= 1).all()
            else:
                assert (sums < 1 + 1e-5).all()
