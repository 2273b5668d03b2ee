"""Calls inside a running `generate` and steps of a generator in other contexts do not meet what surrounds them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextvars import copy_context
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from decode_helpers import BOTH, SETTINGS, patched, single, steps
from families import families, families_and, family_of
from helpers import assert_differ
from illava_hooks import merging, patch, session_of
from tiny_models import FAMILIES, Inputs, Sample, tiny_model

SHORT = Sample(text_seed=7, images=((32, 32),), text=(3, 4))
LONGER = {"image": Sample(text_seed=8, images=((64, 96),), text=(5, 9)), "image and video": BOTH}


class Calls(LogitsProcessor):
    """Calls something at every step of a generation and keeps what it gave; the scores stay as they are."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call
        self.found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.found.append(self.call())
        return scores


@torch.no_grad()
def uncached(model: Any, inputs: Inputs) -> Tensor:
    """Logits of a call without a cache; positions are given where a model keeps those of the call before."""
    where = family_of(model).explicit_positions(model, inputs)
    return model(**inputs, **where, use_cache=False).logits


def another(family: str) -> Any:
    """A patched model of the same family with other weights and other settings."""
    model = tiny_model(family, seed=3)
    patch(model, **{**SETTINGS[family], "llm_layers": [2], "llm_ratio": 0.4})
    return model


@pytest.mark.parametrize("outer_cache", [True, False])
@pytest.mark.parametrize("who", ["itself", "another"])
@pytest.mark.parametrize(("family", "kind"), families_and(LONGER))
def test_a_call_inside_generate_is_a_call_of_its_own(family: str, kind: str, who: str, outer_cache: bool) -> None:
    model = patched(family)
    called = model if who == "itself" else another(family)
    outer, inner = single(model, SHORT), single(model, LONGER[kind])
    assert inner["input_ids"].shape[1] > outer["input_ids"].shape[1] + 2
    expected = uncached(called, inner)
    with merging(called, False):
        assert_differ(uncached(called, inner), expected)
    _, undisturbed = steps(model, outer, 3, use_cache=outer_cache)
    calls = Calls(lambda: uncached(called, inner))
    _, disturbed = steps(model, outer, 3, use_cache=outer_cache, logits_processor=[calls])
    assert len(calls.found) == 3
    for found in calls.found:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # What surrounds the calls goes on as if they were not there.
    torch.testing.assert_close(torch.stack(disturbed), torch.stack(undisturbed), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", families(generates_from_embeddings=True))
def test_a_call_inside_a_generation_from_embeddings(family: str) -> None:
    """The prompt has no ids then that a longer call could be compared with."""
    model = patched(family)
    outer, inner = single(model, SHORT), single(model, LONGER["image"])
    expected = uncached(model, inner)
    outer["inputs_embeds"] = model.get_input_embeddings()(outer.pop("input_ids")).detach()
    calls = Calls(lambda: uncached(model, inner))
    model.generate(**outer, max_new_tokens=2, do_sample=False, logits_processor=[calls])
    for found in calls.found:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("who", ["itself", "another"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_inside_generate(family: str, who: str) -> None:
    model = patched(family)
    called = model if who == "itself" else another(family)
    outer, inner = single(model, SHORT), single(model, LONGER["image"])
    settings = {"new_tokens": 2, "use_cache": False}
    expected, undisturbed = torch.stack(steps(called, inner, **settings)[1]), steps(model, outer, **settings)[1]
    calls = Calls(lambda: torch.stack(steps(called, inner, **settings)[1]))
    _, disturbed = steps(model, outer, **settings, logits_processor=[calls])
    for found in calls.found:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.stack(disturbed), torch.stack(undisturbed), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("end", ["exhausted", "closed", "thrown"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_switch_closed_in_another_context(family: str, end: str) -> None:
    """Servers run each step of a generator in a context of its own."""
    model = patched(family)
    inputs = single(model, SHORT)
    session = session_of(model)
    with torch.no_grad():
        merged = model(**inputs).logits
        seen: list[Any] = []

        def holding() -> Generator[Tensor, Any, None]:
            with merging(model, False):
                seen.append(session.active)
                yield model(**inputs).logits

        generator = holding()
        stock = copy_context().run(next, generator)
        assert_differ(stock, merged)
        other = copy_context()
        if end == "exhausted":
            assert other.run(next, generator, "over") == "over"
        elif end == "closed":
            other.run(generator.close)
        else:
            with pytest.raises(KeyError):
                other.run(generator.throw, KeyError())
        assert seen == [False] and session.active and other.run(lambda: session.active)
        assert torch.equal(model(**inputs).logits, merged)
        with merging(model, False):
            assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generator_left_to_the_garbage_collector(family: str) -> None:
    model = patched(family)
    session = session_of(model)

    def holding() -> Iterator[bool]:
        with merging(model, False):
            yield session.active

    generator = holding()
    with merging(model, True):
        assert copy_context().run(next, generator) is False
        assert session.active
        del generator
        assert session.active
    assert session.active
