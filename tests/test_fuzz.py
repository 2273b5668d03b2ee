"""Random settings on random prompts keep every promise; `make fuzz` runs more of them.

A failure prints the case and a line that repeats it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import prompt
from illava_hooks import METHODS, patch, unpatch
from tiny_models import FAMILIES, Inputs, Sample, inputs_for, real_positions, tiny_model

CASES = int(os.environ.get("ILLAVA_FUZZ_CASES", "150")) // 2
#: Rules that give every token exactly one place; the others lose tokens or share them out.
ONE_PLACE = ("illava", "nearest", "diverse", "tome")
_MODELS: dict[str, Any] = {}


@dataclass(frozen=True)
class Case:
    """One random prompt with random settings."""

    samples: tuple[Sample, ...]
    side: str
    vit_layers: tuple[int, ...]
    vit_r: int | float
    llm_layers: tuple[int, ...]
    llm_ratio: float
    method: str


def layers(first: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Any of the layers of the tiny models."""
    return st.sets(st.integers(first, 3)).map(lambda found: tuple(sorted(found)))


@st.composite
def sample_of(draw: st.DrawFn, frames: int) -> Sample:
    """Text with some images, sometimes a video."""
    side = st.integers(3, 12).map(lambda n: 8 * n)
    images = draw(st.lists(st.tuples(side, side), max_size=3))
    videos = (frames,) if draw(st.integers(0, 3)) == 0 else ()
    text = tuple(draw(st.integers(1, 9)) for _ in range(len(images) + len(videos) + 1))
    order = "".join(draw(st.permutations("i" * len(images) + "v" * len(videos))))
    return Sample(draw(st.integers(0, 9)), tuple(images), videos, text, order)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case that `patch` accepts."""
    frames = 2 * draw(st.integers(1, 3))
    samples = tuple(draw(st.lists(sample_of(frames), min_size=1, max_size=3)))
    vit_layers = draw(layers(0))
    most = 63 // max(1, len(vit_layers))
    return Case(
        samples,
        draw(st.sampled_from(["left", "right"])),
        vit_layers,
        draw(st.one_of(st.integers(0, most), st.floats(0.01, 0.9))),
        draw(layers(1)),
        draw(st.floats(0.05, 1.0)),
        draw(st.sampled_from(sorted(set(METHODS) - {"illava-reference"}))),
    )


def model_of(family: str) -> Any:
    """The family's model in float64, in which rounding does not decide who is kept."""
    if family not in _MODELS:
        _MODELS[family] = tiny_model(family, dtype=torch.float64)
    return _MODELS[family]


def double(inputs: Inputs) -> Inputs:
    """Pixels in float64."""
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=CASES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_promises(family: str, case: Case) -> None:
    model = model_of(family)
    inputs = double(inputs_for(model, list(case.samples), side=case.side))  # type: ignore[arg-type]
    with torch.no_grad():
        stock = model(**inputs, use_cache=True)
        session = patch(
            model, case.vit_layers, case.vit_r, case.llm_layers, case.llm_ratio, method=case.method, track=True
        )
        try:
            merged = model(**inputs, use_cache=True)
            assert merged.logits.shape == stock.logits.shape
            assert merged.past_key_values.get_seq_length() == stock.past_key_values.get_seq_length()
            real = inputs["attention_mask"].bool()
            assert merged.logits[real].isfinite().all()
            visual = [sample for sample in case.samples if sample.images or sample.videos]
            if visual and not session.config.image.is_identity:
                check_cache(session.report, merged.past_key_values)
                check_provenance(session.provenance, case.method)
            for row, sample in enumerate(case.samples if len(case.samples) > 1 else ()):
                alone = model(**double(inputs_for(model, [sample]))).logits[0]
                mine = merged.logits[row, real_positions(inputs, row)]
                torch.testing.assert_close(mine, alone, atol=1e-4, rtol=1e-4)
        finally:
            unpatch(model)


def check_cache(report: Any, cache: Any) -> None:
    """Every cache layer is as wide as the longest row at that layer."""
    widths = [layer.keys.shape[2] for layer in cache.layers]
    assert widths == [max(lengths) for lengths in report.sequence_tokens]


def check_provenance(provenance: Any, method: str) -> None:
    """Shares sum to 1 and, where the rule loses none, every patch has one place."""
    for (stage, _), found in provenance.merges.items():
        for image in found.images:
            shares = image.weights.to_dense()
            assert len(image.seats.unique()) == len(image.seats) == len(shares)
            sums = shares.sum(1)
            text = sums < 1e-6  # newlines
            assert method in ("illava-v2",) or stage == "language" or not text.any()
            if stage == "vision":
                torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5, rtol=0)
                if method in ONE_PLACE:
                    assert ((shares > 0).sum(0) == 1).all()


def test_a_text_only_prompt_is_untouched() -> None:
    model = model_of("qwen2_vl")
    inputs = double(prompt(model, "text"))
    with torch.no_grad():
        stock = model(**inputs).logits
        patch(model, [1], 0.5, [1], 0.5)
        merged = model(**inputs).logits
    unpatch(model)
    assert torch.equal(merged, stock)
