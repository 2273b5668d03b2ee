"""Random settings on random prompts keep every promise; `make fuzz` runs more of them.

A failure prints the case and a line that repeats it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

from families import families_and_methods, family_of
from fuzz_oracles import check_provenance, check_report, check_widths
from helpers import prompt
from illava_hooks import METHODS, Method, merging, patch, unpatch
from illava_hooks.engine.compat import CACHE
from illava_hooks.merge.rules import RULES
from illava_hooks.methods import ENCODER_SCORES, LLM_SCORES
from tiny_models import FAMILIES, Inputs, Sample, inputs_for, real_positions, tiny_model

CASES = int(os.environ.get("ILLAVA_FUZZ_CASES", "150")) // 2
#: In float64 rounding does not decide who is kept: a batch can be compared with its samples.
DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)
STEPS = 2
_MODELS: dict[tuple[str, torch.dtype], Any] = {}


@dataclass(frozen=True)
class Case:
    """One random prompt with random settings."""

    samples: tuple[Sample, ...]
    side: str
    vit_layers: tuple[int, ...]
    vit_r: int | float
    llm_layers: tuple[int, ...]
    llm_ratio: float
    method: str | Method
    dtype: torch.dtype
    cache: str


def layers(allowed: Sequence[int]) -> st.SearchStrategy[tuple[int, ...]]:
    """Any of some layers of the tiny models."""
    return st.sets(st.sampled_from(sorted(allowed))).map(lambda found: tuple(sorted(found)))


@st.composite
def sample_of(draw: st.DrawFn, frames: int) -> Sample:
    """Text with some images, sometimes a video, if it may have frames."""
    side = st.integers(1, 12).map(lambda n: 8 * n)
    images = draw(st.lists(st.tuples(side, side), max_size=3))
    videos = (frames,) if frames and draw(st.integers(0, 3)) == 0 else ()
    text = tuple(draw(st.integers(0, 9)) for _ in range(len(images) + len(videos))) + (draw(st.integers(1, 9)),)
    order = "".join(draw(st.permutations("i" * len(images) + "v" * len(videos))))
    video_size = (8 * draw(st.integers(1, 5)), 8 * draw(st.integers(1, 5)))
    return Sample(draw(st.integers(0, 9)), tuple(images), videos, text, order, video_size)


def methods(names: Collection[str]) -> st.SearchStrategy[str | Method]:
    """A name, or one of the 192 other choices of scores, rule and weighing."""
    own = st.builds(
        lambda encoder, language, rule, proportional: Method("own", encoder, language, rule, "aligned", proportional),
        st.sampled_from(ENCODER_SCORES),
        st.sampled_from(LLM_SCORES),
        st.sampled_from(sorted(RULES)),
        st.booleans(),
    )
    return st.one_of(st.sampled_from(sorted(names)), own)


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    """Any case that `patch` accepts for a family."""
    known = family_of(name)
    frames = draw(st.integers(1, 6)) if known.with_videos else 0
    samples = tuple(draw(st.lists(sample_of(frames), min_size=1, max_size=3)))
    vit_layers = draw(layers(known.merging_layers))
    method = draw(methods([m for f, m in families_and_methods(METHODS) if f == name]))
    tile = known.tile_patches or 64
    most = (tile - 1) // max(1, len(vit_layers))
    vit_r = draw(st.one_of(st.integers(0, most), st.floats(0.01, 0.9)))
    if method == "illava-reference":  # survivors of a tile must form a square there
        vit_layers, vit_r = vit_layers[:1], tile - draw(st.integers(1, math.isqrt(tile))) ** 2
    return Case(
        samples,
        draw(st.sampled_from(["left", "right"])),
        vit_layers,
        vit_r,
        draw(layers(range(1, 4))),
        draw(st.floats(0.05, 1.0)),
        method,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(["dynamic", "static", "none"])),
    )


def model_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """The family's model."""
    if (family, dtype) not in _MODELS:
        _MODELS[family, dtype] = tiny_model(family, dtype=dtype)
    return _MODELS[family, dtype]


def batch_of(model: Any, samples: Any, side: Any = "left") -> Inputs:
    """A batch with pixels in the model's dtype."""
    inputs = inputs_for(model, list(samples), side=side)
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def cache_of(model: Any, kind: str, length: int) -> dict[str, Any]:
    """The arguments that choose a cache."""
    config = model.config.text_config
    if kind == "static":
        return {CACHE: StaticCache(config=config, max_cache_len=length + STEPS)}
    return {"use_cache": False} if kind == "none" else {CACHE: DynamicCache(config=config)}


def next_steps(model: Any, inputs: Inputs, cache: str) -> Tensor:
    """Logits of some steps of a generation, ``(B, steps, V)``."""
    kinds: dict[str, dict[str, Any]] = {"none": {"use_cache": False}, "static": {"cache_implementation": "static"}}
    wanted: dict[str, Any] = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(**inputs, **wanted, **kinds.get(cache, {})).logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=CASES, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_promises(family: str, data: st.DataObject) -> None:
    case = data.draw(cases(family), label="case")
    model = model_of(family, case.dtype)
    inputs = batch_of(model, case.samples, case.side)
    width, real = inputs["input_ids"].shape[1], inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True)
        session = patch(
            model, case.vit_layers, case.vit_r, case.llm_layers, case.llm_ratio, method=case.method, track=True
        )
        try:
            merged = model(**inputs, **cache_of(model, case.cache, width), output_hidden_states=True)
            assert merged.logits.shape == stock.logits.shape and merged.logits[real].isfinite().all()
            for ours, theirs in zip(merged.hidden_states, stock.hidden_states, strict=True):
                assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours[real].isfinite().all()
            cache = merged.past_key_values
            assert (cache is None) == (case.cache == "none")
            assert cache is None or int(cache.get_seq_length()) == width
            if any(sample.kinds for sample in case.samples) and not session.config.image.is_identity:
                check_report(model, session, case.samples, real)
                check_widths(session.report, cache, width + STEPS)
                check_provenance(model, session)
            if case.dtype is torch.float64:
                check_rows(model, case, inputs, stock.logits, merged.logits)
        finally:
            unpatch(model)


def check_rows(model: Any, case: Case, inputs: Inputs, stock: Tensor, logits: Tensor) -> None:
    """Every sample of the batch answers as it does alone, in a forward and in a generation.

    Where rounding decides a choice, rows are left out that stock itself rounds otherwise in a batch.
    """
    alone = {row: batch_of(model, [sample]) for row, sample in enumerate(case.samples)}
    if family_of(model).fragile_choice:
        with merging(model, False):
            own = {row: model(**single).logits[0] for row, single in alone.items()}
        alone = {r: s for r, s in alone.items() if torch.equal(own[r], stock[r, real_positions(inputs, r)])}
    if len(case.samples) > 1:
        for row, single in alone.items():
            expected = model(**single).logits[0]
            torch.testing.assert_close(logits[row, real_positions(inputs, row)], expected, atol=1e-4, rtol=1e-4)
    if case.side == "left":  # generation wants the prompts to end together
        found = next_steps(model, inputs, case.cache)
        for row, single in alone.items():
            expected = next_steps(model, single, "dynamic")[0]
            torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_only_prompt_is_untouched(family: str) -> None:
    model = model_of(family)
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in prompt(model, "text").items()}
    with torch.no_grad():
        stock = model(**inputs).logits
        patch(model, [1], 0.5, [1], 0.5)
        merged = model(**inputs).logits
    unpatch(model)
    assert torch.equal(merged, stock)
