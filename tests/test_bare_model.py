"""Patching the model inside, without its head: whoever calls the model around it gets the same answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from decode_helpers import BOTH, IMAGE, KINDS, RAGGED, SETTINGS, patched, single, skip_where_stock_mixes_images
from families import families, families_and, family_of
from helpers import assert_differ, assert_same, assert_says, feature_outputs, forward
from illava_hooks import PatchStateError, merging, patch, session_of, unpatch
from tiny_models import FAMILIES, Inputs, inputs_for, tiny_model

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams, all returned": {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
    "samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
}
SAMPLES = {"one": [IMAGE], "ragged": RAGGED, "both": [BOTH]}


def bare(family: str) -> Any:
    """A whole model of which only the model inside is patched."""
    model = tiny_model(family)
    patch(model.model, **SETTINGS[family])
    return model


def generated(model: Any, inputs: Inputs, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Logits and scores of each step, one below the other."""
    torch.manual_seed(11)
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    done = model.generate(**inputs, max_new_tokens=3, **wanted, **kwargs)
    return torch.cat(done.logits), torch.cat(done.scores)


@pytest.mark.parametrize(("family", "kind"), families_and(KINDS))
def test_forward(family: str, kind: str) -> None:
    whole, inside = patched(family), bare(family)
    inputs = inputs_for(whole, KINDS[kind])
    assert_same(forward(inside, inputs), forward(whole, inputs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "samples"), families_and(SAMPLES))
def test_generate(family: str, samples: str, way: str) -> None:
    """Equal, or refused with the cure where the head would have to repeat what merged; never silently other."""
    if way != "greedy":
        skip_where_stock_mixes_images(family, SAMPLES[samples])
    whole, inside = patched(family), bare(family)
    inputs = inputs_for(whole, SAMPLES[samples])
    expected = generated(whole, inputs, **WAYS[way])
    try:
        found = generated(inside, inputs, **WAYS[way])
    except PatchStateError as error:
        assert way != "greedy"
        assert_says(error, "patch the model with its head")
    else:
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    with merging(whole, False):
        assert_differ(generated(whole, inputs, **WAYS[way])[0], expected[0])


@pytest.mark.parametrize("caller", ["inside", "around"])
@pytest.mark.parametrize("patched_model", ["inside", "around"])
@pytest.mark.parametrize("family", families(with_videos=True))
def test_feature_tuples_have_the_stock_entries(family: str, patched_model: str, caller: str) -> None:
    model = tiny_model(family)
    inputs = single(model, BOTH)
    called = model.model if caller == "inside" else model
    options = {"return_dict": False, "output_hidden_states": True}

    def shapes() -> dict[str, list[Any]]:
        found = feature_outputs(called, inputs, **options)
        assert all(isinstance(entries, tuple) for entries in found.values())
        return {
            kind: [len(entry) if isinstance(entry, tuple | list) else entry.shape for entry in entries]
            for kind, entries in found.items()
        }

    with torch.no_grad():
        expected = shapes()
        assert set(expected) == {"image", "video"}
        patch(model.model if patched_model == "inside" else model, **SETTINGS[family])
        found = shapes()
    if family_of(family).head_makes_tuples and (patched_model, caller) == ("inside", "around"):
        # The head is not patched: what the language stage must know comes last.
        found = {kind: entries[:-1] for kind, entries in found.items()}
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_one_session_is_found_from_both(family: str) -> None:
    model = tiny_model(family)
    inputs = single(model, IMAGE)
    stock = forward(model, inputs)
    session = patch(model.model, **SETTINGS[family])
    assert session_of(model) is session_of(model.model) is session
    with merging(model, False):
        assert_same(forward(model, inputs), stock)
    around = patch(model, **SETTINGS[family])
    assert session_of(model) is session_of(model.model) is around is not session
    unpatch(model.model)
    assert session_of(model) is None is session_of(model.model)
    assert_same(forward(model, inputs), stock)
